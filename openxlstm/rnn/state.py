"""What a recurrent module remembers: a frozen tree that unpacks into the (h, c) of `torch.nn.LSTM`.

    output, state = rnn(x)              # the tree: state.layers[0].c, state.detach(), state.select(rows), ...
    output, (h, c) = rnn(x)             # the pair: h [S, B, width], c [S, B, memory]

h is what nn.LSTM calls h_n, the last output of every layer and direction. c is all the rest of the memory, flattened:
a matrix does not fit into nn.LSTM's [S, B, hidden_size]. So whatever a script does with the pair (detach it, pick
columns, concatenate batches, hand it to the next call) it does to the whole memory. docs/decisions/0007.

B batch, S layers times directions (layer 0 forward, layer 0 backward, layer 1 forward, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from openxlstm.cells import State, sLSTMState


@dataclass(frozen=True, slots=True)
class RNNState(State):
    """The last outputs, and one state per layer and direction, in fp32 (fp64).

    It is a `State` (detach, clone, to, select, map) and, for scripts, a pair: it iterates over h and c.
    """

    h: Float[Tensor, "B S width"]  # in the dtype of the output
    layers: tuple[State, ...]

    @property
    def batched(self) -> bool:
        """Whether h and c have an axis for the batch."""
        return True

    def __iter__(self) -> Iterator[Tensor]:
        """h [S, B, width], then c [S, B, memory]; without B if the input had none."""
        pair = self.h, torch.stack([memory(layer) for layer in self.layers], dim=1)
        yield from (part.transpose(0, 1).contiguous() if self.batched else part[0] for part in pair)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        """state[0] is h, state[1] is c."""
        return tuple(self)[index]


@dataclass(frozen=True, slots=True)
class UnbatchedRNNState(RNNState):
    """The state after an input without a batch axis: inside a batch of one, as a pair without it, as nn.LSTM has it."""

    @property
    def batched(self) -> bool:
        """False."""
        return False


def memory(layer: State) -> Float[Tensor, "B memory"]:
    """All numbers of a layer's state, side by side; an sLSTM's h is left out, since the pair's h is the same."""
    return torch.cat([tensor.flatten(1) for tensor in _kept_in_c(layer)], dim=1)


def memory_size(layer: State) -> int:
    """Numbers per sequence in `memory`."""
    return sum(tensor[0].numel() for tensor in _kept_in_c(layer))


def from_memory(
    empty: State, h: Float[Tensor, "B width"], packed: Float[Tensor, "B memory"], dtype: torch.dtype
) -> State:
    """The inverse of `memory`; `empty` is a state of that layer for one sequence, any device."""
    parts = packed.to(dtype).split([tensor[0].numel() for tensor in _kept_in_c(empty)], dim=1)
    if isinstance(empty, sLSTMState):
        parts = (h.to(dtype), *parts)
    rest = iter(parts)
    return empty.map(lambda tensor: next(rest).reshape(-1, *tensor.shape[1:]))


def from_cell(
    empty: sLSTMState, h: Float[Tensor, "B width"], cell: Float[Tensor, "B width"], dtype: torch.dtype
) -> sLSTMState:
    """An sLSTM that starts from nn.LSTM's h and c, each as wide as the layer.

    c is taken as one observation: n = 1, m = 0, so that the cell reads c / n = c. A row of zeros is the empty state,
    where n = 0; it passes no gradient to c, so start a learned c from random numbers.
    """
    h, cell = (part.to(dtype).reshape(-1, *empty.c.shape[1:]) for part in (h, cell))
    seen_B11 = (cell != 0).flatten(1).any(1)[:, None, None]
    return sLSTMState(h, cell, seen_B11.to(dtype).expand_as(cell).clone(), torch.zeros_like(cell))


def _kept_in_c(layer: State) -> Sequence[Tensor]:
    tensors = layer.tensors()
    return tensors[1:] if isinstance(layer, sLSTMState) else tensors
