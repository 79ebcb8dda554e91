"""How a tensor in a foreign file becomes one of ours, and back: the few forms that all tables of rules are made of.

A rule names tensors on both sides and the form between them. Both directions of a form are exact, but for NORM: peers
that store weight - 1 round it. Forms run on meta tensors too, which is how the shapes in a foreign file are predicted.

H heads, K head width, U width of a convolution, J taps. An sLSTM's gates stand in the order i, f, z, o everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """Two functions that undo each other."""

    read: Callable[[Tensors], Tensors]  # theirs to ours
    write: Callable[[Tensors], Tensors]  # ours to theirs
    exact: bool = True  # False: reading what was written may differ by one rounding


@dataclass(frozen=True, slots=True)
class Rule:
    """Some tensors of ours are some tensors of theirs, by a form."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form

    def of_block(self, index: int) -> Rule:
        """The rule with `{i}` in its names replaced."""
        ours, theirs = (tuple(name.replace("{i}", str(index)) for name in side) for side in (self.ours, self.theirs))
        return Rule(ours, theirs, self.form)


def _read_tied(tensors: Tensors) -> Tensors:
    embedding, head = tensors
    if not torch.equal(embedding, head):
        raise ValueError("are one tensor according to the config, and differ in the file")
    return (embedding,)


def _read_vanilla(tensors: Tensors) -> Tensors:
    """R [H, 4K, K] holds [x, g, e, d]; b [4D] holds [g, x, e]; x head, g gate, d input and e output unit."""
    R, b = tensors
    H, K = R.shape[0], R.shape[2]
    return R.reshape(H, 4, K, K).permute(0, 3, 1, 2).contiguous(), b.reshape(4, H, K)


def _read_cuda(tensors: Tensors) -> Tensors:
    """R [H, K, 4K] holds [x, d, g, e]; b [4D] holds [x, g, e]."""
    R, b = tensors
    H, K = R.shape[0], R.shape[1]
    return R.reshape(H, K, 4, K), b.reshape(H, 4, K).permute(1, 0, 2).contiguous()


def fused(*rows: int) -> Form:
    """Several matrices stored as one, in this order; `rows` are their first axes."""
    return Form(lambda t: torch.split(t[0], list(rows)), lambda t: (torch.cat(t),))


SAME = Form(lambda t: t, lambda t: t)
NORM = Form(lambda t: (1 + t[0],), lambda t: (t[0] - 1,), exact=False)  # in the file's dtype, as the peer adds
CONV = Form(lambda t: (t[0].squeeze(1),), lambda t: (t[0].unsqueeze(1),))  # [U, 1, J], newest tap last
VANILLA = Form(
    _read_vanilla, lambda t: (t[0].permute(0, 2, 3, 1).reshape(t[0].shape[0], -1, t[0].shape[3]), t[1].flatten())
)
CUDA = Form(_read_cuda, lambda t: (t[0].flatten(2), t[1].permute(1, 0, 2).flatten()))
TIED = Form(_read_tied, lambda t: (t[0], t[0]))  # one tensor of ours, stored under two names
NO_BIAS = Form(lambda t: (t[0], t[0].new_zeros(t[0].shape[0])), lambda t: t[:1])  # ours has one, and it is 0
NO_HEADWISE_BIAS = Form(lambda t: (t[0], t[0].new_zeros(t[0].shape[:2].numel())), lambda t: t[:1])
NO_WEIGHT = Form(lambda t: (t[0], t[0].new_ones(t[0].shape[:2].numel())), lambda t: t[:1])  # ours has one, and it is 1


def rule(ours: str | Iterable[str], theirs: str | Iterable[str], form: Form = SAME) -> Rule:
    """A row of a table; one name needs no tuple."""
    left, right = ((side,) if isinstance(side, str) else tuple(side) for side in (ours, theirs))
    return Rule(left, right, form)


def under(prefixes: tuple[str, str], rows: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rows with a prefix before every name of ours and of theirs."""
    ours, theirs = prefixes
    return tuple(
        Rule(tuple(ours + name for name in row.ours), tuple(theirs + name for name in row.theirs), row.form)
        for row in rows
    )
