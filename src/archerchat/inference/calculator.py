"""The calculator that the model calls between `<|python_start|>` and `<|python_end|>` (SPEC 10).

Two forms have a value: arithmetic on decimal numbers with + - * / // and parentheses, and
`'text'.count('x')`. Everything else has none, and the model continues without a result.

Neither form goes through a Python evaluator. Libraries such as simpleeval and asteval hand the
text to Python's own parser, whose nesting and conversions of long numbers they do not bound. Here
length, nesting and the digits of each number are checked before anything is computed. There is no
power, so a result cannot have more digits than its expression has characters: the work is bounded
without a clock, a signal or a thread.

Values are exact fractions, and are written as the training data writes them: `0.2*50` is 10 and
`4.35*100` is 435. A value that is not whole is rounded to the nearest float.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

MAX_CHARACTERS = 1000
MAX_NESTING = 50
MAX_DIGITS = 100
"""Most digits of one number."""

# `'text'.count('x')`, and nothing that would need unescaping.
_COUNT = re.compile(
    r"""\s*(?P<quote>['"])(?P<text>[^'"\\\n]*)(?P=quote)\s*\.\s*count\s*"""
    r"""\(\s*(?P<mark>['"])(?P<part>[^'"\\\n]*)(?P=mark)\s*\)\s*"""
)
# Numbers as Python reads them: 007.5 is one, 007 is not.
_TOKEN = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+|(?:0+|[1-9][0-9]*)(?![0-9.])|//|[-+*/()]")
_OPERATIONS: dict[str, tuple[int, Callable[[Fraction, Fraction], Fraction | int]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
}
"""By sign: how strongly it binds, and what it computes."""


def evaluate(expression: str) -> str | None:
    """Return what `expression` evaluates to, or None; never raise, and never take long.

    Commas in numbers are dropped. Division by zero and overflow have no value.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    if count := _COUNT.fullmatch(expression):
        return str(count["text"].count(count["part"]))
    text = expression.strip(" \t\r\n").replace(",", "")
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", "") or max(map(len, tokens), default=0) > MAX_DIGITS:
        return None
    tokens.reverse()  # the last one comes first
    try:
        value = _value(tokens)
        if tokens:
            return None
        if value.denominator == 1:
            return str(value.numerator)
        return f"{Decimal(str(float(value))):f}".removesuffix(".0")
    except ArithmeticError:
        return None


def _value(tokens: list[str], strength: int = 1, nesting: int = 0) -> Fraction:
    """Take operations that bind at least this strongly from the end of `tokens`; compute them."""
    result = _operand(tokens, nesting)
    while tokens and tokens[-1] in _OPERATIONS and _OPERATIONS[tokens[-1]][0] >= strength:
        binds, compute = _OPERATIONS[tokens.pop()]
        result = Fraction(compute(result, _value(tokens, binds + 1, nesting)))
    return result


def _operand(tokens: list[str], nesting: int) -> Fraction:
    """Take a number or a parenthesis, with the signs before it."""
    negative = False
    while tokens and tokens[-1] in ("+", "-"):
        negative ^= tokens.pop() == "-"
    token = tokens.pop() if tokens else ""
    if token == "(" and nesting < MAX_NESTING:
        result = _value(tokens, nesting=nesting + 1)
        if not tokens or tokens.pop() != ")":
            raise ArithmeticError("an open parenthesis")
    elif token[:1].isdigit() or token[:1] == ".":
        result = Fraction(token)
    else:
        raise ArithmeticError("not an expression, or nested too deeply")
    return -result if negative else result
