"""The config.yaml of NX-AI's `xlstm_large`, read strictly and written so that the peer's formulas return our sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openxlstm.checkpoint.hf_layout import IN_TREE_DEFAULTS, MACHINE_FIELDS, large_facts, large_from_facts
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm_large import xLSTMLargeConfig

REQUIRED = ("embedding_dim", "num_heads", "num_blocks", "vocab_size")
DEFAULTS = {name: value for name, value in IN_TREE_DEFAULTS.items() if name not in (*REQUIRED, "tie_word_embeddings")}
DEFAULTS |= {"ffn_proj_factor": 2.6667}  # in-tree: 2.667


def from_nx_large(data: Mapping[str, Any], *, ffn_width: int) -> xLSTMLargeConfig:
    """The native config; `ffn_width` is what the tensors say.

    Raises:
        ValueError: an unknown or missing field, or one that this model cannot have.
    """
    known = {*REQUIRED, *DEFAULTS, *MACHINE_FIELDS}
    for key in data:
        if key not in known:
            raise ValueError(f"config.yaml: xlstm_large has no field {key!r}{did_you_mean(key, known)}")
    if missing := [key for key in REQUIRED if key not in data]:
        raise ValueError(f"config.yaml lacks {', '.join(missing)}, which xlstm_large requires")
    facts = {**DEFAULTS, **{key: value for key, value in data.items() if key not in MACHINE_FIELDS}}
    return large_from_facts(facts, ffn_width=ffn_width)


def to_nx_large(config: xLSTMLargeConfig) -> dict[str, Any]:
    """config.yaml as plain data: facts only, so that the peer's own defaults choose how to run.

    Raises:
        ValueError: what the peer cannot compute.
    """
    return large_facts(config) | {"weight_mode": "single"}
