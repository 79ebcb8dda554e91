"""Names of the NeurIPS architecture in a Hugging Face folder of model_type "openxlstm": ours, regrouped.

transformers wants everything but the head in one module with one prefix. The 7B architecture needs no table: its names
are those of transformers' own xLSTM, on our side too.
"""

from __future__ import annotations

from openxlstm.checkpoint.forms import Rule, rule
from openxlstm.checkpoint.plan import our_tensors
from openxlstm.models.xlstm import xLSTMConfig

PREFIXES = {  # ours: theirs, which are those of the 7B architecture as far as it has them
    "stack.blocks.": "backbone.blocks.",
    "stack.norm.": "backbone.out_norm.",
    "embedding.": "backbone.embeddings.",
    "head.": "lm_head.",
}


def rules(config: xLSTMConfig) -> tuple[Rule, ...]:
    """Every tensor of the model, on both sides once. A tied head is not stored twice."""
    return tuple(rule(name, their_name(name)) for name in our_tensors(config))


def their_name(name: str) -> str:
    """The name of our tensor inside the Hugging Face class."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no row for {name}")
