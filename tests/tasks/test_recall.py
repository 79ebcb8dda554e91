"""Associative recall and nearest-neighbour search against a dictionary and all distances."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import solvers

from openxlstm.tasks.base import NOT_ASKED, Task
from openxlstm.tasks.mqar import MQAR
from openxlstm.tasks.nns import NearestNeighbour


@pytest.mark.parametrize(
    ("task", "samples"),
    [
        (MQAR(), 2000),
        (MQAR(length=18, pairs=3, vocab_size=16), 500),
        (MQAR(length=21, pairs=3, vocab_size=9), 500),  # odd numbers: a token is left over, a value more than keys
        (MQAR(length=128, pairs=8), 300),
        (MQAR(length=756, pairs=256), 100),
    ],
    ids=lambda task: str(task),
)
def test_a_dictionary_answers_everything(task, samples):
    assert isinstance(task, Task)
    for index in range(samples):
        sample = task.sample("train", 0, index)
        assert sample.inputs.dtype == sample.targets.dtype == np.int64
        assert len(sample.inputs) == task.length
        places = np.flatnonzero(sample.targets != NOT_ASKED)
        answers = dict(zip(places.tolist(), sample.targets[places].tolist(), strict=True))
        assert solvers.mqar(sample.inputs.tolist(), task.vocab_size) == answers
        assert len(answers) == task.queries
        assert len(set(answers.values())) == task.queries  # each key once
        assert (np.delete(sample.inputs, places)[2 * task.pairs :] == 0).all()


def test_fewer_slots_than_keys():
    task = MQAR(length=756, pairs=256)
    assert (task.slots, task.queries, task.chance) == (122, 122, 1 / 256)
    asked = Counter()
    for index in range(100):  # which keys are asked does not depend on where they stood
        sample = task.sample("train", 0, index)
        inputs = sample.inputs.tolist()
        asked.update(inputs.index(inputs[place]) // 2 for place in range(512, 756, 2))
    assert set(asked) == set(range(256))
    assert max(asked.values()) < 75 < 100 * 122 / 256 * 2


def test_random_filling_keeps_pairs_and_answers():
    task = MQAR(length=64, pairs=4, vocab_size=64, fill="random")
    filled = Counter()
    for index in range(500):
        sample = task.sample("train", 0, index)
        answers = solvers.mqar(sample.inputs.tolist(), 64, pairs=4)
        places = np.flatnonzero(sample.targets != NOT_ASKED).tolist()
        assert len(places) == 4
        assert all(answers[place] == sample.targets[place] for place in places)
        filled.update(np.delete(sample.inputs, places)[8:].tolist())
    assert set(filled) == set(range(64))


def test_slots_follow_the_power_law():
    """With one pair a slot is drawn with p(i) proportional to i ** (0.01 - 1)."""
    task = MQAR(length=22, pairs=1)
    places = Counter(int((task.sample("train", 0, index).targets != NOT_ASKED).argmax()) for index in range(4000))
    weights = np.arange(1, 11) ** (0.01 - 1)
    expected = 4000 * weights / weights.sum()
    got = np.array([places[2 + 2 * slot] for slot in range(10)])
    assert (abs(got - expected) < 5 * np.sqrt(expected)).all()


def test_recall_samples_differ_by_every_number():
    task = MQAR()
    where = [("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("validation", 0, 0), ("test", 0, 0)]
    assert len({task.sample(*numbers).inputs.tobytes() for numbers in [*where, *where]}) == len(where)


@pytest.mark.parametrize("lengths", [(2, 2), (2, 64), (16, 16)])
def test_all_distances_give_the_same_neighbour(lengths):
    task = NearestNeighbour(lengths)
    assert isinstance(task, Task)
    seen = set()
    for index in range(400):
        sample = task.sample("train", 0, index)
        assert sample.inputs.dtype == sample.targets.dtype == np.float32
        assert sample.inputs.shape == (len(sample.targets), 3)
        assert np.isnan(sample.targets[0])
        assert sample.targets[1:].tolist() == solvers.nearest_neighbour(sample.inputs)
        np.testing.assert_allclose(np.hypot(*sample.inputs[:, :2].T), 1, rtol=1e-6)
        assert 0 <= sample.inputs[:, 2].min() <= sample.inputs[:, 2].max() <= 1
        seen.add(len(sample.inputs))
    assert {min(seen), max(seen)} == set(lengths)
    assert len(seen) == lengths[1] - lengths[0] + 1 or lengths == (2, 64)


def test_vectors_point_everywhere_and_the_number_of_the_query_means_nothing():
    task = NearestNeighbour((64, 64))
    inputs = np.concatenate([task.sample("train", 0, index).inputs for index in range(200)])
    assert np.abs(inputs.mean(0) - [0, 0, 0.5]).max() < 0.03
    assert np.abs(np.corrcoef(inputs.T) - np.eye(3)).max() < 0.03
    first = np.array([task.sample("train", 0, index).inputs[0, 2] for index in range(300)])
    assert abs(first.std() - (1 / 12) ** 0.5) < 0.03


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MQAR(fill="zeros"), "fill='zeros' must be one of zero, random"),
        (lambda: MQAR(pairs=0), "pairs=0 must be at least 1"),
        (lambda: MQAR(length=9, pairs=4), "length=9 leaves no slot behind pairs=4; at least 10"),
        (lambda: MQAR(pairs=4, vocab_size=9), "vocab_size=9 has 3 keys for pairs=4; at least 10"),
        (lambda: NearestNeighbour((1, 4)), r"lengths=\(1, 4\) must be in order and at least 2.* nearest is \(2, 4\)"),
        (lambda: NearestNeighbour((5, 4)), r"nearest is \(5, 5\)"),
    ],
)
def test_a_mistake_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
