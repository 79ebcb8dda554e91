"""Names of tensors in a GGUF file: those that other architectures have there, and `mlstm_`, `slstm_` for the cells.

Matrices keep their shape, so both directions are a renaming.
"""

from __future__ import annotations

from functools import lru_cache

from openxlstm.checkpoint.forms import Rule, rule
from openxlstm.checkpoint.plan import build, our_tensors
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig
from openxlstm.nn.linear import Embedding, Linear

Config = xLSTMConfig | xLSTMLargeConfig

ENDS = {  # ours: theirs
    "embedding": "token_embd", "stack.norm": "output_norm", "head": "output",
    "backbone.embeddings": "token_embd", "backbone.out_norm": "output_norm", "lm_head": "output",
}  # fmt: skip
MLSTM = {
    "norm": "attn_norm", "up": "mlstm_up", "conv": "ssm_conv1d", "q": "attn_q", "k": "attn_k", "v": "attn_v",
    "gate_i": "mlstm_igate", "gate_f": "mlstm_fgate", "head_norm": "mlstm_norm", "down": "mlstm_down",
}  # fmt: skip
SLSTM = {
    "norm": "attn_norm", "conv": "ssm_conv1d", "gate_i": "slstm_igate", "gate_f": "slstm_fgate",
    "gate_z": "slstm_zgate", "gate_o": "slstm_ogate", "head_norm": "slstm_norm", "norm_ffn": "ffn_norm",
    "ffn_up": "ffn_up", "ffn_down": "ffn_down",
}  # fmt: skip
LARGE = {
    "norm_mlstm": "attn_norm", "mlstm_layer.q": "attn_q", "mlstm_layer.k": "attn_k", "mlstm_layer.v": "attn_v",
    "mlstm_layer.ogate_preact": "attn_gate", "mlstm_layer.igate_preact": "mlstm_igate",
    "mlstm_layer.fgate_preact": "mlstm_fgate", "mlstm_layer.multihead_norm": "mlstm_norm",
    "mlstm_layer.out_proj": "attn_output", "norm_ffn": "ffn_norm", "ffn.proj_up_gate": "ffn_gate",
    "ffn.proj_up": "ffn_up", "ffn.proj_down": "ffn_down",
}  # fmt: skip
WHOLE = {
    "skip": "mlstm_skip.weight",
    "R": "slstm_recurrent.weight",
    "b": "slstm_recurrent.bias",
}  # parameters of blocks


def rules(config: Config) -> tuple[Rule, ...]:
    """The table of this model."""
    return tuple(rule(name, _theirs(name, config)) for name in our_tensors(config))


def _theirs(name: str, config: Config) -> str:
    module, _, leaf = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    _, _, rest = name.partition("blocks.")
    index, _, inner = rest.partition(".")
    if inner in WHOLE:
        return f"blk.{index}.{WHOLE[inner]}"
    if isinstance(config, xLSTMLargeConfig):
        table = LARGE
    else:
        table = MLSTM if config.pattern[int(index)] == "m" else SLSTM
    module, _, leaf = inner.rpartition(".")
    assert module in table, f"{name} has no name in GGUF files; give it one in rules_gguf.py"
    return f"blk.{index}.{table[module]}.{leaf}"


@lru_cache(maxsize=8)
def matrices(config: Config) -> frozenset[str]:
    """Our names of what may be quantised: dense maps, embedding and head. All else stays fp32.

    Gates are exponents; norms, convolutions, skips and block-diagonal maps are small; the sLSTM's R feeds its own
    rounding back at every step.
    """
    modules = build(config).named_modules()
    return frozenset(f"{name}.weight" for name, module in modules if type(module) in (Linear, Embedding))
