"""Which window is sample g: computed from g alone, in constant time, with nothing to store and nothing to replay.

Epoch e visits every window once, in the order of a permutation keyed by (seed, source, e). Resuming, changing the
number of ranks or the batch size cannot repeat or lose a window, because there is no iterator whose place could be
forgotten. The way from a step of the optimiser to windows:

    step s            Ramp.consumed(s)    how many samples the steps before s have taken
    its n-th sample   Skipped.samples     sample ids, with the ranges that are not to be trained on left out
    sample g          mixture.Mixture     (source, draw k): the k-th sample that this source gives
    draw k            Order.windows       epoch and window of the source
    row r of a step   rows_of_rank        which process reads it, in which portion

All arithmetic is on uint64, modulo 2^64, and pinned by vectors in the tests: an order never changes between versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
from jaxtyping import Bool, Int64, UInt64

SMALL = 4096  # up to here, sort random keys: a Feistel network over very few bits is measurably uneven
ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64


@final
class Order:
    """The order of `windows` windows under a seed, epoch after epoch without end.

    `stream` separates the orders of one seed: sources that have equally many windows are not visited in step.
    """

    def __init__(self, seed: int, windows: int, stream: int = 0) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in 0..2^64-1")
        if windows < 1:
            raise ValueError(f"windows={windows} must be at least 1: there is nothing to put in order")
        self.seed = seed
        self.size = windows
        self.stream = stream

    def windows(self, first_sample: int, count: int) -> Int64[np.ndarray, "count"]:
        """Window indices in 0..size-1 of the samples first_sample, first_sample + 1, ...: a pure function."""
        if first_sample < 0 or count < 0:
            raise ValueError(f"first_sample={first_sample} and count={count} must not be negative")
        return self.visits(np.arange(first_sample, first_sample + count, dtype=np.int64))[1]

    def visits(self, draws: Int64[np.ndarray, "N"]) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """(epoch, window) of each draw; draws need not be neighbours."""
        epochs, positions = draws // self.size, draws % self.size
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permutation(positions[here], self.size, self.seed, epoch, self.stream)
        return epochs, windows


@final
@dataclass(frozen=True, slots=True)
class Ramp:
    """Rows per step as a staircase: `sizes[i]` from step `starts[i]` on; `before[i]` samples were taken until there."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    before: tuple[int, ...]

    @classmethod
    def of(cls, batch: int | Sequence[Sequence[int]]) -> Ramp:
        """From a batch size, or from [[from_step, batch], ...] beginning with step 0."""
        stairs = [(0, batch)] if isinstance(batch, int) else [(int(step), int(size)) for step, size in batch]
        if not stairs or stairs[0][0] != 0 or any(one[0] >= two[0] for one, two in pairwise(stairs)):
            raise ValueError(f"batch={batch} must begin with step 0 and go on in rising steps, as [[0, 8], [1000, 16]]")
        if min(size for _, size in stairs) < 1:
            raise ValueError(f"batch={batch} has a step of less than one row; the least is 1")
        before = [0]
        for (start, size), (end, _) in pairwise(stairs):
            before.append(before[-1] + (end - start) * size)
        return cls(tuple(start for start, _ in stairs), tuple(size for _, size in stairs), tuple(before))

    def size(self, step: int) -> int:
        """Rows of this step."""
        return self.sizes[self._stair(step)]

    def consumed(self, step: int) -> int:
        """Rows of all steps before this one: piecewise linear, strictly rising."""
        stair = self._stair(step)
        return self.before[stair] + (step - self.starts[stair]) * self.sizes[stair]

    def _stair(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        return bisect_right(self.starts, step) - 1


@final
@dataclass(frozen=True, slots=True)
class Skipped:
    """Sample ids that are not to be trained on: ranges [a, b), sorted, apart from each other.

    A sample id keeps its meaning when a range is added: what was to be read after the gap is read earlier instead.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Sequence[int]]) -> Skipped:
        """From ranges in any order, which may overlap."""
        merged: list[tuple[int, int]] = []
        for a, b in sorted((int(a), int(b)) for a, b in ranges):
            if not 0 <= a < b:
                raise ValueError(f"skipped range [{a}, {b}) must begin at 0 or later and end after it begins")
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else:
                merged.append((a, b))
        return cls(tuple(merged))

    def samples(self, first: int, count: int) -> Int64[np.ndarray, "count"]:
        """Ids of the first-th, (first + 1)-th, ... sample that is not skipped."""
        if first < 0 or count < 0:
            raise ValueError(f"first={first} and count={count} must not be negative")
        number = np.arange(first, first + count, dtype=np.int64)
        if not self.ranges:
            return number
        starts, ends = np.array(self.ranges, np.int64).T
        lost = np.concatenate(([0], np.cumsum(ends - starts)))  # ids lost before each range, and after the last
        return number + lost[np.searchsorted(starts - lost[:-1], number, side="right")]

    def holds(self, samples: Int64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Which of these ids are skipped."""
        starts, ends = np.array(self.ranges, np.int64).reshape(-1, 2).T
        return np.searchsorted(starts, samples, side="right") > np.searchsorted(ends, samples, side="right")


def rows_of_rank(batch: int, micro_batch: int, rank: int, ranks: int) -> Int64[np.ndarray, "portions micro_batch"]:
    """The rows of a batch that a process reads: portion m of its own holds the rows (m ranks + rank) b + 0..b-1.

    So the rows of all processes together are the batch, whatever the split.
    """
    if micro_batch < 1 or not 0 <= rank < ranks:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1, and rank={rank} in 0..{ranks - 1}")
    at_once = micro_batch * ranks
    if batch < 1 or batch % at_once:
        near = sorted({max(1, batch // at_once) * at_once, (batch // at_once + 1) * at_once})
        raise ValueError(
            f"batch={batch} must be a multiple of micro_batch={micro_batch} times {ranks} processes;"
            f" nearest {'is' if len(near) == 1 else 'are'} {' and '.join(map(str, near))}"
        )
    first = (np.arange(batch // at_once, dtype=np.int64) * ranks + rank) * micro_batch
    return first[:, None] + np.arange(micro_batch)


def permutation(
    positions: Int64[np.ndarray, "any"], n: int, seed: int, epoch: int, stream: int = 0
) -> Int64[np.ndarray, "any"]:
    """Images of `positions` under the permutation of 0..n-1 that (seed, stream, epoch) selects."""
    root = mix64(np.array([seed], np.uint64) + _GOLDEN) + mix64(np.array([stream], np.uint64))  # mix64(0) is 0
    key = mix64(root + np.array([epoch], np.uint64) * _GOLDEN)
    if n <= SMALL:
        order = np.argsort(mix64(key + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN))  # keys are distinct
        return order[positions].astype(np.int64)
    half = np.uint64(((n - 1).bit_length() + 1) // 2)  # bits of one half; two halves reach n and at most 4 n
    keys = mix64(key + np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
    result = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(result >= n)).size:  # cycle-walking: on average 4 walks at most
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def mix64(z: UInt64[np.ndarray, "any"]) -> UInt64[np.ndarray, "any"]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection on 64 bits whose output looks random."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _feistel(
    x: UInt64[np.ndarray, "any"], half: np.uint64, keys: UInt64[np.ndarray, "rounds"]
) -> UInt64[np.ndarray, "any"]:
    """A bijection on 2 * half bits: each round swaps the halves and blurs one with the other."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (mix64(right + key) & mask)
    return (left << half) | right
