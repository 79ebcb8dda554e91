"""Formal languages: the fifteen tasks of the xLSTM paper, each a rule, a vocabulary and the lengths it can have.

Beck et al. 2024, arXiv:2405.04517, App. B.1.1; levels of Chomsky's hierarchy after Delétang et al., arXiv:2207.02098.
A sample is a prompt and an answer (`base.answered`): the answer is asked, shifted by one, while PAD (id 0) is read. All
tokens count for the length, the answer too, as in the generators that NX-AI released for four of the tasks; with
`counting="content"` the symbols drawn do. Lengths are uniform over those that the task can have. The answer of set is
shorter the more symbols repeat: there the number of symbols is uniform, and what gets too long or short is drawn again.

Where the paper is silent or its data differ:
  cycle-nav     five positions; the released default vocabulary of 10 gives six;
  majority      ties go to the smallest id, as in the printed example;
  stack         the stack is written bottom to top, and nothing is popped from an empty one;
  brackets      the grammar of formal_arithmetic.py, which the printed example obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from openxlstm.tasks import formal_arithmetic as arithmetic
from openxlstm.tasks import formal_strings as strings
from openxlstm.tasks.base import NOT_ASKED, Sample, answered, generator

COUNTING = ("all", "content")
Draw = Callable[[np.random.Generator, int], tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class Language:
    """One language. A sample with n symbols of content has `step * n + extra` tokens, the answer included, exactly or,
    if symbols that repeat shorten the answer (`repeats`), from n + 2 up to that.

    level: regular, context-free (deterministic), context-sensitive, counting or memory.
    words: what the ids mean; their number is the vocabulary.
    answers: among how many ids the answer is; one guess in that many is right by chance.
    draw: (random numbers, n) -> (prompt, answer).
    """

    level: str
    words: tuple[str, ...]
    answers: int
    draw: Draw
    step: int
    extra: int
    repeats: bool = False

    def contents(self, lengths: tuple[int, int], counting: str) -> range:
        """The sizes that a sample may have if its length is in `lengths`; empty if there are none."""
        if counting == "content":
            return range(max(1, lengths[0]), lengths[1] + 1)
        fewest = max(1, -((self.extra - lengths[0]) // self.step))
        most = lengths[1] - 2 if self.repeats else (lengths[1] - self.extra) // self.step
        return range(fewest, most + 1)


AB = ("PAD", "a", "b")
DIGITS = tuple("0123456789")
SIGNS = ("PAD", "+", "-", "*", "=")
NUMBERS = tuple(str(number) for number in range(1, 127))
MOVES = ("PAD", "STAY", "+1", "-1", *(f"P{position}" for position in range(5)))
STACK = ("PAD", *"1234", *(f"PUSH_{symbol}" for symbol in "1234"), "POP", "ACT")

LANGUAGES = {
    "parity": Language("regular", AB, 2, strings.parity, 1, 1),
    "even-pairs": Language("regular", AB, 2, strings.even_pairs, 1, 1),
    "cycle-nav": Language("regular", MOVES, 5, strings.cycle_navigation, 1, 1),
    "mod-arithmetic": Language("regular", (*SIGNS, *"01234"), 5, arithmetic.plain, 2, 1),
    "mod-arithmetic-brackets": Language("context-free", (*SIGNS, *"()01234"), 5, arithmetic.brackets, 1, 2),
    "solve-equation": Language("context-free", (*SIGNS, *"()x", "ACT", *"01234"), 5, arithmetic.equation, 1, 4),
    "reverse-string": Language("context-free", ("PAD", *DIGITS, "ACT"), 10, strings.reverse, 2, 1),
    "stack-manipulation": Language("context-free", STACK, 4, strings.stack_manipulation, 2, 1),
    "bucket-sort": Language("context-sensitive", ("PAD", *DIGITS), 10, strings.bucket_sort, 2, 0),
    "missing-duplicate": Language(
        "context-sensitive", ("PAD", *"123456789", "MIS"), 9, strings.missing_duplicate, 2, 1
    ),
    "odds-first": Language("context-sensitive", ("PAD", *DIGITS, "ACT"), 10, strings.odds_first, 2, 1),
    "majority": Language("counting", ("PAD", *NUMBERS[:63]), 63, strings.majority, 1, 1),
    "majority-count": Language("counting", ("PAD", *NUMBERS[:63]), 63, strings.majority_count, 1, 1),
    "repetition": Language("memory", ("PAD", *DIGITS, "ACT"), 10, strings.repetition, 2, 1),
    "set": Language("memory", ("PAD", *NUMBERS, "ACT"), 126, strings.set_of, 2, 1, repeats=True),
}


@dataclass(frozen=True, slots=True)
class Formal:
    """Samples of one formal language.

    name: which, a key of LANGUAGES.
    lengths: the shortest and the longest sample, inclusive.
    counting: what counts for the length: "all" tokens, or the "content", the symbols that were drawn: bits, moves,
        digits (mod-arithmetic), tokens of the expression (brackets, equation), symbols that are ever on the stack, x.

    Raises:
        ValueError: a name or counting that does not exist, lengths that the language cannot have.
    """

    name: str
    lengths: tuple[int, int] = (3, 40)
    counting: str = "all"

    def __post_init__(self) -> None:
        if self.name not in LANGUAGES:
            raise ValueError(f"name={self.name!r} must be one of {', '.join(LANGUAGES)}")
        if self.counting not in COUNTING:
            raise ValueError(f"counting={self.counting!r} must be one of {', '.join(COUNTING)}")
        low, high = self.lengths
        if not 1 <= low <= high:
            raise ValueError(f"lengths=({low}, {high}) must be the shortest and the longest, at least 1 and in order")
        sizes = self.language.contents(self.lengths, self.counting)
        if not sizes:
            longest = sizes.start * self.language.step + self.language.extra if self.counting == "all" else sizes.start
            raise ValueError(
                f"lengths=({low}, {high}) holds no length that {self.name} can have; nearest is ({low}, {longest})"
            )

    @property
    def language(self) -> Language:
        """Vocabulary and rule."""
        return LANGUAGES[self.name]

    @property
    def vocab_size(self) -> int:
        """W."""
        return len(self.language.words)

    @property
    def features(self) -> int:
        """None: inputs are ids."""
        return 0

    @property
    def chance(self) -> float:
        """s_rand of the paper: one over the number of possible answer tokens."""
        return 1 / self.language.answers

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split: prompt, and answer asked for while PAD is read."""
        random = generator(self.name, split, seed, index)
        language = self.language
        sizes = language.contents(self.lengths, self.counting)
        while True:
            prompt, answer = language.draw(random, int(random.integers(sizes.start, sizes.stop)))
            fits = self.lengths[0] <= len(prompt) + len(answer) <= self.lengths[1]
            if fits or not language.repeats or self.counting == "content":
                return answered(prompt, answer)

    def show(self, sample: Sample) -> str:
        """The sample in words, `prompt -> answer`."""
        words = self.language.words
        answer = [words[target] for target in sample.targets.tolist() if target != NOT_ASKED]
        prompt = [words[token] for token in sample.inputs.tolist()[: len(sample.inputs) - len(answer) + 1]]
        return f"{' '.join(prompt)} -> {' '.join(answer)}"


FORMAL: dict[str, Callable[..., Formal]] = {
    "parity": partial(Formal, "parity"),
    "even-pairs": partial(Formal, "even-pairs"),
    "cycle-nav": partial(Formal, "cycle-nav"),
    "mod-arithmetic": partial(Formal, "mod-arithmetic"),
    "mod-arithmetic-brackets": partial(Formal, "mod-arithmetic-brackets"),
    "solve-equation": partial(Formal, "solve-equation"),
    "reverse-string": partial(Formal, "reverse-string"),
    "stack-manipulation": partial(Formal, "stack-manipulation"),
    "bucket-sort": partial(Formal, "bucket-sort"),
    "missing-duplicate": partial(Formal, "missing-duplicate"),
    "odds-first": partial(Formal, "odds-first"),
    "majority": partial(Formal, "majority"),
    "majority-count": partial(Formal, "majority-count"),
    "repetition": partial(Formal, "repetition"),
    "set": partial(Formal, "set"),
}
