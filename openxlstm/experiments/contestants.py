"""The models that compete, by name: patterns of xLSTM blocks ("ss", "mmmsmmmm"), and others by their family.

All contestants of a plan have the same width, number of blocks and vocabulary, so the same embedding and head. What is
left is made equal by the inner width of their blocks: the first contestant has the published proportions, the others
come as near to its count as their inner width allows; 2 % is the rule, and what was reached is in the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTM, xLSTMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the contestants of a plan have in common."""

    width: int
    blocks: int
    heads: int
    vocab_size: int
    features: int = 0  # numbers in an input vector; 0: inputs are ids
    conv: int = 4  # taps of our m blocks; patterns of s alone have none in the synthetic tasks (P1, App. B.1.1)


Build = Callable[[Sizes, int], nn.Module]  # sizes and inner width


def pattern(letters: str) -> Build:
    """An xLSTM with these blocks. The inner width is that of its m blocks, or of the feed-forward of its s blocks."""

    def build(sizes: Sizes, inner: int) -> nn.Module:
        conv = sizes.conv if "m" in letters else 0
        only_s = "m" not in letters
        config = xLSTMConfig(
            vocab_size=sizes.vocab_size, width=sizes.width, heads=sizes.heads, pattern=letters, conv=conv,
            recurrent_init="uniform", ffn_width=inner if only_s and inner else None,
            mlstm_width=inner if not only_s and inner else None,
        )  # fmt: skip
        return xLSTM(config)

    return build


def _llama(sizes: Sizes, inner: int) -> nn.Module:
    from openxlstm.hf.baselines import Llama, LlamaConfig

    width = sizes.width
    return Llama(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            width=width,
            blocks=sizes.blocks,
            heads=sizes.heads,
            ffn_width=inner or 8 * width // 3,
        )
    )


FAMILIES: dict[str, Build] = {"llama": _llama}
LABELS = {"llama": "Llama"}


def find(name: str) -> Build:
    """How a contestant is built.

    Raises:
        ValueError: no such contestant, with the nearest name.
    """
    if name and not set(name) - set("ms"):
        return pattern(name)
    if name not in FAMILIES:
        known = [*FAMILIES, "ss", "sm", "mm"]
        raise ValueError(f"there is no contestant {name!r}{did_you_mean(name, known)} (any pattern of s and m is one)")
    return FAMILIES[name]


def enter(name: str, sizes: Sizes, reference: str, seed: int) -> tuple[Any, str, int]:
    """A contestant at its start: the model, its label, and its parameters without embedding and head.

    Args:
        reference: the contestant whose number of parameters is the measure.
        seed: of the weights.
    """
    with torch.device("meta"):
        target = parameters(find(reference)(sizes, 0))
    inner = 0 if name == reference else inner_width(name, sizes, target)
    torch.manual_seed(seed)
    model = find(name)(sizes, inner)
    return model, label(name), parameters(model)


def label(name: str) -> str:
    """What a contestant is called in a table: "xLSTM[0:1]", "Llama"."""
    if name in LABELS:
        return LABELS[name]
    m, s = name.count("m"), name.count("s")
    return f"xLSTM[{m // math.gcd(m, s)}:{s // math.gcd(m, s)}]"


def inner_width(name: str, sizes: Sizes, target: int) -> int:
    """The inner width with which a contestant's blocks come nearest to `target` parameters: a search on bare shapes.

    Counts grow with the inner width, so it is found by bisection among those that the architecture allows.
    """
    build = find(name)
    step = sizes.heads * 4 if name != "llama" else 1
    counts: dict[int, int] = {}

    def count(times: int) -> int:
        if times not in counts:
            with torch.device("meta"):
                counts[times] = parameters(build(sizes, times * step))
        return counts[times]

    low, high = 1, 2
    while count(high) < target and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return step * min((low, high), key=lambda times: abs(count(times) - target))


def parameters(model: Any) -> int:
    """What training can change, without embedding and head."""
    ends = {id(weight) for weight in _ends(model)}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in ends)


def _ends(model: Any) -> Iterable[torch.Tensor]:
    yield from (part.weight for part in model.modules() if isinstance(part, nn.Embedding))
    yield model.readout()[0]
