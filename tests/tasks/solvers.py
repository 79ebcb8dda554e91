"""Brute force: the answers of every task from its inputs alone, by another algorithm than the one that made them.

Nothing here knows how a sample was drawn. A solver gets the inputs as a list (or an array, where they are numbers) and
returns all answers in order. Ids are those of docs/tasks.md, written out again on purpose.
"""

from __future__ import annotations

import operator
from collections import deque
from itertools import pairwise

import numpy as np


def until_pad(tokens):
    """What stands before the first PAD."""
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


def before(tokens, marker):
    """What stands before the marker, of which there is one, and behind which there is only PAD."""
    place = tokens.index(marker)
    assert set(tokens[place + 1 :]) <= {0}
    return tokens[:place]


# formal languages: strings -------------------------------------------------------------------------------------------


def parity(tokens):
    """An automaton of two states."""
    state = 1
    for token in tokens:
        state = {(1, 1): 1, (1, 2): 2, (2, 1): 2, (2, 2): 1}[state, token]
    return [state]


def even_pairs(tokens):
    """Pairs of unequal neighbours, counted."""
    unequal = sum(a != b for a, b in pairwise(tokens))
    return [1 if unequal % 2 == 0 else 2]


def cycle_navigation(tokens):
    """A circle that turns under one who stands still."""
    circle = deque([4, 5, 6, 7, 8])
    for token in tokens:
        circle.rotate({1: 0, 2: -1, 3: 1}[token])
    return [circle[0]]


def reverse(tokens):
    """A stack, emptied."""
    stack = before(tokens, 11)
    return [stack.pop() for _ in range(len(stack))]


def repetition(tokens):
    """A queue, emptied."""
    queue = deque(before(tokens, 11))
    return [queue.popleft() for _ in range(len(queue))]


def odds_first(tokens):
    """Two passes over numbered places."""
    places = list(enumerate(before(tokens, 11), start=1))
    return [token for parity in (1, 0) for place, token in places if place % 2 == parity]


def bucket_sort(tokens):
    """How many there are of each."""
    tokens = until_pad(tokens)
    return [symbol for symbol in range(1, 11) for _ in range(tokens.count(symbol))]


def missing_duplicate(tokens):
    """The one place where the halves differ."""
    half = len(tokens) // 2
    (pair,) = {(a, b) for a, b in zip(tokens[:half], tokens[half:], strict=True) if a != b}
    assert pair[1] == 10
    return [pair[0]]


def stack_manipulation(tokens):
    """From the end: a pop swallows the next symbol that is met and not swallowed yet."""
    swallowed, kept = 0, []
    for token in reversed(before(tokens, 10)):
        if token == 9:
            swallowed += 1
        elif swallowed:
            swallowed -= 1
        else:
            kept.insert(0, token if token < 5 else token - 4)
    assert swallowed == 0, "something was popped from an empty stack"
    return kept


def height_never_negative(tokens):
    """Whether no pop of a stack-manipulation prompt finds the stack empty."""
    heights = np.cumsum([-1 if token == 9 else 1 for token in before(tokens, 10)])
    return bool((heights >= 0).all())


def majority(tokens):
    """Sorted by frequency, then by size."""
    return [sorted(set(tokens), key=lambda symbol: (-tokens.count(symbol), symbol))[0]]


def majority_count(tokens):
    """The longest run when sorted."""
    ordered = sorted(tokens)
    longest = run = 1
    for a, b in pairwise(ordered):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    return [min(longest, 63)]


def set_of(tokens):
    """A token that no earlier place holds."""
    tokens = before(tokens, 127)
    return [token for place, token in enumerate(tokens) if token not in tokens[:place]]


# formal languages: arithmetic ----------------------------------------------------------------------------------------

BINDS = {"+": 1, "-": 1, "*": 2, "neg": 3}
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def evaluate(symbols):
    """Two stacks (Dijkstra's shunting yard) over numbers, + - * ( ), and a minus that may stand before a number."""
    values, pending = [], []

    def reduce():
        sign = pending.pop()
        if sign == "neg":
            values.append(-values.pop())
        else:
            right, left = values.pop(), values.pop()
            values.append(APPLY[sign](left, right))

    operand = True  # whether an operand comes next
    for symbol in symbols:
        if isinstance(symbol, int):
            assert operand
            values.append(symbol)
            operand = False
        elif symbol == "(":
            assert operand
            pending.append("(")
        elif symbol == ")":
            assert not operand
            while pending[-1] != "(":
                reduce()
            pending.pop()
        else:
            sign = "neg" if operand else symbol
            assert symbol == "-" or not operand
            while sign != "neg" and pending and pending[-1] != "(" and BINDS[pending[-1]] >= BINDS[sign]:
                reduce()
            pending.append(sign)
            operand = True
    while pending:
        reduce()
    (value,) = values
    return value % 5


def mod_arithmetic(tokens):
    """+ - * = are 1 to 4, digits 5 to 9."""
    names = {1: "+", 2: "-", 3: "*", **{5 + digit: digit for digit in range(5)}}
    return [5 + evaluate([names[token] for token in before(tokens, 4)])]


