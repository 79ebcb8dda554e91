"""Intervals against what is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openxlstm.tasks import intervals


def test_equal_documents_leave_no_doubt() -> None:
    found = intervals.ratio([3.0] * 5, [2.0] * 5, log=True)
    assert (found.value, found.low, found.high) == pytest.approx([math.exp(1.5)] * 3)


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    """400 documents of one token: 1.96 standard errors to each side, within a tenth of that."""
    nats = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = intervals.ratio(nats.tolist(), [1.0] * 400)
    half = 1.96 * nats.std() / 20
    assert found.value == pytest.approx(nats.mean())
    assert found.low == pytest.approx(nats.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(nats.mean() + half, abs=0.15 * half)


def test_long_documents_count_for_more() -> None:
    found = intervals.ratio([10.0, 900.0], [10.0, 300.0])
    assert found.value == pytest.approx(910 / 310)
    assert (found.low, found.high) == pytest.approx((1.0, 3.0))


def test_one_document_has_no_interval() -> None:
    found = intervals.ratio([3.0], [2.0])
    assert (found.value, found.low, found.high, found.excludes_zero) == (1.5, None, None, False)
    assert not intervals.difference(([3.0], [2.0]), ([1.0], [2.0])).excludes_zero


def test_pairing_sees_what_the_spread_of_documents_hides() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(3.0, 1.0, 50)
    a, b, one = base.tolist(), (base - 0.05 + rng.normal(0, 0.01, 50)).tolist(), [1.0] * 50
    found = intervals.difference((a, one), (b, one))
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert found.excludes_zero
    assert found.high - found.low < 0.01
    alone = intervals.ratio(a, one)
    assert alone.high - alone.low > 0.4
    same = intervals.difference((a, one), (a, one), log=True)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_the_same_seed_gives_the_same_interval() -> None:
    assert intervals.ratio([1.0, 2.0, 3.0], [1, 1, 1]) == intervals.ratio([1.0, 2.0, 3.0], [1, 1, 1])


def test_accuracies() -> None:
    assert intervals.accuracy_error(25, 100) == pytest.approx(math.sqrt(0.25 * 0.75 / 100))
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # the printed tables
    assert intervals.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_mcnemar_is_the_binomial_law() -> None:
    first = [True] * 10 + [False] * 2 + [True] * 30
    second = [False] * 10 + [True] * 2 + [True] * 30
    found = intervals.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (10, 2)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert intervals.mcnemar([True], [True]).p == 1
    assert intervals.mcnemar([True, False], [False, True]).p == 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: intervals.ratio([], []), "at least one"),
        (lambda: intervals.ratio([1.0], [0.0]), "nor zero in every document"),
        (lambda: intervals.difference(([1.0], [1.0]), ([1.0, 2.0], [1.0, 1.0])), "needs the same documents"),
        (lambda: intervals.mcnemar([True], []), "needs the same questions"),
        (lambda: intervals.accuracy_error(3, 2), "3 of 2 is no accuracy"),
        (lambda: intervals.ratio([1.0], [1.0], draws=1), "draws=1 must be at least 2"),
    ],
)
def test_mistakes_get_a_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
