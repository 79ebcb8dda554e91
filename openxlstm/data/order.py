"""Which window is sample g: computed from g alone, in constant time, with nothing to store and nothing to replay.

Epoch e visits every window once, in the order of a permutation keyed by (seed, e). Resuming, changing the number of
ranks or the batch size cannot repeat or lose a window, because there is no iterator whose place could be forgotten.

All arithmetic is on uint64, modulo 2^64, and pinned by vectors in the tests: an order never changes between versions.
"""

from __future__ import annotations

from typing import final

import numpy as np
from jaxtyping import Int64, UInt64

SMALL = 4096  # up to here, sort random keys: a Feistel network over very few bits is measurably uneven
ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64


@final
class Order:
    """The order of `windows` windows under a seed, epoch after epoch without end."""

    def __init__(self, seed: int, windows: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in 0..2^64-1")
        if windows < 1:
            raise ValueError(f"windows={windows} must be at least 1: there is nothing to put in order")
        self.seed = seed
        self.size = windows

    def windows(self, first_sample: int, count: int) -> Int64[np.ndarray, "count"]:
        """Window indices in 0..size-1 of the samples first_sample, first_sample + 1, ...: a pure function."""
        if first_sample < 0 or count < 0:
            raise ValueError(f"first_sample={first_sample} and count={count} must not be negative")
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        epochs, positions = samples // self.size, samples % self.size
        result = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = permutation(positions[here], self.size, self.seed, epoch)
        return result


def permutation(positions: Int64[np.ndarray, "any"], n: int, seed: int, epoch: int) -> Int64[np.ndarray, "any"]:
    """Images of `positions` under the permutation of 0..n-1 that (seed, epoch) selects."""
    key = mix64(mix64(np.array([seed], np.uint64) + _GOLDEN) + np.array([epoch], np.uint64) * _GOLDEN)
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