def mod_arithmetic_brackets(tokens):
    """+ - * = ( ) are 1 to 6, digits 7 to 11."""
    names = {1: "+", 2: "-", 3: "*", 5: "(", 6: ")", **{7 + digit: digit for digit in range(5)}}
    return [7 + evaluate([names[token] for token in before(tokens, 4)])]


def solve_equation(tokens):
    """Every number is tried for x; one must fit. + - * = ( ) x ACT are 1 to 8, digits 9 to 13."""
    names = {1: "+", 2: "-", 3: "*", 5: "(", 6: ")", 7: "x", **{9 + digit: digit for digit in range(5)}}
    place = tokens.index(4)
    left, value = [names[token] for token in tokens[:place]], tokens[place + 1] - 9
    assert tokens[place + 2 :] == [8]
    assert left.count("x") == 1
    (fits,) = [x for x in range(5) if evaluate([x if name == "x" else name for name in left]) == value]
    return [9 + fits]


FORMAL = {
    "parity": parity,
    "even-pairs": even_pairs,
    "cycle-nav": cycle_navigation,
    "mod-arithmetic": mod_arithmetic,
    "mod-arithmetic-brackets": mod_arithmetic_brackets,
    "solve-equation": solve_equation,
    "reverse-string": reverse,
    "stack-manipulation": stack_manipulation,
    "bucket-sort": bucket_sort,
    "missing-duplicate": missing_duplicate,
    "odds-first": odds_first,
    "majority": majority,
    "majority-count": majority_count,
    "repetition": repetition,
    "set": set_of,
}


# recall and search ---------------------------------------------------------------------------------------------------


def mqar(tokens, vocab_size, pairs=None):
    """A dictionary. Pairs are read as long as there are some, or `pairs` of them; then every known key is answered.

    Returns {place: value}.
    """
    half, book, place = vocab_size // 2, {}, 0
    while place < len(tokens) - 1 if pairs is None else place < 2 * pairs:
        key, value = tokens[place : place + 2]
        if pairs is None and value < half:
            break
        assert 0 < key < half <= value < vocab_size
        assert key not in book
        book[key] = value
        place += 2
    return {at: book[tokens[at]] for at in range(place, len(tokens), 2) if tokens[at] in book}


def nearest_neighbour(inputs):
    """All distances at every step. float [T, 3] -> the T - 1 numbers."""
    query = inputs[0, :2].astype(float)
    answers = []
    for step in range(1, len(inputs)):
        distances = [np.hypot(*(inputs[seen, :2].astype(float) - query)) for seen in range(1, step + 1)]
        answers.append(inputs[1 + int(np.argmin(distances)), 2])
    return answers


# nested lists --------------------------------------------------------------------------------------------------------


def listops(tokens):
    """From the end: a bracket opens a heap, an operator empties it. Operators are 3 to 6, ] is 7, digits 8 to 17."""
    stack = []
    for token in reversed(until_pad(tokens)):
        if token >= 8:
            stack.append(token - 8)
        elif token == 7:
            stack.append("]")
        else:
            values = []
            while stack[-1] != "]":
                values.append(stack.pop())
            stack.pop()
            assert len(values) >= 2
            stack.append({3: np.min, 4: np.max, 5: np.median, 6: lambda v: np.sum(v) % 10}[token](values).astype(int))
    (value,) = stack
    return [8 + int(value)]


def listops_depth(tokens):
    """The longest chain of brackets, by taking the innermost away until none is left."""
    text = "".join("(" if 3 <= token <= 6 else ")" if token == 7 else "" for token in tokens)
    levels = 1
    while text:
        levels, text = levels + 1, strip(text)
    return levels


def strip(text):
    """Without its leaves: `()` where nothing is inside."""
    return text.replace("()", "")


# pictures ------------------------------------------------------------------------------------------------------------


def pathfinder(inputs):
    """Flood fill from one disc over all that is not black, over corners too: 1 if it reaches the other disc."""
    size = round(len(inputs) ** 0.5)
    lit = {divmod(place, size) for place in np.flatnonzero(inputs > 0.1).tolist()}
    bright = {divmod(place, size) for place in np.flatnonzero(inputs > 0.95).tolist()}
    assert len(bright) == 18

    def filled(start, region):
        reached, todo = {start}, [start]
        while todo:
            row, column = todo.pop()
            new = {(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & region - reached
            reached |= new
            todo += new
        return reached

    disc = filled(min(bright), bright)
    assert len(disc) == 9, "the discs touch"
    contour = filled(min(bright), lit)
    assert len(contour & bright) in (9, 18)
    return [int(bright <= contour)]


def duplicates(tokens):
    """Zipped at the separator: whether most places agree."""
    place = tokens.index(1)
    assert 2 * place + 1 == len(tokens)
    pairs = list(zip(tokens[:place], tokens[place + 1 :], strict=True))
    return [int(2 * sum(a == b for a, b in pairs) > len(pairs))]
