"""From stretches of token files to the arrays of a batch: one vectorised copy, in constant memory.

Let S be a shard. The target at position p is S[p] and its input is S[p-1]. At the first token of a document `reset`
is true and the input is the start id, which is the end id: the end of one document starts the next. A stretch that
begins inside a document reads its true previous token.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int64

from openxlstm.data.tokens import Shard, TokenFolder

MAPPED = 1 << 26  # bytes of a token file that stay mapped after having been read: what a process's size shows
_AROUND = 1 << 21  # the kernel maps at most so much with a page that was asked for: a large folio


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of T tokens each. `valid` says which targets count in the loss, `reset` where a memory starts empty.

    Where no stretch lies there is padding: end ids that do not count. It comes last in its row, so a model needs no
    mask: nothing that counts comes after it, except behind a reset. A target inside a document may be not `valid`
    too (NAME.ds.loss says so): then it is read, but not to be learnt.
    """

    tokens: Int64[np.ndarray, "B T"]
    targets: Int64[np.ndarray, "B T"]
    reset: Bool[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]


@final
@dataclass(frozen=True, slots=True)
class Spans:
    """Stretches of S: targets [start, start + length) of a shard, and the row and column where the first one goes.

    `fresh` ones begin with a reset, wherever they are cut from.
    """

    shard: Int64[np.ndarray, "S"]
    start: Int64[np.ndarray, "S"]
    length: Int64[np.ndarray, "S"]
    row: Int64[np.ndarray, "S"]
    column: Int64[np.ndarray, "S"]
    fresh: Bool[np.ndarray, "S"]

    def where(self, chosen: Bool[np.ndarray, "S"]) -> Spans:
        """Those that are chosen."""
        parts = (self.shard, self.start, self.length, self.row, self.column, self.fresh)
        return Spans(*(part[chosen] for part in parts))


@final
class Reader:
    """Reads stretches of one token folder. The system is told what will be read, and what need not stay mapped."""

    def __init__(self, folder: TokenFolder) -> None:
        self.folder = folder
        self._files = [_mapping(shard.tokens) for shard in folder.shards]
        self._touched = 0  # bytes that may be mapped since the last time all were given back
        for file in self._files:
            if file is not None:  # else each page brings megabytes of neighbours: 3 ms instead of 0.03 a window
                file.madvise(mmap.MADV_RANDOM)

    def batch(self, spans: Spans, rows: int, context: int) -> Batch:
        """The spans, copied to their places in `rows` rows of `context` tokens. Spans must not overlap there."""
        end_id, shape = self.folder.end_id, (rows, context)
        batch = Batch(
            np.full(shape, end_id, np.int64),
            np.full(shape, end_id, np.int64),
            np.zeros(shape, np.bool_),
            np.zeros(shape, np.bool_),
        )
        spans = spans.where(spans.length > 0)
        for number in np.unique(spans.shard).tolist():
            here = spans.where(spans.shard == number)
            self._announce(number, here)
            _copy(self.folder.shards[number], end_id, here, batch)
        self._forget(spans)
        return batch

    def _announce(self, number: int, spans: Spans) -> None:
        """Let the disk fetch all that is about to be read, together: 3 to 7 times as fast as page after page."""
        file, tokens = self._files[number], self.folder.shards[number].tokens
        if file is None:
            return
        offset = tokens.offset if isinstance(tokens, np.memmap) else 0
        header = offset % mmap.ALLOCATIONGRANULARITY  # bytes of the mapping before the first token
        first = header + spans.start * tokens.itemsize
        last = first + spans.length * tokens.itemsize
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        for begin, size in zip(page.tolist(), (last - page).tolist(), strict=True):
            file.madvise(mmap.MADV_WILLNEED, begin, size)

    def _forget(self, spans: Spans) -> None:
        """Unmap what was read, once it is much. The pages stay in the system's cache and cost nothing to map again.

        Index and plan stay mapped, as far as they have been looked up.
        """
        itemsize = self.folder.shards[0].tokens.itemsize
        self._touched += int(spans.length.sum()) * itemsize + len(spans.length) * _AROUND
        if self._touched > MAPPED:
            for file in self._files:
                if file is not None:
                    file.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The mapped file behind an array or a part of one, if there is one. Windows' takes no advice, and needs none."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def _copy(shard: Shard, end_id: int, spans: Spans, batch: Batch) -> None:
    """Copy spans of one shard into the batch. Flat arrays hold the spans one after the other, n tokens together."""
    first = np.cumsum(spans.length) - spans.length  # where each span begins in the flat arrays
    flat = np.arange(spans.length.sum())
    position = flat + np.repeat(spans.start - first, spans.length)
    tokens = np.asarray(shard.tokens)  # not np.memmap, whose slices cost more
    targets = tokens[position].astype(np.int64)
    inputs = np.empty_like(targets)
    inputs[1:] = targets[:-1]
    inputs[first] = tokens[np.maximum(spans.start - 1, 0)]

    ends = np.asarray(shard.ends)  # a document starts where another ended, and at 0
    one = np.searchsorted(ends, spans.start)
    borders = np.searchsorted(ends, spans.start + spans.length) - one
    which = _ragged(one, borders)
    starts = np.concatenate((ends[which] - np.repeat(spans.start - first, borders), first[spans.start == 0]))
    inputs[starts] = end_id
    reset = np.zeros(len(flat), np.bool_)
    reset[starts] = True
    reset[first[spans.fresh]] = True

    place = flat + np.repeat(spans.row * batch.tokens.shape[1] + spans.column - first, spans.length)
    for whole, part in ((batch.tokens, inputs), (batch.targets, targets), (batch.reset, reset)):
        whole.reshape(-1)[place] = part
    loss = getattr(shard, "loss", None)
    batch.valid.reshape(-1)[place] = True if loss is None else np.asarray(loss)[position]


def _ragged(first: Int64[np.ndarray, "N"], count: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "M"]:
    """first[0], first[0] + 1, ..., count[0] of them; then those of first[1]; and so on."""
    return np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
