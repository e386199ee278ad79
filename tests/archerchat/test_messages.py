"""Commands that messages, help and docstrings tell the user to type are commands that parse."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import archerchat
from archerchat.cli import COMMANDS, parse

SOURCES = Path(archerchat.__file__).parent
QUOTED = re.compile(r"""[`'"](archerchat [^`'"]+)[`'"]""")


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string constant; in a formatted one, a 1 stands for each value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "1" for p in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def written_commands(text: str) -> Iterator[tuple[str, ...]]:
    """The words after `archerchat`, without brackets, for each of the alternatives in `a|b`."""
    for quoted in QUOTED.findall(text):
        words = re.sub(r"[\[\]]", "", quoted).split()[1:]
        versions: list[tuple[str, ...]] = [()]
        for word in words:
            values = ["4"] if word == "N" else word.split("|")
            versions = [(*version, value) for version in versions for value in values]
        yield from versions


def commands_in_sources() -> list[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for path in SOURCES.rglob("*.py"):
        for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
            found.update(written_commands(text))
    return sorted(found)


def test_quoted_commands_are_found() -> None:
    text = "make some with `archerchat data download` or 'archerchat tokenizer train|eval [--x N]'"
    assert list(written_commands(text)) == [
        ("data", "download"),
        ("tokenizer", "train", "--x", "4"),
        ("tokenizer", "eval", "--x", "4"),
    ]
    assert ("data", "build", "stdlib") in commands_in_sources()


@pytest.mark.parametrize("words", commands_in_sources(), ids=" ".join)
def test_a_command_that_is_written_somewhere_parses(words: tuple[str, ...]) -> None:
    level: object = COMMANDS
    depth = 0
    while isinstance(level, dict) and depth < len(words):
        if words[depth] not in level:
            assert "" in level, words  # what the command does by itself
            break
        level, depth = level[words[depth]], depth + 1
    if depth < len(words):  # more than a command's name
        parse(words)
