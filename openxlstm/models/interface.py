"""What every language model of this library can do, and the plumbing that both architectures share.

B batch, T time, D model width, W vocabulary.

The contract:
  forward(tokens, state, reset=, mask=) -> (logits, state), for any T, 1 and 0 included;
  state None means nothing seen yet; a state that goes in is never changed, the one that comes out is new;
  reset[b, t]: a new document starts at this token, as if it stood alone;
  mask[b, t] False: this token does not exist. Its id may be anything, its logits are finite and mean nothing,
  and it influences nothing. Reset acts first, so a masked reset still empties the state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openxlstm.cells import State


@dataclass(frozen=True, slots=True)
class ModelState(State):
    """What a model remembers: one state per block, first to last."""

    blocks: tuple[State, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A block as those who shard, compile or recompute it see it."""

    block: nn.Module
    rounded: list[nn.Module]  # those of its parts whose weights autocast rounds anyway; the others stay fp32: islands


@runtime_checkable
class ModelConfig(Protocol):
    """Facts about a model, none about the machine."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def label(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class LanguageModel(Protocol):
    """xLSTM and xLSTMLarge."""

    checkpoint_every: int

    @property
    def config(self) -> Any: ...

    def __call__(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T W"], ModelState]: ...

    def features(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState]: ...

    def readout(self) -> tuple[Float[Tensor, "W D"], float | None]: ...

    def logits(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any W"]: ...

    def empty_state(self, batch: int) -> ModelState: ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]: ...

    def units(self) -> list[Unit]: ...


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "B T D"],
    state: ModelState | None,
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
    checkpoint_every: int,
) -> tuple[Float[Tensor, "B T D"], ModelState]:
    """Every block in turn, each with its own part of the state.

    With `checkpoint_every` = n > 0, the activations of every n-th block are recomputed in the backward pass
    (n = 1: of all blocks).
    """
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)  # 0 * NaN is NaN, so nothing may stand where nothing exists
    after = []
    for index, block in enumerate(blocks):
        before = None if state is None else state.blocks[index]
        if checkpoint_every and index % checkpoint_every == 0 and torch.is_grad_enabled():
            x, block_state = checkpoint(block, x, before, reset, mask, use_reentrant=False)
        else:
            x, block_state = block(x, before, reset, mask)
        after.append(block_state)
    return x, ModelState(tuple(after))


def state_shapes(empty: State) -> dict[str, tuple[int, ...]]:
    """Dotted path to shape without the batch axis: what `check_state` compares with."""
    return {name: tuple(tensor.shape[1:]) for name, tensor in empty.named_tensors()}


def decay_groups(decayed: Iterable[Tensor], kept: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: parameters that weight decay pulls to zero, and parameters that it leaves alone."""
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(kept), "weight_decay": 0.0},
    ]


def decay_matrices(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """The groups of a network without vocabulary: weight decay on every matrix, and on no vector."""
    every = list(parameters)
    return decay_groups([p for p in every if p.ndim > 1], [p for p in every if p.ndim == 1], weight_decay)
