"""Names and shapes of NX-AI's package `xlstm` (2.0.6), the NeurIPS architecture, as a table in both directions.

theirs are the keys of `xLSTMLMModel.state_dict()`. Three names lie and must be read as the table says:
  an sLSTM's `fgate` projection feeds the input gate, its `igate` the forget gate (in R and b, slot 0 is i and 1 is f);
  norms hold weight - 1;
  `_recurrent_kernel_` and `_bias_` are laid out by the backend that wrote the file, vanilla or cuda.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openxlstm.checkpoint.forms import (
    CONV,
    CUDA,
    NO_BIAS,
    NO_HEADWISE_BIAS,
    NO_WEIGHT,
    NORM,
    TIED,
    VANILLA,
    Rule,
    rule,
    under,
)
from openxlstm.models.xlstm import xLSTMStackConfig

Backend = Literal["vanilla", "cuda"]

STACK = "xlstm_block_stack."  # what stands before the names of a stack inside a language model


@dataclass(frozen=True, slots=True)
class Variant:
    """In what files of one architecture may differ."""

    backend: Backend = "vanilla"
    stack: str = STACK  # "" for a bare block stack
    mlstm_bias: bool = True  # whether a model with biases has them here: `bias` of the peer does not reach the ffn
    ffn_bias: bool = True
    group_norm: bool = True  # False: group_norm_weight=False, a norm without weight


ENDS = (
    rule("embedding.weight", "token_embedding.weight"),
    rule("head.weight", "lm_head.weight"),
)
TIED_ENDS = (rule("embedding.weight", ("token_embedding.weight", "lm_head.weight"), TIED),)

LAST_NORM = (rule("norm.weight", "post_blocks_norm.weight", NORM),)

MLSTM = (
    rule("norm.weight", "xlstm_norm.weight", NORM),
    rule("up.weight", "xlstm.proj_up.weight"),  # rows: xu, z
    rule("conv.weight", "xlstm.conv1d.conv.weight", CONV),
    rule("conv.bias", "xlstm.conv1d.conv.bias"),
    rule("q.weight", "xlstm.q_proj.weight"),  # [block, out, in]
    rule("k.weight", "xlstm.k_proj.weight"),
    rule("v.weight", "xlstm.v_proj.weight"),
    rule("gate_i.weight", "xlstm.mlstm_cell.igate.weight"),  # columns: q, k, v. Here the names are true
    rule("gate_i.bias", "xlstm.mlstm_cell.igate.bias"),
    rule("gate_f.weight", "xlstm.mlstm_cell.fgate.weight"),
    rule("gate_f.bias", "xlstm.mlstm_cell.fgate.bias"),
    rule("head_norm.weight", "xlstm.mlstm_cell.outnorm.weight", NORM),
    rule("skip", "xlstm.learnable_skip"),
    rule("down.weight", "xlstm.proj_down.weight"),
)
MLSTM_BIAS = (
    rule("up.bias", "xlstm.proj_up.bias"),
    rule("q.bias", "xlstm.q_proj.bias"),
    rule("k.bias", "xlstm.k_proj.bias"),
    rule("v.bias", "xlstm.v_proj.bias"),
    rule("down.bias", "xlstm.proj_down.bias"),
)
SLSTM = (
    rule("norm.weight", "xlstm_norm.weight", NORM),
    rule("conv.weight", "xlstm.conv1d.conv.weight", CONV),
    rule("conv.bias", "xlstm.conv1d.conv.bias"),
    rule("gate_i.weight", "xlstm.fgate.weight"),  # swapped by name
    rule("gate_f.weight", "xlstm.igate.weight"),  # swapped by name
    rule("gate_z.weight", "xlstm.zgate.weight"),
    rule("gate_o.weight", "xlstm.ogate.weight"),
    rule(("R", "b"), ("xlstm.slstm_cell._recurrent_kernel_", "xlstm.slstm_cell._bias_"), VANILLA),
    rule("head_norm.weight", "xlstm.group_norm.weight", NORM),
    rule("norm_ffn.weight", "ffn_norm.weight", NORM),
    rule("ffn_up.weight", "ffn.proj_up.weight"),  # rows: gate, up
    rule("ffn_down.weight", "ffn.proj_down.weight"),
)
FFN_BIAS = (
    rule("ffn_up.bias", "ffn.proj_up.bias"),
    rule("ffn_down.bias", "ffn.proj_down.bias"),
)
IGNORED = "mlstm_cell.causal_mask"  # a buffer of early versions, T x T: how a model was run, not what it learned


def rules(config: xLSTMStackConfig, variant: Variant, *, tied: bool | None) -> tuple[Rule, ...]:
    """Every tensor of the model, on both sides once.

    Args:
        tied: whether the head is the embedding; None for a bare stack, which has neither.
    """
    ours = "" if tied is None else "stack."
    found: list[Rule] = [*(() if tied is None else TIED_ENDS if tied else ENDS)]
    for index, kind in enumerate(config.pattern):
        rows = mlstm_rows(config, variant) if kind == "m" else slstm_rows(config, variant)
        prefixes = (f"{ours}blocks.{{i}}.", f"{variant.stack}blocks.{{i}}.")
        found += (row.of_block(index) for row in under(prefixes, rows))
    return (*found, *under((ours, variant.stack), LAST_NORM))


def mlstm_rows(config: xLSTMStackConfig, variant: Variant) -> list[Rule]:
    """The rows of one m block."""
    rows = [row for row in MLSTM if config.conv or not row.ours[0].startswith("conv.")]
    if not config.bias:
        return rows
    return [*rows, *MLSTM_BIAS] if variant.mlstm_bias else _without_biases(rows, MLSTM_BIAS)


def slstm_rows(config: xLSTMStackConfig, variant: Variant) -> list[Rule]:
    """The rows of one s block."""
    rows = [row for row in SLSTM if config.conv or not row.ours[0].startswith("conv.")]
    if variant.backend == "cuda":
        rows = [rule(row.ours, row.theirs, CUDA) if row.form is VANILLA else row for row in rows]
    if not variant.group_norm:
        rows = [row for row in rows if row.ours != ("head_norm.weight",)]
        rows = [
            rule(("gate_z.weight", "head_norm.weight"), row.theirs, NO_WEIGHT)
            if row.ours == ("gate_z.weight",)
            else row
            for row in rows
        ]
    if not config.bias:
        return rows
    return [*rows, *FFN_BIAS] if variant.ffn_bias else _without_biases(rows, FFN_BIAS)


def _without_biases(rows: list[Rule], biases: tuple[Rule, ...]) -> list[Rule]:
    """The rows, with biases of 0 in ours where the file has none."""
    missing = {row.ours[0] for row in biases}
    changed = []
    for row in rows:
        bias = row.ours[0].removesuffix("weight") + "bias"
        if bias in missing:
            form = NO_HEADWISE_BIAS if row.ours[0] in ("q.weight", "k.weight", "v.weight") else NO_BIAS
            row = rule((*row.ours, bias), row.theirs, form)
        changed.append(row)
    return changed
