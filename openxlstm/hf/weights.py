"""Files whose tensors have other names than our modules, for `from_pretrained`: fused matrices, and NX-AI's layout.

The tables are those of `checkpoint`, which `openxlstm.load` reads by; here they are said in the language of
transformers, so that sharded loading, offloading and quantisers see the final names. They are only ever read:
`save_pretrained` of our classes writes the names that modules have.
"""

from __future__ import annotations

import re

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from openxlstm.checkpoint import hf_layout, rules_large

FUSED = {  # in the file: its rows, top to bottom
    "mlstm_layer.qkv_opreact.weight": rules_large.QKVO,
    "mlstm_layer.ifgate_preact.weight": rules_large.GATES,
    "mlstm_layer.ifgate_preact.bias": rules_large.GATE_BIASES,
    "ffn.proj_up_gate_z.weight": rules_large.UP,
}


def conversions() -> list[WeightConverter | WeightRenaming]:
    """What transformers does to a tensor of a file before it becomes a parameter.

    Sizes of the parts come from the target parameters: q and k are narrower than v and o, so equal parts are wrong.
    """
    # Anchored: the pattern is searched for, and would be found in backbone.embedding.weight
    nxai = WeightRenaming(f"^{re.escape(rules_large.EMBEDDING['nxai-large'])}$", rules_large.EMBEDDING["hf"])
    return [nxai, *(WeightConverter(re.escape(name), list(rows), [Split(dim=0)]) for name, rows in FUSED.items())]


def register() -> None:
    """For our model type. By class name it would also be applied to the in-tree class, which is called the same."""
    register_checkpoint_conversion_mapping(hf_layout.OURS, conversions(), overwrite=True)
