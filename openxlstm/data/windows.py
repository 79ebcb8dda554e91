"""Windows of a token folder: what a model reads, what it must predict, where documents start, what counts.

    Stream   the tokens of a shard in rows of T, one after the other; rows never cross shards
    Pieces   whole documents, longer ones in pieces of T; one per row (`docs`), or as many as fit (`packed`)
    Lanes    a stream that every row of a batch reads on from its own place, so that the state can be carried

Each is indexed by the number of a row, and in each every token of the folder, first ones included, is a target exactly
once per epoch. gather.py says what inputs, targets and resets are; so a document scored alone equals the same document
inside a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import numpy as np
from jaxtyping import Bool, Int64

from openxlstm.data.gather import Batch as Batch
from openxlstm.data.gather import Reader, Spans
from openxlstm.data.packing import Plan
from openxlstm.data.tokens import TokenFolder


@final
class Stream:
    """Row i of a shard of n tokens holds the targets S[i T : (i + 1) T], for i in 0..ceil(n / T) - 1.

    The last row of a shard is padded; rows never cross shards. A row that starts inside a document reads its true
    previous token, from an empty state.
    """

    def __init__(self, folder: TokenFolder, context: int) -> None:
        _check_context(context)
        self.folder = folder
        self.context = context
        self._reader = Reader(folder)
        self._tokens = np.array([len(shard.tokens) for shard in folder.shards], np.int64)
        self._row_ends = np.cumsum(-(-self._tokens // context))

    def __len__(self) -> int:
        return int(self._row_ends[-1])

    def batch(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """The windows of these indices, in this order."""
        _check_indices(indices, len(self))
        return self._read(indices, np.zeros(len(indices), np.bool_))

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

    def _read(self, indices: Int64[np.ndarray, "B"], fresh: Bool[np.ndarray, "B"]) -> Batch:
        """The windows; a negative index is a row of padding."""
        shard = np.searchsorted(self._row_ends, indices, side="right")
        first_row = np.concatenate(([0], self._row_ends))[shard]
        start = np.maximum(indices - first_row, 0) * self.context
        length = np.where(indices < 0, 0, np.minimum(self.context, self._tokens[shard] - start))
        row = np.arange(len(indices))
        return self._reader.batch(Spans(shard, start, length, row, np.zeros_like(row), fresh), len(row), self.context)


@final
class Pieces:
    """Rows of whole documents, or of pieces of those longer than T; a plan says which (packing.py).

    Every piece begins with a reset. A later piece of a document reads its true previous token.
    """

    def __init__(self, folder: TokenFolder, context: int, plan: Plan) -> None:
        _check_context(context)
        self.folder = folder
        self.context = context
        self.plan = plan
        self._reader = Reader(folder)
        self._shard_ends = np.cumsum([len(shard.tokens) for shard in folder.shards])

    def __len__(self) -> int:
        return len(self.plan.rows) - 1

    def batch(self, indices: Int64[np.ndarray, "B"]) -> Batch:
        """The rows of these numbers, in this order."""
        _check_indices(indices, len(self))
        first = self.plan.rows[indices]
        count = self.plan.rows[indices + 1] - first
        row = np.repeat(np.arange(len(indices)), count)
        begin = np.cumsum(count) - count  # where the pieces of each row begin below
        piece = np.arange(len(row)) + np.repeat(first - begin, count)
        start = self.plan.starts[piece]
        shard = np.searchsorted(self._shard_ends, start, side="right")
        start = start - np.concatenate(([0], self._shard_ends))[shard]
        length = np.empty_like(start)
        for number in np.unique(shard).tolist():
            here, ends = shard == number, np.asarray(self.folder.shards[number].ends)
            length[here] = ends[np.searchsorted(ends, start[here], side="right")] - start[here]
        length = np.minimum(length, self.context)
        before = np.cumsum(length) - length
        column = before - np.repeat(before[begin], count)
        spans = Spans(shard, start, length, row, column, np.ones(len(row), np.bool_))
        return self._reader.batch(spans, len(indices), self.context)


@final
class Lanes:
    """Row b of every batch reads on where row b of the batch before it stopped: truncated back-propagation in time.

    The W windows of a stream are shared out among B lanes: lane b owns windows b W div B to (b + 1) W div B - 1 and
    reads them in order, one per step; an epoch is ceil(W / B) steps. A lane with one window less than others ends
    with a row of padding. Epochs are alike: documents come in the order in which they lie in the folder.

    The trainer hands the state of row b, detached, to row b of the next step. It never has to clear one: where a lane
    begins anew its row begins with a reset, and so does every document.
    """

    def __init__(self, stream: Stream, lanes: int) -> None:
        if not 1 <= lanes <= len(stream):
            raise ValueError(
                f"batch={lanes} lanes cannot share {len(stream)} windows of {stream.context} tokens;"
                f" choose 1..{len(stream)}, or a smaller context"
            )
        self.stream = stream
        self.lanes = lanes
        self.steps = -(-len(stream) // lanes)  # of an epoch

    def __len__(self) -> int:
        return self.steps * self.lanes

    def visits(self, samples: Int64[np.ndarray, "N"]) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """(epoch, window) of sample ids, which are step * lanes + lane; window -1 is a row of padding."""
        step, lane = np.divmod(samples, self.lanes)
        epoch, step = np.divmod(step, self.steps)
        window = lane * len(self.stream) // self.lanes + step
        return epoch, np.where(window < (lane + 1) * len(self.stream) // self.lanes, window, -1)

    def begins(self, samples: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Whether the lane of a sample begins anew there."""
        return samples // self.lanes % self.steps == 0

    def batch(self, windows: Int64[np.ndarray, "B"], fresh: Bool[np.ndarray, "B"]) -> Batch:
        """These windows (-1: padding), with a reset at the first target of the `fresh` ones."""
        return self.stream._read(windows, fresh)


def _check_context(context: int) -> None:
    if context < 1:
        raise ValueError(f"context={context} must be at least 1")


def _check_indices(indices: Int64[np.ndarray, "B"], size: int) -> None:
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        raise ValueError(f"window indices {indices.min()}..{indices.max()} must lie in 0..{size - 1}")
