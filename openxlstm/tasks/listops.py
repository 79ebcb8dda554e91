"""ListOps: nested minima, maxima, medians and sums modulo 10 of digits, written as a sequence; the answer is a digit.

Nangia & Bowman 2018, arXiv:1804.06028, as the Long Range Arena draws it (Tay et al. 2020, arXiv:2011.04006): a node is
a digit with probability 3/4, or else one of four operators over 2 to 10 nodes, ten levels deep at most; trees of 501 to
1,999 tokens are kept.

    [MAX 2 9 [MIN 4 7 ] 0 ]   ->   9            asked at the last bracket

The median of an even number of values is the mean of the middle two, rounded down. Ids are 18, as published: PAD, two
for the beginning and end of a text, which are not written here, and the words. Parentheses, which the original writes
around every argument, are dropped.

No tree is in two splits: a digest of its tokens says in which one it may be. Within a split samples are independent;
`base.distinct` numbers those that are new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openxlstm.tasks.base import NOT_ASKED, Sample, generator

WORDS = ("PAD", "BEGIN", "END", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
MIN, MAX, MED, SM, CLOSE, ZERO = 3, 4, 5, 6, 7, 8
OPERATORS = tuple(word[1:] for word in WORDS[MIN:CLOSE])
LEAF = 0.75  # probability of a digit where both are possible
TRIES = 20_000  # trees drawn before the wish is called impossible; of the published ones six are needed on average
SIDES = ("train", "train", "validation", "test")  # by the digest of a tree, modulo 4


@dataclass(frozen=True, slots=True)
class ListOps:
    """Trees of `lengths` tokens, inclusive, `depth` levels at most, digits included, and `arguments` at most.

    `outermost`: only trees with this operator outermost, such as "SM", whose value is not guessed without reading all.

    Raises:
        ValueError: lengths that no tree has, fewer than two arguments, an operator that is none.
    """

    lengths: tuple[int, int] = (501, 1999)
    depth: int = 10
    arguments: int = 10
    outermost: str | None = None

    def __post_init__(self) -> None:
        if self.outermost not in (None, *OPERATORS):
            raise ValueError(f"outermost={self.outermost!r} must be one of {', '.join(OPERATORS)}, or None for all")
        low, high = self.lengths
        if self.arguments < 2 or self.depth < 2:
            raise ValueError(f"depth={self.depth} and arguments={self.arguments} must be at least 2")
        largest = 1
        for _ in range(self.depth - 1):
            largest = 2 + self.arguments * largest
        if not (high >= 4 and low <= high and low <= largest):
            raise ValueError(
                f"lengths=({low}, {high}) must be in order, and trees of depth={self.depth} and "
                f"arguments={self.arguments} have from 4 to {largest} tokens; "
                f"nearest is ({min(max(low, 4), largest)}, {max(high, 4)})"
            )

    @property
    def name(self) -> str:
        """listops."""
        return "listops"

    @property
    def vocab_size(self) -> int:
        """18."""
        return len(WORDS)

    @property
    def features(self) -> int:
        """None: inputs are ids."""
        return 0

    @property
    def chance(self) -> float:
        """One digit in ten."""
        return 1 / 10

    def sample(self, split: str, seed: int, index: int) -> Sample:
        """Sample `index` of the split.

        Raises:
            ValueError: trees of these lengths are too rare to be found.
        """
        random = generator("listops", split, seed, index)
        low, high = self.lengths
        block = min(max(high, 64), 512)
        uniform: list[float] = []
        for _ in range(TRIES):
            tokens: list[int] = []
            open_: list[int] = []  # arguments missing, of every operator around
            while len(tokens) <= high:
                if not uniform:
                    uniform = random.random(block).tolist()
                u = uniform.pop()
                if len(open_) == self.depth - 1:
                    tokens.append(ZERO + int(10 * u))
                elif u < LEAF and open_:  # a tree that is only a digit is too short
                    tokens.append(ZERO + int(10 * u / LEAF))
                else:
                    u = (u - LEAF) / (1 - LEAF) if open_ else u
                    operator, more = divmod(int(4 * (self.arguments - 1) * u), self.arguments - 1)
                    tokens.append(MIN + operator)
                    open_.append(2 + more)
                    continue
                open_[-1] -= 1
                while open_ and open_[-1] == 0:
                    tokens.append(CLOSE)
                    open_.pop()
                    if open_:
                        open_[-1] -= 1
                if not open_:
                    break
            wanted = self.outermost in (None, OPERATORS[tokens[0] - MIN])
            if wanted and not open_ and low <= len(tokens) <= high and _side(tokens) == split:
                inputs = np.array(tokens, dtype=np.int64)
                targets = np.full(len(tokens), NOT_ASKED, dtype=np.int64)
                targets[-1] = ZERO + _value(tokens)
                return Sample(inputs, targets)
        raise ValueError(
            f"lengths={self.lengths}: none of {TRIES} trees of depth={self.depth} and arguments={self.arguments} "
            f"had such a length; widen lengths"
        )

    def show(self, sample: Sample) -> str:
        """The sample in words, `tree -> answer`."""
        return f"{' '.join(WORDS[token] for token in sample.inputs.tolist())} -> {sample.targets[-1] - ZERO}"


SHORT = ListOps(lengths=(20, 100), depth=4, arguments=5)


def _side(tokens: list[int]) -> str:
    return SIDES[hashlib.sha256(bytes(tokens)).digest()[0] % len(SIDES)]


def _value(tokens: list[int]) -> int:
    lists: list[list[int]] = [[]]
    operators: list[int] = []
    for token in tokens:
        if token >= ZERO:
            lists[-1].append(token - ZERO)
        elif token != CLOSE:
            operators.append(token)
            lists.append([])
        else:
            values, operator = lists.pop(), operators.pop()
            lists[-1].append(apply(operator, values))
    return lists[0][0]


def apply(operator: int, values: Sequence[int]) -> int:
    """What the operator with this id makes of digits."""
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def depth(inputs: np.ndarray) -> int:
    """Levels of a tree, digits included: 2 for `[MAX 2 9 ]`. Scores are reported by it. int [T], padded or not."""
    return 1 + int(np.cumsum(np.where((inputs >= MIN) & (inputs <= SM), 1, 0) - (inputs == CLOSE)).max())


def outer(inputs: np.ndarray) -> str:
    """The outermost operator: MIN, MAX, MED or SM.

    A minimum or maximum over many values saturates and is guessed without reading them; a sum cannot be, so trees whose
    outermost operator is SM show who computes.
    """
    return WORDS[int(inputs[0])][1:]
