"""How sure a number is: bootstrap over documents, standard errors of accuracies, and paired comparisons.

A perplexity is a ratio of sums over documents, exp(nats / tokens), and documents are what could have been others: they
are drawn again with replacement, 1,000 times (Efron 1979, the percentile interval). Two models are compared on the same
draws of the same documents, since most of the spread is that of the documents and cancels. Accuracies: the binomial
standard error, and for two models McNemar's exact test on the questions that only one of them answers rightly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

DRAWS = 1_000
LEVEL = 0.95
Numbers = Sequence[float] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and what 95 of 100 draws of the documents give; of a single document nothing, it is every draw."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """What "better" needs, of a difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def ratio(above: Numbers, below: Numbers, *, log: bool = False, draws: int = DRAWS, seed: int = 0) -> Interval:
    """sum(above) / sum(below) over documents; with `log` the exp of it: nats and tokens give a perplexity."""
    up, down = _checked(above, below)
    total_up, total_down = _sums(np.stack((up, down)), draws, seed)
    return _interval(float(up.sum() / down.sum()), _ratios(total_up, total_down), len(up), log)


def difference(
    first: tuple[Numbers, Numbers],
    second: tuple[Numbers, Numbers],
    *,
    log: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The second's ratio less the first's, (above, below) each, paired: document i of both is the same.

    Negative: the second is lower. With `log` of their exps.
    """
    (a, b), (c, d) = _checked(*first), _checked(*second)
    if len(a) != len(c):
        raise ValueError(f"{len(a)} documents against {len(c)}: a paired difference needs the same documents")
    total_a, total_b, total_c, total_d = _sums(np.stack((a, b, c, d)), draws, seed)
    one, other = _ratios(total_a, total_b), _ratios(total_c, total_d)
    value_one, value_other = float(a.sum() / b.sum()), float(c.sum() / d.sum())
    if log:
        one, other, value_one, value_other = np.exp(one), np.exp(other), math.exp(value_one), math.exp(value_other)
    return _interval(value_other - value_one, other - one, len(a), False)


def accuracy_error(correct: int, count: int) -> float:
    """Standard error of an accuracy: sqrt(p (1 - p) / n)."""
    if count < 1 or not 0 <= correct <= count:
        raise ValueError(f"{correct} of {count} is no accuracy")
    p = correct / count
    return math.sqrt(p * (1 - p) / count)


def wilson(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927): sound also near 0 and 1, and for few samples."""
    accuracy_error(correct, count)
    p, spread = correct / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class McNemar:
    """Questions that only the first, or only the second answers rightly, and how probable so uneven a split is."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test, two-sided: if both were equally good, each such question were a fair coin.

    Raises:
        ValueError: not the same number of questions.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} answers against {len(second)}: a pair needs the same questions")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def _checked(above: Numbers, below: Numbers) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    up, down = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if up.shape != down.shape or not len(up):
        raise ValueError(
            f"{len(up)} and {len(down)} numbers: every document has one of each, and there is at least one"
        )
    if not (down > 0).any() or (down < 0).any():
        raise ValueError("what is divided by must not be negative, nor zero in every document")
    return up, down


def _sums(columns: Float64[np.ndarray, "k n"], draws: int, seed: int) -> Float64[np.ndarray, "k draws"]:
    """The sum of every column over each draw of documents; the same draws for all of them."""
    if draws < 2:
        raise ValueError(f"draws={draws} must be at least 2")
    rng, n = np.random.default_rng(seed), columns.shape[1]
    found = np.empty((len(columns), draws))
    for draw in range(draws):  # one at a time: all of them of a million documents would be 8 GB
        found[:, draw] = columns @ np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
    return found


def _ratios(up: Float64[np.ndarray, "draws"], down: Float64[np.ndarray, "draws"]) -> Float64[np.ndarray, "draws"]:
    """NaN for a draw of nothing but documents without a byte: it says nothing, so it is left out."""
    return np.divide(up, down, out=np.full(len(up), np.nan), where=down > 0)


def _interval(value: float, values: Float64[np.ndarray, "draws"], documents: int, log: bool) -> Interval:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    if log:
        value, low, high = (math.exp(min(x, 700.0)) for x in (value, low, high))
    return Interval(value, low, high) if documents > 1 else Interval(value, None, None)
