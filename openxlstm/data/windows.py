"""Windows of a token folder: what a model reads, what it must predict, where documents start, what counts.

Let S be a shard. The target at position p is S[p] and its input is S[p-1]. At the first token of a document `reset`
is true and the input is the start id, which is the end id: the end of one document starts the next. So every token,
first ones included, is a target exactly once per epoch, and a document scored alone equals the same document inside
a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int64

from openxlstm.data.tokens import TokenFolder


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of B windows, T tokens each. Where `valid` is false there is only padding: no target, no input."""

    tokens: Int64[np.ndarray, "B T"]
    targets: Int64[np.ndarray, "B T"]
    reset: Bool[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]


@final
class Stream:
    """Row i of a shard of n tokens holds the targets S[i T : (i + 1) T], for i in 0..ceil(n / T) - 1.

    The last row of a shard is padded; rows never cross shards. A row that starts inside a document reads its true
    previous token, from an empty state.
    """

    def __init__(self, folder: TokenFolder, context: int) -> None:
        if context < 1:
            raise ValueError(f"context={context} must be at least 1")
        self.folder = folder
        self.context = context
        rows = [-(-len(shard.tokens) // context) for shard in folder.shards]
        self._row_ends = np.cumsum(rows, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._row_ends[-1])

    def batch(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """The windows of these indices, in this order."""
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(f"window indices {indices.min()}..{indices.max()} must lie in 0..{len(self) - 1}")
        shape = (len(indices), self.context)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        reset, valid = np.empty(shape, np.bool_), np.empty(shape, np.bool_)
        shard_of = np.searchsorted(self._row_ends, indices, side="right")
        for number in np.unique(shard_of).tolist():
            here = shard_of == number
            first_row = self._row_ends[number - 1] if number else 0
            tokens[here], targets[here], reset[here], valid[here] = self._rows(number, indices[here] - first_row)
        return Batch(tokens, targets, reset, valid)

    def in_order(self, batch: int, *, limit: int | None = None) -> Iterator[Batch]:
        """Every window once, in order, `batch` at a time (the last batch may be smaller): the windows of evaluation.

        `limit` takes that many windows, evenly spaced over the whole, so that a quick look is not a look at the
        first document.
        """
        if batch < 1 or (limit is not None and limit < 1):
            raise ValueError(f"batch={batch} and limit={limit} must be at least 1")
        count = len(self) if limit is None else min(limit, len(self))
        chosen = np.arange(count, dtype=np.int64) * len(self) // count
        for start in range(0, count, batch):
            yield self.batch(chosen[start : start + batch])

    def _rows(self, number: int, rows: Int64[np.ndarray, "B"]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens, targets, reset, valid of rows counted within one shard."""
        shard, end_id = self.folder.shards[number], self.folder.end_id
        position = rows[:, None] * self.context + np.arange(self.context)
        valid = position < len(shard.tokens)
        position = np.where(valid, position, 0)
        border = np.searchsorted(shard.ends, position)  # the first end at or after; a document starts where one ended
        reset = valid & ((position == 0) | (shard.ends[border] == position))
        targets = np.where(valid, shard.tokens[position], end_id)
        tokens = np.where(valid & ~reset, shard.tokens[position - 1], end_id)  # at 0, [-1] is read and not used
        return tokens, targets, reset, valid
