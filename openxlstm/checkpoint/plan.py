"""A plan: which model some foreign tensors are, and by which rules; checked before a number is read.

Total and strict: every tensor of the model is made by exactly one rule, every tensor of the file is used by exactly
one, and every shape in the file is the one that the rule predicts. What does not fit is an error that shows the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from openxlstm.checkpoint.forms import Rule, rule
from openxlstm.checkpoint.sources import Source
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTM, xLSTMConfig, xLSTMStack, xLSTMStackConfig
from openxlstm.models.xlstm_large import xLSTMLarge, xLSTMLargeConfig

AnyConfig = xLSTMStackConfig | xLSTMLargeConfig  # an xLSTMConfig is an xLSTMStackConfig

LAYOUTS = {  # name: what a person calls it
    "ours": "openxlstm",
    "hf": "Hugging Face",
    "nxai": "NX-AI xlstm",
    "nxai-large": "NX-AI xlstm_large",
    "gguf": "GGUF",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a checkpoint is. `notes` are sentences about what the files leave open or what a peer does not keep."""

    layout: str  # a key of LAYOUTS
    config: AnyConfig
    rules: tuple[Rule, ...]
    notes: tuple[str, ...] = ()


def build(config: AnyConfig) -> nn.Module:
    """The model of a config, without numbers: on the meta device."""
    with torch.device("meta"):
        if isinstance(config, xLSTMLargeConfig):
            return xLSTMLarge(config)
        return xLSTM(config) if isinstance(config, xLSTMConfig) else xLSTMStack(config)


@lru_cache(maxsize=8)  # a conversion asks for it several times; of 48 blocks it takes half a second
def our_tensors(config: AnyConfig) -> Mapping[str, Tensor]:
    """Every tensor that the model has, as meta tensors, in its own order."""
    return MappingProxyType(dict(build(config).state_dict()))


def identity(config: AnyConfig) -> tuple[Rule, ...]:
    """Our own layout as a table."""
    return tuple(rule(name, name) for name in our_tensors(config))


def check(plan: Plan, source: Source) -> None:
    """The file holds exactly what the plan reads.

    Raises:
        ValueError: an unknown, missing or wrong-shaped tensor, by name.
    """
    ours = our_tensors(plan.config)
    made = [name for row in plan.rules for name in row.ours]
    assert sorted(made) == sorted(ours), f"the table of {plan.layout} does not cover the model: {set(made) ^ set(ours)}"
    expected = dict(their_shapes(plan.rules, ours))
    for name in sorted(source.entries.keys() - expected.keys()):
        raise ValueError(
            f"{source.entries[name].file} holds {name!r}, which a checkpoint of {LAYOUTS[plan.layout]} with these "
            f"sizes has not{did_you_mean(name, expected.keys() - source.entries.keys())}"
        )
    if missing := sorted(expected.keys() - source.entries.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source.path} lacks {missing[0]!r}{more}, so the model would be incomplete")
    for name, shape in expected.items():
        if (found := source.entries[name].shape) != shape:
            raise ValueError(
                f"{source.entries[name].file}: {name} has shape {list(found)}; the other tensors and the config ask "
                f"for {list(shape)}"
            )


def their_shapes(rules: tuple[Rule, ...], ours: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor on the other side; `ours` may be meta tensors."""
    for row in rules:
        for name, tensor in zip(row.theirs, row.form.write(tuple(ours[name] for name in row.ours)), strict=True):
            yield name, tuple(tensor.shape)


class Reader:
    """Our tensors out of a foreign file, one rule at a time. The last rule is kept, for fused matrices."""

    def __init__(self, source: Source, rules: tuple[Rule, ...]):
        self._source = source
        self._rule_of = {name: row for row in rules for name in row.ours}
        self._last: tuple[Rule, dict[str, Tensor]] | None = None

    def dtype(self, name: str) -> torch.dtype:
        """What `read` will return, without reading."""
        row = self._rule_of[name]
        same = len(row.ours) == len(row.theirs)  # one by one: NX-AI's CUDA cell holds R in bf16 and b in fp32
        return self._source.entries[row.theirs[row.ours.index(name) if same else 0]].dtype

    def read(self, name: str) -> Tensor:
        """The tensor of ours by this name; it may share memory with others of its rule, so do not write to it.

        Raises:
            ValueError: the file does not hold what it should, by name.
        """
        row = self._rule_of[name]
        if self._last is None or self._last[0] is not row:
            self._last = None  # first let go of the old one
            self._last = row, read_rule(row, self._source)
        return self._last[1][name]


def read_rule(row: Rule, source: Source) -> dict[str, Tensor]:
    """Every tensor of ours that the rule makes.

    Raises:
        ValueError: what the form refuses, with the names.
    """
    tensors = tuple(source.entries[name].read() for name in row.theirs)
    try:
        made = row.form.read(tensors)
    except ValueError as error:
        raise ValueError(f"{source.path}: {' and '.join(row.theirs)} {error}") from error
    return dict(zip(row.ours, made, strict=True))
