"""Formal languages: every sample against a solver that reads only its inputs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import solvers

from openxlstm.tasks.base import NOT_ASKED, SPLITS, Task
from openxlstm.tasks.formal import FORMAL, LANGUAGES, Formal

VOCABULARY = {  # W and 1 / s_rand of evaluation's table, written out again
    "parity": (3, 2),
    "even-pairs": (3, 2),
    "cycle-nav": (9, 5),
    "mod-arithmetic": (10, 5),
    "mod-arithmetic-brackets": (12, 5),
    "solve-equation": (14, 5),
    "reverse-string": (12, 10),
    "stack-manipulation": (11, 4),
    "bucket-sort": (11, 10),
    "missing-duplicate": (11, 9),
    "odds-first": (12, 10),
    "majority": (64, 63),
    "majority-count": (64, 63),
    "repetition": (12, 10),
    "set": (128, 126),
}
ONE_TOKEN = set(VOCABULARY) - {
    "reverse-string", "stack-manipulation", "bucket-sort", "odds-first", "repetition", "set",
}  # fmt: skip
HALF = ("mod-arithmetic", "reverse-string", "stack-manipulation", "bucket-sort", "missing-duplicate", "odds-first",
        "repetition")  # fmt: skip


def possible(name, low, high):
    """The lengths of a language within bounds, as the layouts say: whatever is written twice has every second."""
    if name == "bucket-sort":
        return [length for length in range(max(low, 2), high + 1) if length % 2 == 0]
    if name in HALF:
        return [length for length in range(max(low, 3), high + 1) if length % 2 == 1]
    shortest = {"solve-equation": 5, "mod-arithmetic-brackets": 3, "set": 3}.get(name, 2)
    return list(range(max(low, shortest), high + 1))


def test_the_names_and_vocabularies_are_those_of_the_paper():
    assert list(FORMAL) == list(LANGUAGES) == list(VOCABULARY) == list(solvers.FORMAL)
    for name, (vocab_size, answers) in VOCABULARY.items():
        task = FORMAL[name]()
        assert isinstance(task, Task)
        assert (task.name, task.vocab_size, task.chance, task.features) == (name, vocab_size, 1 / answers, 0)
        assert task.lengths == (3, 40)


@pytest.mark.parametrize("name", FORMAL)
@pytest.mark.parametrize(("lengths", "samples"), [((1, 9), 300), ((3, 40), 1500), ((40, 256), 200)])
def test_every_sample_is_what_the_solver_says(name, lengths, samples):
    task = FORMAL[name](lengths=lengths)
    solve = solvers.FORMAL[name]
    seen = Counter()
    for index in range(samples):
        sample = task.sample("train", 0, index)
        assert sample.inputs.dtype == sample.targets.dtype == np.int64
        inputs, targets = sample.inputs.tolist(), sample.targets.tolist()
        answer = solve(inputs)
        asked = [target for target in targets if target != NOT_ASKED]
        assert asked == answer, task.show(sample)
        assert targets[len(targets) - len(answer) :] == answer  # they are asked last, and nothing else is
        assert (len(answer) == 1) == (name in ONE_TOKEN) or len(inputs) <= 2 or name in ("stack-manipulation", "set")
        prompt = inputs[: len(inputs) - len(answer) + 1]
        assert 0 < min(prompt) <= max(prompt) < task.vocab_size
        assert 0 < min(answer) <= max(answer) < task.vocab_size
        assert set(inputs[len(prompt) :]) <= {0}
        if name == "stack-manipulation":
            assert solvers.height_never_negative(inputs)
        seen[len(prompt) + len(answer)] += 1
    lengths_possible = possible(name, *lengths)
    assert set(seen) <= set(lengths_possible)
    if name == "set":  # there the number of symbols is uniform, and few repeat
        assert max(seen) > 0.8 * lengths[1]
    elif samples > 10 * len(lengths_possible):  # uniform: within five standard deviations of the mean
        mean = samples / len(lengths_possible)
        assert all(abs(seen[length] - mean) < 5 * mean**0.5 for length in lengths_possible)


@pytest.mark.parametrize("name", FORMAL)
def test_all_symbols_and_answers_occur(name):
    task = FORMAL[name]()
    samples = [task.sample("test", 1, index) for index in range(600)]
    seen = set().union(*(sample.inputs.tolist() + sample.targets.tolist() for sample in samples))
    assert set(range(1, task.vocab_size)) <= seen
    answers = Counter(target for sample in samples for target in sample.targets.tolist() if target != NOT_ASKED)
    if name not in ("majority", "majority-count"):  # ties favour small ids, and nothing occurs 63 times in 40
        assert len(answers) == VOCABULARY[name][1]
        assert max(answers.values()) < (2 if "brackets" in name else 1.6) * sum(answers.values()) / len(answers) + 10


@pytest.mark.parametrize("name", FORMAL)
def test_content_is_what_was_drawn(name):
    """n symbols: bits, moves, digits; tokens of an expression; symbols ever on the stack; x."""
    symbols = {
        "mod-arithmetic": lambda tokens: sum(token >= 5 for token in tokens),
        "mod-arithmetic-brackets": lambda tokens: tokens.index(4),
        "solve-equation": lambda tokens: tokens.index(4),
        "stack-manipulation": lambda tokens: sum(0 < token <= 8 for token in tokens),
        "missing-duplicate": lambda tokens: len(tokens) // 2,
        "set": lambda tokens: tokens.index(127),
        "bucket-sort": lambda tokens: len(solvers.until_pad(tokens)),
        **dict.fromkeys(("reverse-string", "odds-first", "repetition"), lambda tokens: tokens.index(11)),
    }.get(name, len)
    task = FORMAL[name](lengths=(4, 6), counting="content")
    found = set()
    for index in range(60):
        inputs = task.sample("train", 0, index).inputs.tolist()
        found.add(symbols(inputs))
        solvers.FORMAL[name](inputs)
    assert found == {4, 5, 6}


def read(name, text):
    """The ids of a prompt in words."""
    return [LANGUAGES[name].words.index(word) for word in text.split()]


def test_the_printed_examples():
    """arXiv:2405.04517, App. B.1.1: a tie of 1 and 7 is answered 1; x is 4 modulo 5, not the printed 2."""
    assert solvers.majority(read("majority", "1 7 6 4 3 8 1 7 2")) == read("majority", "1")
    equation = read("solve-equation", "( ( 2 + 0 ) + - x ) - ( 1 ) = 2 ACT")
    assert solvers.solve_equation(equation) == read("solve-equation", "4")


def test_the_printed_equation_can_be_drawn():
    """The grammar, which the paper does not print, holds its shape: all brackets, signs and the place of x."""
    task = Formal("solve-equation", lengths=(18, 18))
    shape = [5, 5, 9, 1, 9, 6, 1, 2, 7, 6, 2, 5, 9, 6, 4, 9, 8]
    assert any(
        [min(token, 9) for token in task.sample("train", 0, index).inputs.tolist()] == shape for index in range(20_000)
    )


def test_a_sample_in_words():
    task = Formal("reverse-string", lengths=(7, 7))
    sample = task.sample("train", 0, 0)
    prompt, answer = task.show(sample).split(" -> ")
    assert prompt.split() == [*reversed(answer.split()), "ACT"]
    assert Formal("cycle-nav").show(Formal("cycle-nav").sample("train", 0, 0)).split()[-2] == "->"


def test_samples_are_functions_of_their_numbers():
    task = Formal("stack-manipulation")
    numbers = [("train", 0, 5), ("train", 1, 5), ("test", 0, 5), ("validation", 0, 5), ("train", 0, 6)]
    first = [task.sample(*where) for where in numbers]
    again = [task.sample(*where) for where in reversed(numbers)][::-1]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.targets, b.targets)
    assert len({tuple(sample.inputs.tolist()) for sample in first}) == len(numbers)
    assert len({tuple(task.sample(split, 0, 5).inputs.tolist()) for split in SPLITS}) == len(SPLITS)
    longer = dataclasses.replace(task, lengths=(41, 99))
    assert 40 <= len(longer.sample("train", 0, 5).inputs) <= 98


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("partiy",), "name='partiy' must be one of parity, even-pairs"),
        (("parity", (3, 40), "some"), "counting='some' must be one of all, content"),
        (("parity", (40, 3)), r"lengths=\(40, 3\) must be the shortest and the longest"),
        (("parity", (0, 3)), r"lengths=\(0, 3\) must be"),
        (("parity", (1, 1)), r"lengths=\(1, 1\) holds no length that parity can have; nearest is \(1, 2\)"),
        (("reverse-string", (4, 4)), r"holds no length that reverse-string can have; nearest is \(4, 5\)"),
        (("solve-equation", (2, 4)), r"nearest is \(2, 5\)"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Formal(*arguments)
