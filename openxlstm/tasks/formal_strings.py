"""Rules of the formal languages that are about strings: (random numbers, n symbols) -> (prompt, answer).

Beck et al. 2024, arXiv:2405.04517, App. B.1.1. Symbols are independent and uniform. Ids are those of
`formal.LANGUAGES`; 0 is PAD and never drawn. ACT, where a language has it, is its last id and tells a model to begin
with the answer.
"""

from __future__ import annotations

import numpy as np

A, B = 1, 2
FORWARD, BACKWARD, POSITION = 2, 3, 4  # STAY is 1; positions are 4 to 8
PUSH, POP, STACK_ACT = 5, 9, 10  # symbols are 1 to 4; PUSH of symbol k is k + 4
STRING_ACT = 11
MISSING = 10
LARGEST = 63  # symbol, and count, of the counting tasks
SET_ACT = 127

Drawn = tuple[list[int], list[int]]


def parity(random: np.random.Generator, n: int) -> Drawn:
    """a if the number of b is even."""
    bits = random.integers(A, B + 1, n).tolist()
    return bits, [A if bits.count(B) % 2 == 0 else B]


def even_pairs(random: np.random.Generator, n: int) -> Drawn:
    """a if the number of places where neighbours differ is even: if the first is the last."""
    bits = random.integers(A, B + 1, n).tolist()
    return bits, [A if bits[0] == bits[-1] else B]


def cycle_navigation(random: np.random.Generator, n: int) -> Drawn:
    """Where one is on a circle of five after staying, going on and going back, having begun at 0."""
    moves = random.integers(1, 4, n).tolist()
    return moves, [POSITION + (moves.count(FORWARD) - moves.count(BACKWARD)) % 5]


def reverse(random: np.random.Generator, n: int) -> Drawn:
    """The last first."""
    symbols = random.integers(1, 11, n).tolist()
    return [*symbols, STRING_ACT], symbols[::-1]


def repetition(random: np.random.Generator, n: int) -> Drawn:
    """The same again."""
    symbols = random.integers(1, 11, n).tolist()
    return [*symbols, STRING_ACT], symbols


def odds_first(random: np.random.Generator, n: int) -> Drawn:
    """The first, the third, the fifth, ..., then the second, the fourth, ..."""
    symbols = random.integers(1, 11, n).tolist()
    return [*symbols, STRING_ACT], symbols[::2] + symbols[1::2]


def bucket_sort(random: np.random.Generator, n: int) -> Drawn:
    """In ascending order; nothing stands between."""
    symbols = random.integers(1, 11, n).tolist()
    return symbols, sorted(symbols)


def missing_duplicate(random: np.random.Generator, n: int) -> Drawn:
    """A string twice, the second time with a symbol missing."""
    symbols = random.integers(1, 10, n).tolist()
    again, place = symbols.copy(), int(random.integers(n))
    again[place] = MISSING
    return symbols + again, [symbols[place]]


def stack_manipulation(random: np.random.Generator, n: int) -> Drawn:
    """A stack, pushes and pops, ACT; the answer is the stack, bottom to top. n symbols are ever on it.

    How many of them were there at first is uniform from 1 to n, and how many are popped from 0 to n - 1. The order of
    pushes and pops is random; a pop that would find the stack empty comes after the next push instead.
    """
    symbols = random.integers(1, 5, n).tolist()
    at_first, pops = int(random.integers(1, n + 1)), int(random.integers(n))
    pushes = n - at_first
    stack, pushed = symbols[:at_first], iter(symbols[at_first:])
    prompt = stack.copy()
    for u in random.random(pushes + pops).tolist():
        if stack and u * (pushes + pops) < pops:
            pops -= 1
            stack.pop()
            prompt.append(POP)
        else:
            pushes -= 1
            symbol = next(pushed)
            stack.append(symbol)
            prompt.append(symbol - 1 + PUSH)
    return [*prompt, STACK_ACT], stack


def majority(random: np.random.Generator, n: int) -> Drawn:
    """The most frequent symbol, the smallest of them in a tie."""
    symbols = random.integers(1, LARGEST + 1, n)
    return symbols.tolist(), [int(np.bincount(symbols).argmax())]


def majority_count(random: np.random.Generator, n: int) -> Drawn:
    """How often the most frequent symbol occurs, 63 at most."""
    symbols = random.integers(1, LARGEST + 1, n)
    return symbols.tolist(), [min(int(np.bincount(symbols).max()), LARGEST)]


def set_of(random: np.random.Generator, n: int) -> Drawn:
    """Each symbol once, in the order in which they occur first."""
    symbols = random.integers(1, SET_ACT, n).tolist()
    return [*symbols, SET_ACT], list(dict.fromkeys(symbols))
