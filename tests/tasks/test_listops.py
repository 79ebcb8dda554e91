"""ListOps against a machine that reads from the end, and the properties that scores are broken down by."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import solvers

from openxlstm.tasks.base import NOT_ASKED, SPLITS, Sample, Task, distinct
from openxlstm.tasks.listops import SHORT, WORDS, ListOps, depth, outer


@pytest.mark.parametrize(
    ("task", "samples"), [(SHORT, 2000), (ListOps((4, 12), 3, 3), 500), (ListOps(), 30)], ids=("short", "tiny", "full")
)
def test_a_stack_machine_gives_the_same_digit(task, samples):
    assert isinstance(task, Task)
    low, high = task.lengths
    for index in range(samples):
        sample = task.sample("train", 0, index)
        inputs, targets = sample.inputs.tolist(), sample.targets.tolist()
        assert low <= len(inputs) <= high
        assert 3 <= min(inputs) <= max(inputs) <= 17
        assert targets[-1:] == solvers.listops(inputs)
        assert set(targets[:-1]) <= {NOT_ASKED}
        assert depth(sample.inputs) == solvers.listops_depth(inputs) <= task.depth
        arguments, most = [0], 0
        for token in inputs:
            arguments[-1] += token != 7
            if 3 <= token <= 6:
                arguments.append(0)
            elif token == 7:
                most = max(most, arguments.pop())
        assert most <= task.arguments


def test_an_example_by_hand():
    text = "[MAX 2 [MED 7 8 1 4 ] [SM 9 [MIN 6 5 ] ] 0 ]"
    tokens = [WORDS.index(word) for word in text.split()]
    sample = Sample(np.array(tokens), np.full(len(tokens), NOT_ASKED))
    assert solvers.listops(tokens) == [8 + 5]  # MED: (4 + 7) / 2 rounded down; SM: (9 + 5) mod 10
    assert (depth(sample.inputs), outer(sample.inputs)) == (4, "MAX")
    assert depth(np.array([*tokens, 0, 0])) == 4  # padded


def test_all_words_digits_and_operators_occur():
    samples = [SHORT.sample("test", 0, index) for index in range(500)]
    assert set().union(*(sample.inputs.tolist() for sample in samples)) == set(range(3, 18))
    assert {int(sample.targets[-1]) for sample in samples} == set(range(8, 18))
    operators = Counter(outer(sample.inputs) for sample in samples)
    assert set(operators) == {"MIN", "MAX", "MED", "SM"}
    assert min(operators.values()) > 85
    assert "-> " in SHORT.show(samples[0])


def test_no_tree_is_in_two_splits_and_duplicates_are_left_out():
    task = ListOps((4, 5), 2, 3)
    trees = {split: {task.sample(split, seed, index).inputs.tobytes() for seed in (0, 1) for index in range(300)}
             for split in SPLITS}  # fmt: skip
    assert not trees["train"] & trees["test"]
    assert not trees["train"] & trees["validation"]
    assert not trees["validation"] & trees["test"]
    numbers = distinct(task, "train", 0, 400)
    assert numbers != list(range(400))
    assert numbers == sorted(numbers)
    drawn = [task.sample("train", 0, number).inputs.tobytes() for number in range(numbers[-1] + 1)]
    assert numbers == [number for number, tree in enumerate(drawn) if tree not in drawn[:number]]
    with pytest.raises(ValueError, match=r"count=400: listops gave only \d+ distinct samples"):
        distinct(ListOps((4, 4), 2, 2), "test", 0, 400)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((20, 100), 1, 5), "depth=1 and arguments=5 must be at least 2"),
        (((20, 100), 4, 1), "depth=4 and arguments=1 must be at least 2"),
        (((1, 3), 4, 5), r"lengths=\(1, 3\) must be in order.*have from 4 to 187 tokens; nearest is \(4, 4\)"),
        (((9, 8), 4, 5), r"lengths=\(9, 8\) must be in order"),
        (((8, 90), 2, 5), r"have from 4 to 7 tokens; nearest is \(7, 90\)"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ListOps(*arguments)


def test_trees_that_are_too_rare_are_reported():
    with pytest.raises(ValueError, match=r"none of 20000 trees of depth=4 and arguments=5 had such a length"):
        ListOps((187, 187), 4, 5).sample("train", 0, 0)
