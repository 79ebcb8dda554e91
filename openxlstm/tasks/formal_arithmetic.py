"""Arithmetic modulo 5: sums and products, with brackets, and with an unknown.

Beck et al. 2024, arXiv:2405.04517, App. B.1.1. The paper gives one example of each and no grammar; ours, in which the
printed `((2+0)+-x)-(1)=2` can be written, and every length from 1:

    expression  =  term | term op term                              without brackets around it
    term        =  digit | -digit | (digit) | (-digit) | (term op term)

Where a length must be split between two terms, each split is equally likely. Products make zero more frequent than
other values: a constant is right about three times in ten with brackets, not twice (docs/log.md).

For x = 4 the printed example checks modulo 5; the paper prints 2.
"""

from __future__ import annotations

import numpy as np

PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = 1, 2, 3, 4, 5, 6
PLAIN_ZERO, BRACKETS_ZERO = 5, 7  # id of the digit 0
X, ACT, EQUATION_ZERO = 7, 8, 9
TERM, OPERATION, TOKEN, APPLY = range(4)  # what can be left to write


def plain(random: np.random.Generator, n: int) -> tuple[list[int], list[int]]:
    """n digits with an operator between each two, `=`; products bind first."""
    digits = random.integers(0, 5, n).tolist()
    operators = random.integers(PLUS, TIMES + 1, n - 1).tolist()
    prompt = [digits[0] + PLAIN_ZERO]
    total, product = 0, digits[0]
    for operator, digit in zip(operators, digits[1:], strict=True):
        prompt += (operator, digit + PLAIN_ZERO)
        if operator == TIMES:
            product = product * digit % 5
        else:
            total, product = total + product, digit if operator == PLUS else -digit
    return [*prompt, EQUALS], [(total + product) % 5 + PLAIN_ZERO]


def brackets(random: np.random.Generator, n: int) -> tuple[list[int], list[int]]:
    """An expression of n tokens, `=`."""
    tokens, value, _ = _expression(random, n, BRACKETS_ZERO)
    return [*tokens, EQUALS], [value + BRACKETS_ZERO]


def equation(random: np.random.Generator, n: int) -> tuple[list[int], list[int]]:
    """An expression of n tokens with one x that no product contains, `=`, its value, ACT; the answer is x."""
    tokens, value, x = _expression(random, n, EQUATION_ZERO, X)
    return [*tokens, EQUALS, value + EQUATION_ZERO, ACT], [x + EQUATION_ZERO]


def _expression(random: np.random.Generator, n: int, zero: int, unknown: int = 0) -> tuple[list[int], int, int]:
    """n tokens, their value, and that of the unknown (0 if there is none).

    What is left to write stands on a stack, the next on top: (TERM or OPERATION, tokens, whether it holds the unknown),
    (TOKEN, id, False), (APPLY, operator, False) to the last two values.
    """
    uniform = iter(random.random(2 * n + 2).tolist()).__next__  # two tokens cost at most four numbers
    tokens: list[int] = []
    values: list[int] = []
    x = 0
    todo = [(OPERATION if n > 2 else TERM, n, unknown > 0)]
    while todo:
        kind, what, hidden = todo.pop()
        if kind == TERM and what <= 2:
            value = int(5 * uniform())
            if hidden:
                x = value
            if what == 2:
                tokens.append(MINUS)
            tokens.append(unknown if hidden else value + zero)
            values.append(value if what == 1 else -value)
        elif kind == TERM:
            tokens.append(OPEN)
            todo.append((TOKEN, CLOSE, False))
            todo.append((TERM if what < 5 else OPERATION, what - 2, hidden))
        elif kind == OPERATION:
            left = 1 + int((what - 2) * uniform())
            hidden_left = hidden and (what - 1) * uniform() < left  # longer terms hide the unknown more often
            operator = PLUS + int((2 if hidden else 3) * uniform())
            todo.append((APPLY, operator, False))
            todo.append((TERM, what - 1 - left, hidden and not hidden_left))
            todo.append((TOKEN, operator, False))
            todo.append((TERM, left, hidden_left))
        elif kind == TOKEN:
            tokens.append(what)
        else:
            right, left = values.pop(), values.pop()
            values.append((left + right if what == PLUS else left - right if what == MINUS else left * right) % 5)
    return tokens, values[0] % 5, x
