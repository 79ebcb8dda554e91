"""Names and shapes of the 7B architecture in the files of NX-AI (`xlstm_large`) and of transformers (`xlstm`).

Our own names are those of transformers, so its table is the identity; NX-AI's differs in one key. Either may hold fused
matrices (`weight_mode: fused`): rows q, k, v, o; rows i, f; rows gate, up.

H heads, U_f feed-forward width.
"""

from __future__ import annotations

from openxlstm.checkpoint.forms import TIED, Rule, fused, rule, under
from openxlstm.models.xlstm_large import xLSTMLargeConfig

EMBEDDING = {"hf": "backbone.embeddings.weight", "nxai-large": "embedding.weight"}

BLOCK = (
    rule("norm_mlstm.weight", "norm_mlstm.weight"),
    rule("norm_ffn.weight", "norm_ffn.weight"),
    rule("mlstm_layer.multihead_norm.weight", "mlstm_layer.multihead_norm.weight"),
    rule("mlstm_layer.out_proj.weight", "mlstm_layer.out_proj.weight"),
    rule("ffn.proj_down.weight", "ffn.proj_down.weight"),
)
QKVO = tuple(f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact"))
GATES = tuple(f"mlstm_layer.{name}.weight" for name in ("igate_preact", "fgate_preact"))
GATE_BIASES = tuple(f"mlstm_layer.{name}.bias" for name in ("igate_preact", "fgate_preact"))
UP = tuple(f"ffn.{name}.weight" for name in ("proj_up_gate", "proj_up"))

SINGLE = (*BLOCK, *(rule(name, name) for name in (*QKVO, *GATES, *GATE_BIASES, *UP)))


def fused_rows(config: xLSTMLargeConfig) -> tuple[Rule, ...]:
    """The rows of a block whose matrices are fused."""
    return (
        *BLOCK,
        rule(QKVO, "mlstm_layer.qkv_opreact.weight", fused(config.QK, config.QK, config.HV, config.HV)),
        rule(GATES, "mlstm_layer.ifgate_preact.weight", fused(config.heads, config.heads)),
        rule(GATE_BIASES, "mlstm_layer.ifgate_preact.bias", fused(config.heads, config.heads)),
        rule(UP, "ffn.proj_up_gate_z.weight", fused(config.U_f, config.U_f)),
    )


def rules(config: xLSTMLargeConfig, layout: str, *, is_fused: bool = False, head: bool = True) -> tuple[Rule, ...]:
    """Every tensor of the model, on both sides once.

    Args:
        layout: a key of EMBEDDING.
        head: False for a tied model whose file does not repeat the embedding as lm_head.
    """
    embedding = EMBEDDING[layout]
    if not config.tie_embeddings:
        ends = [rule(EMBEDDING["hf"], embedding), rule("lm_head.weight", "lm_head.weight")]
    elif head:
        ends = [rule(EMBEDDING["hf"], (embedding, "lm_head.weight"), TIED)]
    else:
        ends = [rule(EMBEDDING["hf"], embedding)]
    rows = under(("backbone.blocks.{i}.",) * 2, fused_rows(config) if is_fused else SINGLE)
    blocks = [row.of_block(index) for index in range(config.blocks) for row in rows]
    return (*ends, *blocks, rule("backbone.out_norm.weight", "backbone.out_norm.weight"))
