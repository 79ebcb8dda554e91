"""openxlstm as a citizen of Hugging Face transformers: the only folder that imports it.

    import openxlstm.hf                                   # registers model_type "openxlstm" with the Auto classes
    model = AutoModelForCausalLM.from_pretrained("a/folder/of/ours")

config.py      xLSTMConfig: the native configs in the shape that transformers expects
cache.py       xLSTMCache: what `generate` carries from token to token, one frozen state per block
inputs.py      attention_mask, cu_seq_lens_q, seq_idx, position_ids to the mask and reset of our operations
modeling.py    xLSTMModel, xLSTMForCausalLM: our blocks behind the arguments of transformers
generation.py  what `generate` asks of a model with a state instead of keys and values
heads.py       xLSTMForSequenceClassification, xLSTMForTokenClassification
in_tree.py     the config of transformers' own xLSTM, read and written back
weights.py     files of fused matrices, and NX-AI's, for from_pretrained
lora.py        LORA_TARGETS
takeover.py    accelerate(model), register(override=True), patch_transformers(): its models computed by ours

Importing registers our own model type and nothing else: the in-tree model of transformers stays as it is.
"""

from openxlstm.hf import weights
from openxlstm.hf.cache import StateLayer as StateLayer
from openxlstm.hf.cache import xLSTMCache as xLSTMCache
from openxlstm.hf.config import xLSTMConfig as xLSTMConfig
from openxlstm.hf.heads import xLSTMForSequenceClassification as xLSTMForSequenceClassification
from openxlstm.hf.heads import xLSTMForTokenClassification as xLSTMForTokenClassification
from openxlstm.hf.lora import LORA_TARGETS as LORA_TARGETS
from openxlstm.hf.modeling import xLSTMForCausalLM as xLSTMForCausalLM
from openxlstm.hf.modeling import xLSTMModel as xLSTMModel
from openxlstm.hf.modeling import xLSTMPreTrainedModel as xLSTMPreTrainedModel
from openxlstm.hf.takeover import accelerate as accelerate
from openxlstm.hf.takeover import patch_transformers as patch_transformers
from openxlstm.hf.takeover import register as register
from openxlstm.hf.takeover import restore as restore
from openxlstm.hf.takeover import unpatch_transformers as unpatch_transformers
from openxlstm.hf.takeover import unregister as unregister

register()
weights.register()
