"""Nearest-neighbour search: the value of that vector, of those seen so far, which is nearest to the first.

Beck et al. 2024, arXiv:2405.04517, App. B and Fig. 2. An input is a unit vector of the plane and a number from [0, 1].
The first vector is the query, and its number means nothing; after each later one the target is the number that came
with the nearest. It tests whether a memory can be revised: what was stored has to go when something nearer comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from openxlstm.tasks.base import Sample, generator


@dataclass(frozen=True, slots=True)
class NearestNeighbour:
    """Samples of `lengths` inputs, the query included, uniform and inclusive.

    Raises:
        ValueError: lengths that leave no vector behind the query, or are not in order.
    """

    lengths: tuple[int, int] = (2, 64)

    def __post_init__(self) -> None:
        low, high = self.lengths
        if not 2 <= low <= high:
            raise ValueError(
                f"lengths=({low}, {high}) must be in order and at least 2, the query and a vector; "
                f"nearest is ({max(low, 2)}, {max(low, high, 2)})"
            )

    @property
    def name(self) -> str:
        """nns."""
        return "nns"

    @property
    def vocab_size(self) -> int:
        """None: targets are numbers."""
        return 0

    @property
    def features(self) -> int:
        """Two of the vector, and its number."""
        return 3

    @property
    def chance(self) -> float:
        """The mean squared error of always saying 0.5: the variance of a uniform number."""
        return 1 / 12

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split."""
        random = generator("nns", split, seed, index)
        length = int(random.integers(self.lengths[0], self.lengths[1] + 1))
        angle, number = random.random((2, length))
        angle *= 2 * math.pi
        inputs = np.stack([np.cos(angle), np.sin(angle), number], axis=1).astype(np.float32)

        vectors = inputs[:, :2].astype(np.float64)  # as they are read; the nearest has the largest inner product
        near = vectors[1:] @ vectors[0]
        record = np.maximum.accumulate(near)
        broken = np.concatenate([[True], record[1:] > record[:-1]])  # of equals, the earlier
        holder = np.maximum.accumulate(np.where(broken, np.arange(1, length), 0))
        targets = np.empty(length, dtype=np.float32)
        targets[0], targets[1:] = np.nan, inputs[holder, 2]
        return Sample(inputs, targets)
