"""How sure a mean over seeds is (Student's interval). Within a run, and over documents: `tasks.intervals`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z = 1.959964  # of the normal distribution, two-sided 95 %
T = (  # of Student's distribution, two-sided 95 %, with 1 to 10 degrees of freedom; beyond them Z * (1 + 2.4 / df)
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
)  # fmt: skip


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of runs that differ in their seed; None of a single run."""
    if len(values) < 2:
        return None
    df = len(values) - 1
    factor = T[df - 1] if df <= len(T) else Z * (1 + 2.4 / df)
    mean, half = statistics.fmean(values), factor * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
