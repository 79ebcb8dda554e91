"""What a cell remembers: frozen, typed, fp32.

A state goes into every operation and comes out of it; nothing passed in is ever changed. The empty state is all
zeros. States keep fp32 whatever the activations are (fp64 for fp64): over 2,048 steps of an mLSTM with K = V = 32, a
state kept in bf16 is off by 5 % at forget gates around 3 and by more than its size around 6; in fp32 by 6e-7 and 1e-5.

B batch, H heads, K query/key width (sLSTM: head width), V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

StateT = TypeVar("StateT", bound="State")  # not typing.Self: the shape-checking test runner cannot resolve it


@dataclass(frozen=True, slots=True)
class State:
    """Anything that is remembered between steps: a frozen tree of tensors whose first axis is the batch.

    Fields are tensors, states, or tuples of these. Subclasses only list their fields.
    """

    def map(self: StateT, function: Callable[[Tensor], Tensor]) -> StateT:
        """A new state with `function` applied to every tensor."""
        return type(self)(*(_map(getattr(self, name), function) for name in self.__dataclass_fields__))

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Pairs of dotted path and tensor, in a fixed order: `blocks.0.cell.C`."""
        for name in self.__dataclass_fields__:  # not fields(): models walk their states at every token
            yield from _named(getattr(self, name), f"{prefix}{name}")

    def tensors(self) -> list[Tensor]:
        """Every tensor of the tree, in the order of `named_tensors`."""
        return [tensor for _, tensor in self.named_tensors()]

    def to(self: StateT, *args: Any, **kwargs: Any) -> StateT:
        """As `Tensor.to`, for every tensor. A state below fp32 is refused by the operations, not cast."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self: StateT) -> StateT:
        """The same memory without its history: where truncated back-propagation through time cuts."""
        return self.map(torch.Tensor.detach)

    def clone(self: StateT) -> StateT:
        """A copy that shares no memory with this state."""
        return self.map(torch.clone)

    def select(self: StateT, rows: Tensor) -> StateT:
        """Rows of the batch by integer index or boolean mask: fork, reorder and drop sequences."""
        return self.map(lambda tensor: tensor[rows])

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass(frozen=True, slots=True)
class mLSTMState(State):
    """All that the mLSTM remembers. `m` is a log-scale: the true memory is exp(m) * C and exp(m) * n.

    Keys are stored unscaled; the query carries 1/sqrt(K) when it reads. With a sigmoid input gate nothing is
    stabilised and m stays 0; without a normaliser n stays 0 as well.
    """

    C: Float[Tensor, "B H K V"]
    n: Float[Tensor, "B H K"]
    m: Float[Tensor, "B H"]

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        K: int,
        V: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> mLSTMState:
        """Nothing seen yet: C, n and m are zero."""
        C = torch.zeros(batch, heads, K, V, device=device, dtype=dtype)
        return cls(C, C.new_zeros(batch, heads, K), C.new_zeros(batch, heads))


@dataclass(frozen=True, slots=True)
class sLSTMState(State):
    """All that the sLSTM remembers. h is the output that the next step mixes in; the true cell is exp(m) * c.

    c and n are divided by exp(m). n = 0 marks an empty element, where the stored m is ignored.
    """

    h: Float[Tensor, "B H K"]
    c: Float[Tensor, "B H K"]
    n: Float[Tensor, "B H K"]
    m: Float[Tensor, "B H K"]

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        K: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> sLSTMState:
        """Nothing seen yet: h, c, n and m are zero."""
        zeros = torch.zeros(4, batch, heads, K, device=device, dtype=dtype)
        return cls(*(part.clone() for part in zeros))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    assert is_dataclass(value), f"a state holds tensors, states and tuples of these, not {type(value).__name__}"
    return value.map(function)  # type: ignore[union-attr]


def _named(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _named(item, f"{path}.{index}")
    else:
        yield from value.named_tensors(f"{path}.")
