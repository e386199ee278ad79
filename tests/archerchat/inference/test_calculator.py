"""The calculator: exact values for what it knows, None and quickly for everything else."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from random import Random

import pytest

from archerchat.inference.calculator import MAX_CHARACTERS, MAX_DIGITS, MAX_NESTING, evaluate

HOSTILE = {
    "power": "2**3",
    "tower of powers": "9**9**9",
    "power with spaces": "9 ** 9 ** 9",
    "power split by a space": "9 * * 9",
    "power in parentheses": "(9**9)**(9**9)",
    "repeated text": "'a'*10**9",
    "repeated text, no power": "'a'*1000000000",
    "counted in repeated text": "('a'*1000000000).count('a')",
    "long chain": "9*" * 600 + "9",
    "long number": "9" * 5000,
    "number at the limit of int()": "9" * 4301,
    "number over the digits": "1" * (MAX_DIGITS + 1),
    "deep parentheses": "(" * 400 + "1" + ")" * 400,
    "deeper parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "parentheses left open": "(" * 450,
    "parentheses over the depth": "(" * (MAX_NESTING + 1) + "1" + ")" * (MAX_NESTING + 1),
    "a million signs": "-" * 1_000_000 + "1",
    "only signs": "-" * 500,
    "attribute of a number": "(1).__class__",
    "attribute of text": "'a'.__class__.__mro__[1].__subclasses__()",
    "format string attack": "'{0.__class__}'.format(1)",
    "count of everything": "'a'.count.__self__",
    "count with a range": "'aaa'.count('a', 0, 1)",
    "count with a keyword": "'aaa'.count(x='a')",
    "count of a call": "'aaa'.count(str(1))",
    "count with an escape": r"'\x61'.count('a')",
    "count of bytes": "b'aaa'.count(b'a')",
    "count of a list": "[1, 1].count(1)",
    "count of joined text": "'a' 'b'.count('a')",
    "another method": "'a'.upper()",
    "two counts": "'a'.count('a') + 'b'.count('b')",
    "f-string": "f'{9*9}'",
    "f-string counted": "f'{9*9}'.count('8')",
    "lambda": "(lambda: 1)()",
    "walrus": "(x:=1)",
    "import": "__import__('os').system('true')",
    "import statement": "import os",
    "open": "open('/etc/passwd').read()",
    "name": "x",
    "comprehension": "[x for x in range(10)]",
    "endless generator": "sum(1 for _ in iter(int, 1))",
    "conditional": "1 if 1 else 2",
    "comparison": "1 < 2",
    "boolean": "1 and 2",
    "modulo": "7 % 3",
    "shift": "1 << 10000000000",
    "bit operators": "1 | 2 ^ 3 & ~4",
    "matrix product": "1 @ 2",
    "index": "(1)[0]",
    "call of a number": "1(2)",
    "call of a parenthesis": "(1)(2)",
    "tuple": "()",
    "ellipsis": "...",
    "two numbers": "1 2",
    "two lines": "1\n2",
    "statement": "1;2",
    "comment": "1 # 2",
    "continued line": "1 + \\\n 2",
    "arabic digits": "١ + ٢",
    "full-width digits": "１＋２",
    "superscript": "2²",
    "fraction": "½",
    "unicode minus": "3 − 1",
    "unicode multiplication": "3 × 4",
    "non-breaking space": "1\u00a0+ 1",
    "null byte": "1\x00+1",
    "lone surrogate": "\ud800",
    "underscore": "1_000",
    "exponent": "1e308 * 10",
    "hexadecimal": "0xff",
    "octal": "0o17",
    "leading zero": "007",
    "complex": "1j * 1j",
    "two points": "1.2.3",
    "only a point": ".",
    "infinity by name": "inf",
    "not a number by name": "nan",
    "a fraction beyond a float": "9" * 99 + ".5" + ("*" + "9" * 99 + ".5") * 3,
    "integers too large to divide": f"{'*'.join(['9' * 99] * 4)} / 2",
    "division by zero": "1/0",
    "division by zero, float": "1.0/0.0",
    "floor division by zero": "1//0",
    "zero by zero": "0/0",
    "nothing": "",
    "spaces": "   ",
    "a comma": ",",
    "sign at the end": "1 +",
    "sign at the start": "*1",
    "parenthesis never closed": "(1",
    "parenthesis never opened": "1)",
    "three divisions": "8///2",
    "special token": "<|python_end|>",
    "an equation": "1+1=2",
    "money": "$5 * 2",
    "per cent": "50%",
    "text": "'strawberry'",
    "open text": "'strawberry.count('r')",
    "mixed quotes": "'strawberry\".count('r')",
}


def test_the_table_of_hostile_inputs_is_long() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE)
def test_hostile_inputs_have_no_value(expression: str) -> None:
    assert evaluate(expression) is None


def test_hostile_inputs_are_refused_quickly_in_threads() -> None:
    results: list[list[str | None]] = []

    def refuse() -> None:
        results.append([evaluate(expression) for expression in HOSTILE.values()])

    threads = [threading.Thread(target=refuse) for _ in range(8)]
    start = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.process_time() - start < 3.0
    assert results == [[None] * len(HOSTILE)] * 8


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2", "3"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("10 - 2 - 3", "5"),
        ("100 / 8 / 2", "6.25"),
        ("48/2", "24"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("-7 // -2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("0.2*50", "10"),
        ("4.35*100", "435"),
        ("11/15*300", "220"),
        ("20*.01", "0.2"),
        ("1.", "1"),
        ("1,234,567 * 2", "2469134"),
        ("1,000.5 + 1", "1001.5"),
        ("--5", "5"),
        ("2 - -3", "5"),
        ("2*-3", "-6"),
        ("-(1 + 2) * 3", "-9"),
        ("+4", "4"),
        (" 1 + 1 \n", "2"),
        ("0", "0"),
        ("00", "0"),
        ("0.5", "0.5"),
        ("007.5", "7.5"),
        ("-0.0", "0"),
        ("1/3", "0.3333333333333333"),
        ("99999999999999999999 * 99999999999999999999", "9999999999999999999800000000000000000001"),
        ("100000000000000000.0 * 10", "1000000000000000000"),
        ("100000000000000000 + 0.5", "100000000000000000"),
        ("1/10000000", "0.0000001"),
        ("(" * MAX_NESTING + "1" + ")" * MAX_NESTING, "1"),
        ("*".join(["9" * 99] * 4), str(int("9" * 99) ** 4)),  # beyond a float
        ("(1)+" * 200 + "1", "201"),  # beside each other is not nested
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("r")', "3"),
        ("'strawberry'.count(\"rr\")", "1"),
        (" 'a, b, c' . count ( ',' ) ", "2"),
        ("'naïve'.count('ï')", "1"),
        ("''.count('a')", "0"),
        ("'abc'.count('')", "4"),
    ],
)
def test_values_are_exact_and_written_as_in_training_data(expression: str, value: str) -> None:
    assert evaluate(expression) == value


Operation = tuple[str, Callable[[Fraction, Fraction], Fraction | int]]
OPERATIONS: list[Operation] = [
    ("+", operator.add),
    ("-", operator.sub),
    ("*", operator.mul),
    ("/", operator.truediv),
    ("//", operator.floordiv),
]


def random_expression(random: Random, depth: int) -> tuple[str, Fraction]:
    """An expression with every operation in parentheses, and its value by Python's fractions.

    Raises:
        ZeroDivisionError: it has no value.
    """
    if depth == 0 or random.random() < 0.2:
        number: int | float = random.choice([random.randrange(100), random.randrange(1000) / 8])
        return str(number), Fraction(number)
    left, a = random_expression(random, depth - 1)
    right, b = random_expression(random, depth - 1)
    sign, function = random.choice(OPERATIONS)
    return f"({left}{random.choice(['', ' '])}{sign} -{right})", Fraction(function(a, -b))


def test_random_expressions_have_the_value_of_python_s_operators() -> None:
    random, compared = Random(0), 0
    for _ in range(500):
        try:
            expression, value = random_expression(random, 4)
        except ZeroDivisionError:
            continue
        if len(expression) <= MAX_CHARACTERS:
            found = evaluate(expression)
            assert found is not None
            assert float(found) == float(value), expression
            assert "." not in found or value.denominator > 1, expression
            compared += 1
    assert compared > 300
