"""Packed and padded rows cut into documents, each a row of its own, and put together again.

A causal network that knows neither `reset` nor `mask` obeys both on such rows: a document sees nothing but itself,
holes are closed, and the padding stands on the right, where nothing that counts can see it. This is exact, and costs
rows as long as the longest document.

B batch, T time, N documents, L length of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """Which tokens of [B, T] each document is made of. A document without a token is none, so N may be 0."""

    shape: tuple[int, int]  # (B, T)
    place: Int[Tensor, "N L"]  # b * T + t of every token; anything where there is none
    exists: Bool[Tensor, "N L"]
    lengths: Int[Tensor, "N"]
    row: Int[Tensor, "N"]  # the b of every document
    goes_on: Bool[Tensor, "N"]  # no reset stands before it: it continues what the row's state remembers
    last: Int[Tensor, "B"]  # the document that a row ends in
    ending: Int[Tensor, "B"]  # how to read `last`: ENDS_IN, or the row has UNCHANGED, or is EMPTY behind a last reset

    @staticmethod
    def of(
        reset: Bool[Tensor, "B T"] | None, mask: Bool[Tensor, "B T"] | None, like: Shaped[Tensor, "B T"]
    ) -> Documents:
        """Cut where `reset` says, and drop what `mask` says does not exist; a masked reset cuts all the same."""
        B, T = like.shape
        nothing = torch.zeros(B, T, dtype=torch.bool, device=like.device)
        number_BT = (nothing if reset is None else reset).cumsum(1)
        place_n = (~nothing if mask is None else mask).flatten().nonzero()[:, 0]
        row_n = place_n // max(T, 1)
        owner_n = row_n * (T + 1) + number_BT.flatten()[place_n]
        owner_N, document_n, lengths_N = torch.unique_consecutive(owner_n, return_inverse=True, return_counts=True)
        start_N = lengths_N.cumsum(0) - lengths_N
        N, L = len(owner_N), int(lengths_N.max()) if len(owner_N) else 0
        place_NL = torch.zeros(N, L, dtype=torch.long, device=like.device)
        place_NL[document_n, torch.arange(len(place_n), device=like.device) - start_N[document_n]] = place_n
        exists_NL = torch.arange(L, device=like.device) < lengths_N[:, None]
        row_N, number_N = owner_N // (T + 1), owner_N % (T + 1)
        final_B = number_BT[:, -1] if T else number_BT.sum(1)
        last_B = torch.zeros(B, dtype=torch.long, device=like.device)
        ending_B = torch.where(final_B == 0, UNCHANGED, EMPTY)
        at_end_N = number_N == final_B[row_N]
        last_B[row_N[at_end_N]] = at_end_N.nonzero()[:, 0]
        ending_B[row_N[at_end_N]] = ENDS_IN
        return Documents((B, T), place_NL, exists_NL, lengths_N, row_N, number_N == 0, last_B, ending_B)

    def split(self, x: Shaped[Tensor, "B T *any"]) -> Shaped[Tensor, "N L *any"]:
        """The documents of x, padded on the right with zeros."""
        rows = x.flatten(0, 1)[self.place]
        return torch.where(self.exists.view(*self.exists.shape, *[1] * (x.ndim - 2)), rows, 0)

    def join(self, y: Shaped[Tensor, "N L *any"]) -> Shaped[Tensor, "B T *any"]:
        """Every token back in its place; zeros where nothing exists."""
        B, T = self.shape
        out = y.new_zeros(B * T, *y.shape[2:])
        return out.index_put((self.place[self.exists],), y[self.exists]).unflatten(0, (B, T))

    def before(self, memory: Shaped[Tensor, "B *any"]) -> Shaped[Tensor, "N *any"]:
        """What each document begins with: the row's memory, or zeros behind a reset."""
        return torch.where(_wide(self.goes_on, memory), memory[self.row], 0)

    def after(self, memory: Shaped[Tensor, "B *any"], final: Shaped[Tensor, "N *any"]) -> Shaped[Tensor, "B *any"]:
        """What each row ends with, from its memory before and from what its documents end with."""
        if not len(final):
            return torch.where(_wide(self.ending == UNCHANGED, memory), memory, 0)
        kept = torch.where(_wide(self.ending == ENDS_IN, memory), final[self.last], 0)
        return torch.where(_wide(self.ending == UNCHANGED, memory), memory, kept)


ENDS_IN, UNCHANGED, EMPTY = 0, 1, 2


def _wide(flag: Bool[Tensor, "R"], like: Tensor) -> Tensor:
    return flag.view(-1, *[1] * (like.ndim - 1))
