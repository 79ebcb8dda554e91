"""Plans: which pieces of documents share a row. Nothing is cropped and nothing is dropped.

A document of n tokens is cut into ceil(n / T) pieces: of T tokens each, the last of what is left. A plan puts every
piece into exactly one row:

    one_per_row   a row is a piece
    best_fit      the longest piece first, each into the fullest row it fits into, or else into a new row (best-fit
                  decreasing; Ding et al. 2024, arXiv:2404.10830, pack training data by it)

Lengths are small integers, so rows with equally much room are alike and whole groups of them are filled at once: work
grows with the number of different lengths, memory with 32 bytes a piece, and a plan is stored at 8 bytes a piece.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from jaxtyping import Int64

from openxlstm.data.tokens import TokenFolder

Method = Literal["best_fit", "one_per_row"]
_VERSION = 1  # of the file and of both methods: a plan decides which tokens a sample holds, so it never changes


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Row r holds the pieces that begin at the tokens starts[rows[r]:rows[r + 1]], counted over all shards."""

    rows: Int64[np.ndarray, "R1"]
    starts: Int64[np.ndarray, "P"]


def plan(folder: TokenFolder, context: int, method: Method, cache: Path | None = None) -> Plan:
    """The plan of a folder for rows of `context` tokens: from `cache` if it is there, else made and left there.

    The file is plan-HASH.npy, with a hash of the folder's fingerprint, the context and the method: other data is
    another file. Without a cache it is made anew.

    Raises:
        ValueError: the stored plan is damaged.
    """
    if context < 1:
        raise ValueError(f"context={context} must be at least 1")
    if cache is None:
        return _make(folder, context, method)
    name = hashlib.sha256(f"{_VERSION},{folder.fingerprint},{context},{method}".encode()).hexdigest()
    file = cache / f"plan-{name[:32]}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _write(file, _make(folder, context, method))
    return _read(file)


def pieces(folder: TokenFolder, context: int) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
    """(start, length) of every piece, in the order of the shards; starts count over all shards."""
    starts, lengths, offset = [], [], 0
    for shard in folder.shards:
        ends = np.asarray(shard.ends)
        begins = np.concatenate(([0], ends[:-1]))
        count = -(-(ends - begins) // context)
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        start = np.repeat(begins, count) + number * context
        lengths.append(np.minimum(np.repeat(ends, count) - start, context))
        starts.append(start + offset)
        offset += len(shard.tokens)
    return np.concatenate(starts), np.concatenate(lengths)


def best_fit(lengths: Int64[np.ndarray, "P"], context: int) -> Int64[np.ndarray, "P"]:
    """The row of each piece, by best-fit decreasing. Equal lengths go in the order in which they come.

    Rows with the same room r are one group. For the pieces of length l the group of least room r >= l is next: each
    of its rows takes r div l of them one after the other, because a row that has just taken one is the fullest that
    still fits. Where there is no such group, new rows come, of room T.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    number = np.bincount(lengths, minlength=context + 1)
    room: list[list[Int64[np.ndarray, "any"]]] = [[] for _ in range(context + 1)]  # rows with room r, in portions
    has_room = np.zeros(context + 1, np.bool_)
    rows = done = 0
    for length in np.flatnonzero(number)[::-1].tolist():
        left = int(number[length])
        while left:
            r = length + int(has_room[length:].argmax())
            if has_room[r]:
                group = room[r].pop()
                has_room[r] = bool(room[r])
            else:
                r, group = context, np.arange(rows, rows - (-left // (context // length)))
                rows += len(group)
            fit = r // length
            take, rest = divmod(left, fit)
            full, partial, unused = np.split(group, (min(take, len(group)), min(take, len(group)) + (rest > 0)))
            into = np.concatenate((np.repeat(full, fit), np.repeat(partial, rest)))
            row_of[by_length[done : done + len(into)]] = into
            done, left = done + len(into), left - len(into)
            for portion, more in ((unused, r), (full, r - fit * length), (partial, r - rest * length)):
                if len(portion) and more:
                    room[more].append(portion)
                    has_room[more] = True
    assert done == len(lengths), "every piece has a row"
    return row_of


def _make(folder: TokenFolder, context: int, method: Method) -> Plan:
    starts, lengths = pieces(folder, context)
    if method == "one_per_row":
        return Plan(np.arange(len(starts) + 1), starts)
    row_of = best_fit(lengths, context)
    by_row = np.argsort(row_of, kind="stable")
    count = np.bincount(row_of)
    return Plan(np.concatenate(([0], np.cumsum(count))), starts[by_row])


def _write(file: Path, made: Plan) -> None:
    """One array: the number of rows, `rows`, `starts`. Through a temporary file of this process, and rename."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.save(stream, np.concatenate(([len(made.rows) - 1], made.rows, made.starts)).astype("<i8"))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _read(file: Path) -> Plan:
    try:
        stored = np.asarray(np.load(file, mmap_mode="r"))
        count = int(stored[0])
        rows, starts = stored[1 : count + 2], stored[count + 2 :]
        sound = stored.dtype == np.int64 and count >= 1 and rows[0] == 0 and rows[-1] == len(starts)
    except (ValueError, IndexError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and it is made anew") from None
    if not sound:
        raise ValueError(f"{file} is damaged: its rows do not end with its pieces; delete it, and it is made anew")
    return Plan(rows, starts)
