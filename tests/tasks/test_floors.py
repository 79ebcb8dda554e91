"""What can be scored without doing a task, as docs/log.md has it, within 0.02."""

from __future__ import annotations

import numpy as np
import pytest

from openxlstm.tasks.base import NOT_ASKED, Sample, scaled
from openxlstm.tasks.floors import CONSTANT, constant, floor, score
from openxlstm.tasks.formal import FORMAL
from openxlstm.tasks.listops import SHORT
from openxlstm.tasks.mqar import MQAR
from openxlstm.tasks.nns import NearestNeighbour

LONG = (40, 256)
BEST = {  # token accuracy of the best rule at lengths 40 to 256
    "parity": 0.50,
    "even-pairs": 0.50,
    "cycle-nav": 0.20,
    "mod-arithmetic": 0.20,
    "mod-arithmetic-brackets": 0.30,  # products make zeros
    "solve-equation": 0.20,
    "reverse-string": 0.10,
    "stack-manipulation": 0.65,  # what was there at first is often never popped
    "bucket-sort": 0.67,
    "missing-duplicate": 0.11,
    "odds-first": 0.10,
    "majority": 0.20,
    "majority-count": 0.43,
    "repetition": 0.10,
    "set": 0.22,
}
SCALED = {"bucket-sort": 0.64, "majority-count": 0.42, "set": 0.20, "majority": 0.19}


@pytest.mark.parametrize("name", FORMAL)
def test_the_floor_of_a_formal_language(name):
    task = FORMAL[name](lengths=LONG)
    several = name in ("reverse-string", "stack-manipulation", "bucket-sort", "odds-first", "repetition", "set")
    best, *others = floor(task, "test", 0, 400 if several else 2500)
    assert best.score == pytest.approx(BEST[name], abs=0.02)
    assert (
        scaled(best.score, task.chance) == pytest.approx(SCALED.get(name, best.score), abs=0.02) or name not in SCALED
    )
    assert all(other.score <= best.score for other in others)


def test_the_floors_of_the_others():
    for task, count, expected in (
        (SHORT, 5000, [0.457, 0.250, 0.116]),
        (MQAR(), 1000, [0.25, 0.0]),
        (NearestNeighbour((16, 16)), 1000, [0.084, 0.131]),
    ):
        scores = [floor.score for floor in floor(task, "test", 0, count)]
        assert scores == pytest.approx(expected, abs=0.02), task.name


def test_scores_by_hand():
    ids = [
        Sample(np.array([1, 2, 0]), np.array([NOT_ASKED, 5, 6])),
        Sample(np.array([1]), np.array([5])),
    ]
    assert score(ids, constant(ids)) == pytest.approx(2 / 3)
    numbers = [Sample(np.zeros((3, 3), np.float32), np.array([np.nan, 1, 3], np.float32))]
    assert score(numbers, lambda inputs, places: [1.0, 1.0]) == pytest.approx((0 + 4) / 2)
    assert CONSTANT.sentence == "the most frequent answer, always"
