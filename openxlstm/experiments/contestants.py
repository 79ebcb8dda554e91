"""The models that compete, by name: patterns of xLSTM blocks ("ss", "mmmsmmmm"), and others by their family.

The first contestant of a plan has the published proportions. The others get its number of parameters, embedding and
head apart, within 2 %: by the inner width of their blocks; LSTMs, whose recurrent matrices are square, by their width;
a Mamba-2, whose inner width is twice its width by definition, by the size of its state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTMConfig, xLSTMStack, xLSTMStackConfig
from openxlstm.tasks import matching
from openxlstm.tasks.baselines import lstm_blocks, lstm_layers
from openxlstm.tasks.continuous import Regressor
from openxlstm.tasks.matching import non_embedding_parameters
from openxlstm.train.recipe import architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the contestants of a plan have in common."""

    width: int
    blocks: int
    heads: int
    vocab_size: int
    features: int = 0  # numbers in an input vector; 0: inputs are ids
    text: bool = False  # the published language models; else the published synthetic tasks: R begins uniform, and
    # patterns of s alone have no convolution (P1, App. B.1.1)


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: its label, its name in recipes, a config by sizes and one number, and the values to try.

    The number is `None` for the published proportions.
    """

    label: str
    architecture: str
    config: Callable[[Sizes, int | None], Any]
    knob: Callable[[Sizes], Iterable[int]]


def _xlstm(letters: str) -> Family:
    """Blocks of these letters. The knob: the feed-forward width of s blocks; without them the width inside m blocks."""

    def config(sizes: Sizes, size: int | None) -> xLSTMConfig:
        return xLSTMConfig(
            vocab_size=sizes.vocab_size, width=sizes.width, heads=sizes.heads, pattern=letters,
            conv=4 if "m" in letters or sizes.text else 0, recurrent_init="zeros" if sizes.text else "uniform",
            ffn_width=size if "s" in letters else None, mlstm_width=None if "s" in letters else size,
        )  # fmt: skip

    def knob(sizes: Sizes) -> Iterable[int]:
        step = 1 if "s" in letters else math.lcm(sizes.heads, 4)  # 4: the block of the projections of q, k and v
        return range(step, 16 * sizes.width, step)

    m, s = letters.count("m"), letters.count("s")
    return Family(f"xLSTM[{m // math.gcd(m, s)}:{s // math.gcd(m, s)}]", "xlstm", config, knob)


def _config(name: str, fields: Callable[[Sizes, int | None], dict[str, Any]]) -> Callable[[Sizes, int | None], Any]:
    """A config of the architecture `name` with these fields beside vocabulary and blocks."""

    def build(sizes: Sizes, size: int | None) -> Any:
        return architecture(name)[0](vocab_size=sizes.vocab_size, blocks=sizes.blocks, **fields(sizes, size))

    return build


def _inner(sizes: Sizes) -> Iterable[int]:
    return range(1, 16 * sizes.width)


def _width(sizes: Sizes) -> Iterable[int]:
    return range(4, 4 * sizes.width)


FAMILIES = {
    "lstm": Family(
        "LSTM", "lstm", _config("lstm", lambda sizes, size: {"width": size or sizes.width}), _width
    ),
    "lstm-residual": Family(
        "LSTM, residual", "lstm_block",
        _config("lstm_block", lambda sizes, size: {"width": size or sizes.width, "ffn_width": 0}), _width,
    ),
    "lstm-block": Family(
        "LSTM (Block)",
        "lstm_block",
        _config("lstm_block", lambda sizes, size: {
            "width": size or sizes.width, "ffn_width": -(-13 * (size or sizes.width) // 10),
        }),
        _width,
    ),
    "llama": Family(
        "Llama", "llama",
        _config("llama", lambda sizes, size: {
            "width": sizes.width, "heads": sizes.heads, "ffn_width": size or 8 * sizes.width // 3,
        }), _inner,
    ),
    "mamba2": Family(
        "Mamba-2", "mamba2",
        _config("mamba2", lambda sizes, size: {"width": sizes.width, "heads": sizes.heads, "state": size or 128}),
        _inner,
    ),
    "rwkv4": Family(
        "RWKV-4", "rwkv4", _config("rwkv4", lambda sizes, size: {"width": sizes.width, "ffn_width": size}), _inner
    ),
}  # fmt: skip


def find(name: str) -> Family:
    """A contestant's family.

    Raises:
        ValueError: no such contestant, with the nearest name.
    """
    if name and not set(name) - set("ms"):
        return _xlstm(name)
    if name not in FAMILIES:
        known = [*FAMILIES, "ss", "sm", "mm"]
        raise ValueError(f"there is no contestant {name!r}{did_you_mean(name, known)} (any pattern of s and m is one)")
    return FAMILIES[name]


def config(name: str, sizes: Sizes, reference: str) -> Any:
    """The config of a contestant that has as many parameters as `reference` has in its published proportions.

    Raises:
        ValueError: there is none within 2 %; other sizes of the plan would have one.
    """
    family = find(name)
    if name == reference:
        return family.config(sizes, None)
    target = non_embedding_parameters(find(reference).config(sizes, None))
    try:
        return matching.match(lambda size: family.config(sizes, size), target, list(family.knob(sizes)))
    except ValueError as error:
        raise ValueError(f"{name} beside {reference}: {error}") from None


def enter(name: str, sizes: Sizes, reference: str, seed: int) -> tuple[Any, str, int]:
    """A contestant at its start: the model, its label, and its parameters without embedding and head.

    Args:
        reference: the contestant whose number of parameters is the measure.
        seed: of the weights.
    """
    family, chosen = find(name), config(name, sizes, reference)
    torch.manual_seed(seed)
    if not sizes.features:
        return architecture(family.architecture)[1](chosen), family.label, non_embedding_parameters(chosen)
    backbone = _backbone(family, chosen)
    model = Regressor(backbone, width=chosen.width, features=sizes.features, outputs=max(1, sizes.vocab_size))
    return model, family.label, sum(weight.numel() for weight in backbone.parameters())


def _backbone(family: Family, chosen: Any) -> nn.Module:
    """What stands between the two linear maps of a task without a vocabulary.

    Raises:
        ValueError: an architecture that is there for tokens only.
    """
    match family.architecture:
        case "xlstm":
            facts = chosen.to_dict()
            del facts["vocab_size"], facts["tie_embeddings"]
            return xLSTMStack(xLSTMStackConfig(**facts))
        case "lstm":
            return lstm_layers(chosen.width, chosen.blocks)
        case "lstm_block":
            return lstm_blocks(chosen.width, chosen.blocks, ffn_width=chosen.U_f)
        case "llama":
            from openxlstm.hf.continuous import LlamaStack

            return LlamaStack(chosen.width, chosen.blocks, heads=chosen.heads, ffn_width=chosen.ffn_width)
    raise ValueError(f"{family.label} is there for tokens only, and the inputs of this task are numbers")
