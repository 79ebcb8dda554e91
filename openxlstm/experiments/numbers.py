"""How sure a number is: 95 % intervals of a share, of a mean over seeds, of a paired difference over documents.

What may be said of two models follows from them alone: "better" needs an interval of the paired difference that leaves
zero out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of the normal distribution, two-sided 95 %
T = (  # of Student's distribution, two-sided 95 %, with 1 to 10 degrees of freedom; beyond them Z * (1 + 2.4 / df)
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
)  # fmt: skip
DRAWS = 1000


def wilson(right: int, n: int) -> tuple[float, float]:
    """The interval of a share of `right` among `n` independent trials (Wilson 1927); it does not leave [0, 1].

    Raises:
        ValueError: no trial, or more right ones than there are.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"right={right} must be between 0 and n={n}, and n at least 1")
    share = right / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of runs that differ in their seed; None of a single run."""
    if len(values) < 2:
        return None
    df = len(values) - 1
    factor = T[df - 1] if df <= len(T) else Z * (1 + 2.4 / df)
    mean, half = statistics.fmean(values), factor * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def paired_over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and interval of ours minus theirs, seed by seed."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(differences), over_seeds(differences)


def paired_rates(
    ours: Sequence[float], theirs: Sequence[float], weights: Sequence[float], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Ours minus theirs per unit of weight, and its bootstrap interval over documents: 1,000 draws of all documents.

    Args:
        ours, theirs: totals per document, such as bits.
        weights: what they are divided by, such as bytes.
    """
    difference, weight = np.asarray(ours, float) - np.asarray(theirs, float), np.asarray(weights, float)
    if not len(difference) or weight.sum() <= 0:
        raise ValueError("a comparison needs at least one document of at least one byte")
    chosen = np.random.default_rng(seed).integers(len(weight), size=(DRAWS, len(weight)))
    drawn = difference[chosen].sum(1) / weight[chosen].sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(difference.sum() / weight.sum()), (float(low), float(high))
