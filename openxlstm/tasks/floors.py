"""Trivial floors: what a rule scores that does not do the task. A model near its floor has learnt the shortcut.

A rule is fitted on samples of another seed (most need none) and then says what it would answer. The best rule of a task
is the floor to print beside a result; chance, one over the number of answers, is often far below it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openxlstm.tasks import listops
from openxlstm.tasks.base import NOT_ASKED, Sample, Task

Guess = Callable[[np.ndarray, np.ndarray], np.ndarray | list[int]]  # (inputs, asked places) -> an answer for each


@dataclass(frozen=True, slots=True)
class Rule:
    """A sentence, and a function from samples to fit to a guess."""

    sentence: str
    fit: Callable[[Sequence[Sample]], Guess]


@dataclass(frozen=True, slots=True)
class Floor:
    """What a rule scores: token accuracy, or the mean squared error where targets are numbers."""

    rule: str
    score: float


def asked(sample: Sample) -> np.ndarray:
    """The places where something is asked."""
    if sample.targets.dtype.kind == "f":
        return np.flatnonzero(~np.isnan(sample.targets))
    return np.flatnonzero(sample.targets != NOT_ASKED)


def score(samples: Sequence[Sample], guess: Guess) -> float:
    """Token accuracy over all answers of the samples, or the mean squared error where targets are numbers."""
    total, answers = 0.0, 0
    for sample in samples:
        places = asked(sample)
        wanted, got = sample.targets[places], np.asarray(guess(sample.inputs, places))
        total += float(np.square(wanted - got).sum() if wanted.dtype.kind == "f" else (wanted == got).sum())
        answers += len(places)
    return total / answers


def floor(task: Task, split: str, seed: int, count: int) -> tuple[Floor, ...]:
    """What every rule for this task scores on the first `count` samples of the split, the best first.

    Rules are fitted on as many training samples of the next seed. Tasks without rules of their own have a constant.
    """
    fitted = [task.sample("train", seed + 1, index) for index in range(count)]
    samples = [task.sample(split, seed, index) for index in range(count)]
    numbers = samples[0].targets.dtype.kind == "f"
    rules = RULES.get(task.name, (CONSTANT,))
    floors = [Floor(rule.sentence, score(samples, rule.fit(fitted))) for rule in rules]
    return tuple(sorted(floors, key=lambda floor: floor.score if numbers else -floor.score))


def constant(samples: Sequence[Sample]) -> Guess:
    """The most frequent answer."""
    best = _most_frequent(np.concatenate([sample.targets[asked(sample)] for sample in samples]).tolist())
    return lambda inputs, places: [best] * len(places)


def copy(samples: Sequence[Sample]) -> Guess:
    """Answer i is input i."""
    return lambda inputs, places: inputs[: len(places)]


def relative_position(samples: Sequence[Sample]) -> Guess:
    """Of ten sorted symbols, answer i of n is number 10 i / n: a straight line."""
    return lambda inputs, places: 1 + (10 * (np.arange(len(places)) + 0.5) / len(places)).astype(int)


def recent_majority(samples: Sequence[Sample]) -> Guess:
    """The most frequent of the last 32 symbols, the smallest of them in a tie."""
    return lambda inputs, places: [int(np.bincount(inputs[-32:]).argmax())]


def by_length(samples: Sequence[Sample]) -> Guess:
    """The most frequent answer among samples of about this length: eight lengths are taken together."""
    answers: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        answers[len(sample.inputs) // 8].append(int(sample.targets[-1]))
    best = {length: _most_frequent(values) for length, values in answers.items()}
    otherwise = _most_frequent([value for values in answers.values() for value in values])
    return lambda inputs, places: [best.get(len(inputs) // 8, otherwise)]


def first_value(samples: Sequence[Sample]) -> Guess:
    """The value of the first pair, whatever the key."""
    return lambda inputs, places: [int(inputs[1])] * len(places)


def outer_operator(samples: Sequence[Sample]) -> Guess:
    """The most frequent result of the outermost operator."""
    answers: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        answers[int(sample.inputs[0])].append(int(sample.targets[-1]))
    best = {operator: _most_frequent(values) for operator, values in answers.items()}
    return lambda inputs, places: [best.get(int(inputs[0]), listops.ZERO)]


def one_level(samples: Sequence[Sample]) -> Guess:
    """The outermost operator over its own digits, with a typical number for every operator below it."""
    typical = {listops.MIN: 0, listops.MAX: 9, listops.MED: 4, listops.SM: 5}

    def guess(inputs: np.ndarray, places: np.ndarray) -> list[int]:
        operator, *tokens = inputs.tolist()
        values, level = [], 0
        for token in tokens[:-1]:
            if level == 0 and token != listops.CLOSE:
                values.append(typical[token] if token in typical else token - listops.ZERO)
            level += (token in typical) - (token == listops.CLOSE)
        return [listops.ZERO + listops.apply(operator, values)]

    return guess


def near_discs(samples: Sequence[Sample]) -> Guess:
    """Connected where the discs of a picture are nearer than a fitted distance, or where they are farther."""
    distances = np.array([_disc_distance(sample.inputs) for sample in samples])
    connected = np.array([sample.targets[-1] == 1 for sample in samples])
    order = np.argsort(distances)
    right = np.cumsum(np.where(connected[order], 1, -1))  # of the n nearest, those connected less those not
    place = int(np.abs(right - right[-1] / 2).argmax())
    limit, near = distances[order[place]], int(right[place] > right[-1] / 2)
    return lambda inputs, places: [near if _disc_distance(inputs) <= limit else 1 - near]


def _disc_distance(inputs: np.ndarray) -> float:
    rows, columns = np.divmod(np.flatnonzero(inputs == 1), round(len(inputs) ** 0.5))
    first = (rows - rows[0] < 3) & (np.abs(columns - columns[0]) < 3)
    return float(np.hypot(rows[first].mean() - rows[~first].mean(), columns[first].mean() - columns[~first].mean()))


def half(samples: Sequence[Sample]) -> Guess:
    """0.5."""
    return lambda inputs, places: np.full(len(places), 0.5)


def last_value(samples: Sequence[Sample]) -> Guess:
    """The number that was read last."""
    return lambda inputs, places: inputs[places, 2]


def _most_frequent(values: list[int]) -> int:
    return Counter(values).most_common(1)[0][0]


CONSTANT = Rule("the most frequent answer, always", constant)

RULES = {  # by the name of the task; whoever is not here has CONSTANT
    "bucket-sort": (CONSTANT, Rule("answer i of n is symbol 10 i / n", relative_position)),
    "stack-manipulation": (CONSTANT, Rule("answer i is input i: nothing is ever popped", copy)),
    "set": (CONSTANT, Rule("answer i is input i: nothing is ever repeated", copy)),
    "majority": (CONSTANT, Rule("the majority of the last 32 symbols", recent_majority)),
    "majority-count": (CONSTANT, Rule("the most frequent answer at about this length", by_length)),
    "mqar": (CONSTANT, Rule("the value of the first pair", first_value)),
    "listops": (
        CONSTANT,
        Rule("the most frequent result of the outermost operator", outer_operator),
        Rule("the outermost operator over its digits, and 0, 9, 4, 5 for MIN, MAX, MED, SM below", one_level),
    ),
    "pathfinder": (CONSTANT, Rule("by the distance of the discs", near_discs)),
    "nns": (Rule("always 0.5", half), Rule("the last number", last_value)),
}
