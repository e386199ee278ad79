"""The calculator that the model calls between `<|python_start|>` and `<|python_end|>` (SPEC 10).

Two forms have a value: arithmetic on decimal numbers with + - * / // and parentheses, and
`'text'.count('x')`. Everything else has none, and the model goes on without a result.

Neither form goes through a Python evaluator. Expression libraries such as simpleeval and asteval
bound what a call or a power may do, but hand the text to Python's own parser first, whose nesting,
warnings and conversions of long numbers they do not bound; and a language this small needs none.
What is read here is checked before it is computed: length, nesting and the digits of each number.
As there is no power, a result cannot have more digits than its expression has characters, so the
work is bounded without a clock: no signal, no thread, nothing that one platform lacks.

Values are Python's: integers stay exact, `/` makes a float, and the result is `str` of the value.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable

MAX_CHARACTERS = 1000
MAX_NESTING = 50
MAX_DIGITS = 100
"""Of one number; a float of more than 308 would be infinite anyway."""

Number = int | float

# `'text'.count('x')`, and nothing that would need unescaping.
_COUNT = re.compile(
    r"""\s*(?P<quote>['"])(?P<text>[^'"\\\n]*)(?P=quote)\s*\.\s*count\s*"""
    r"""\(\s*(?P<mark>['"])(?P<part>[^'"\\\n]*)(?P=mark)\s*\)\s*"""
)
_TOKEN = re.compile(r" *(?:(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)|(?P<sign>//|[-+*/()])) *")
_SUM: dict[str, Callable[[Number, Number], Number]] = {"+": operator.add, "-": operator.sub}
_PRODUCT: dict[str, Callable[[Number, Number], Number]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}


def evaluate(expression: str) -> str | None:
    """Return what `expression` evaluates to, or None if it has no value here.

    Commas in numbers are dropped. Division by zero, overflow and anything that is neither
    arithmetic nor a count have no value; the function never raises and never takes long.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    if count := _COUNT.fullmatch(expression):
        return str(count["text"].count(count["part"]))
    try:
        tokens = _split(expression.strip(" \t\r\n").replace(",", ""))
        value = _Arithmetic(tokens).value()
    except (_Refused, ArithmeticError):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value)


class _Refused(Exception):
    """This is not arithmetic, or too much of it."""


def _split(text: str) -> list[str]:
    """Cut `text` into numbers and signs."""
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Refused
        number = match["number"]
        if number is not None and not _is_number(number):
            raise _Refused
        tokens.append(number or match["sign"])
        position = match.end()
    return tokens


def _is_number(digits: str) -> bool:
    """Say whether Python would read `digits` as a number: `007` it would not."""
    leading_zero = digits.isdigit() and digits.startswith("0") and digits.strip("0") != ""
    return len(digits) <= MAX_DIGITS and not leading_zero


class _Arithmetic:
    """Evaluate tokens with Python's precedence, by recursive descent."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0
        self._nesting = 0

    def value(self) -> Number:
        result = self._sum()
        if self._next != len(self._tokens):
            raise _Refused
        return result

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _sum(self) -> Number:
        result = self._product()
        while (sign := self._peek()) in _SUM:
            self._take()
            result = _SUM[sign](result, self._product())
        return result

    def _product(self) -> Number:
        result = self._factor()
        while (sign := self._peek()) in _PRODUCT:
            self._take()
            result = _PRODUCT[sign](result, self._factor())
        return result

    def _factor(self) -> Number:
        """Read a number or a parenthesis, with the signs before it."""
        negative = False
        while self._peek() in _SUM:
            negative ^= self._take() == "-"
        result = self._atom()
        return -result if negative else result

    def _atom(self) -> Number:
        token = self._take()
        if token == "(":
            self._nesting += 1
            if self._nesting > MAX_NESTING:
                raise _Refused
            result = self._sum()
            self._nesting -= 1
            if self._take() != ")":
                raise _Refused
            return result
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _Refused
        return float(token) if "." in token else int(token)
