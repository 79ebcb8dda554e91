"""Which source sample g is read from: exact shares in every 1,000 samples, and still a pure function of g.

Samples are dealt in blocks of M = 1,000. A block gives source j exactly c_j of them (largest remainder of its weight),
in an order keyed by (seed, phase, block). Sample g is draw number k of its source, where k counts the source's earlier
samples; so a source gives its windows one after the other, none twice and none left out, also where a phase with
other weights begins in the middle of a block. Such a phase starts a new block, and every source goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from typing import final

import numpy as np
from jaxtyping import Int64

from openxlstm.data.order import permutation

BLOCK = 1000  # M
_STREAM = 1 << 32  # keys of blocks lie apart from those of sources, which count from 0


def counts(weights: Sequence[float | int], block: int = BLOCK) -> Int64[np.ndarray, "J"]:
    """Samples of each source in a block: the largest-remainder rounding of its share, in exact arithmetic.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or one above 0 is too small for a single sample.
    """
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"weights {list(weights)} must be finite, not negative, and not all 0")
    total = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * block / total for weight in weights]
    result = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda j: (result[j] - quotas[j], j))
    for j in by_remainder[: block - sum(result)]:
        result[j] += 1
    for weight, count in zip(weights, result, strict=True):
        if weight and not count:
            raise ValueError(
                f"weight {weight:g} of {list(weights)} is less than one sample in {block}: it would never be read;"
                f" the least that is read is {float(total / block):g}, and 0 leaves a source out"
            )
    return np.array(result, np.int64)


@final
class Mixture:
    """The sources of samples: `weights` at first, then those of each phase, which begins at a sample id.

    Weights are one per source and need not sum to 1; a source of weight 0 waits for a phase that wants it.
    """

    def __init__(
        self, weights: Sequence[float | int], phases: Sequence[tuple[int, Sequence[float | int]]], seed: int
    ) -> None:
        self.starts = [0, *(first for first, _ in phases)]
        if any(one >= two for one, two in pairwise(self.starts)):
            raise ValueError(f"phases begin at the samples {self.starts[1:]}, which must rise, from above 0")
        self.counts = [counts(weights)]
        for _, changed in phases:
            if len(changed) != len(weights):
                raise ValueError(f"a phase has the weights {list(changed)}, but there are {len(weights)} sources")
            self.counts.append(counts(changed))
        if unread := np.flatnonzero(~np.any(self.counts, axis=0)).tolist():
            raise ValueError(f"sources {unread}, counted from 0, have weight 0 in every phase: leave them out")
        self.seed = seed
        self._before = [np.zeros(len(weights), np.int64)]  # draws of each source before each phase
        for phase, (start, end) in enumerate(pairwise(self.starts)):
            block, rest = divmod(end - start, BLOCK)
            source, _ = self._deal(phase, block)
            given = block * self.counts[phase] + np.bincount(source[:rest], minlength=len(weights))
            self._before.append(self._before[phase] + given)

    def draws(self, samples: Int64[np.ndarray, "N"]) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """(source, draw) of each sample id."""
        source, draw = np.zeros_like(samples), samples.copy()
        if len(self._before[0]) == 1:
            return source, draw  # every sample is the next one of the only source
        phases = np.searchsorted(self.starts, samples, side="right") - 1
        blocks, place = np.divmod(samples - np.array(self.starts, np.int64)[phases], BLOCK)
        for phase, block in np.unique(np.stack((phases, blocks)), axis=1).T.tolist():
            here = (phases == phase) & (blocks == block)
            sources, ranks = self._deal(phase, block)
            source[here] = sources[place[here]]
            first = self._before[phase] + block * self.counts[phase]
            draw[here] = first[source[here]] + ranks[place[here]]
        return source, draw

    def _deal(self, phase: int, block: int) -> tuple[Int64[np.ndarray, "M"], Int64[np.ndarray, "M"]]:
        """The source of each sample of a block, and how many earlier ones of the block are of the same source."""
        slots = permutation(np.arange(BLOCK, dtype=np.int64), BLOCK, self.seed, block, _STREAM + phase)
        sources = np.repeat(np.arange(len(self.counts[phase])), self.counts[phase])[slots]
        seen = np.cumsum(sources[:, None] == np.arange(len(self.counts[phase])), axis=0)
        return sources, seen[np.arange(BLOCK), sources] - 1
