"""The built-in corpus: parsed in place, free of this machine, the same each time."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archerchat.data.stdlib import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    iter_stdlib,
    list_stdlib,
    render_builtin,
    render_help,
    stdlib_directory,
)
from archerchat.errors import DataError

MODULE = '''
"""Say hello."""

def greet(name: str, *, loud=False) -> str:
    """Return a greeting.

    Louder if `loud`.
    """

def undocumented(): ...

def _private():
    """Not shown."""

class Base(object):
    def method(self):
        """Do it."""
'''


def test_help_shows_signatures_and_documentation() -> None:
    assert render_help("hello", ast.parse(MODULE)) == (
        "Help on module hello:\n\n"
        "Say hello.\n\n"
        "greet(name: str, *, loud=False) -> str\n"
        "    Return a greeting.\n\n"
        "    Louder if `loud`.\n\n"
        "class Base(object)\n"
        "    method(self)\n"
        "        Do it.\n"
    )
    assert render_help("hello", ast.parse("x = 1")) == ""


def test_builtins_are_documented_and_what_site_adds_is_not() -> None:
    assert render_builtin("len").startswith("Help on len:\n\nlen(obj, /)\n    Return the number")
    assert "    casefold(self, /)\n" in render_builtin("str")
    for name in ("exit", "True", "__import__"):
        assert render_builtin(name) == ""


def write_library(root: Path) -> None:
    long_function = "def f():\n" + "    x = 1\n" * 30
    for name in (
        "module.py",
        "package/__init__.py",
        "site-packages/other.py",
        "test/test_module.py",
        "package/tests/test_package.py",
        "_sysconfigdata_linux.py",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Document {name}."""\n\n\n{long_function}')
    (root / "broken.py").write_text("def f(:\n" * 50)
    (root / "copy.py").write_text((root / "module.py").read_text())
    (root / "pydoc_data").mkdir()
    topic = "The if statement is used for conditional execution. " * 5
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': {topic!r}}}\n")


def test_modules_topics_and_builtins_are_grouped_and_the_rest_left_out(tmp_path: Path) -> None:
    write_library(tmp_path)
    files = list_stdlib(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [
        "broken.py",
        "copy.py",
        "module.py",
        "package/__init__.py",
        "pydoc_data/topics.py",
    ]
    groups = [list(group) for group in iter_stdlib(tmp_path, files)]
    first_lines = [[text.partition("\n")[0] for text in group] for group in groups]
    # copy.py comes before the module.py that it equals, and stands for both.
    assert first_lines[0] == ['"""Document module.py."""']
    assert first_lines[1] == ['"""Document package/__init__.py."""']
    assert first_lines[2][0].startswith("The if statement is used")
    assert first_lines[3][0].startswith("Help on ")


def test_a_python_without_sources_is_named(tmp_path: Path) -> None:
    (tmp_path / "module.pyc").touch()
    with pytest.raises(DataError, match=r"no standard library sources .*data build DIRECTORY"):
        list_stdlib(tmp_path)


@pytest.mark.slow
def test_the_real_corpus_is_large_enough_and_the_same_in_every_process() -> None:
    root = stdlib_directory()
    texts = [text for group in iter_stdlib(root, list_stdlib(root)) for text in group]
    assert 5e6 < sum(map(len, texts)) < 30e6
    assert len(texts) == len(set(texts))
    assert all(MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS + 1 for text in texts)
    assert not [text for text in texts if "site-packages/archerchat" in text]
    program = (
        "import hashlib\n"
        "from archerchat.data.stdlib import *\n"
        "root = stdlib_directory()\n"
        "texts = [t for g in iter_stdlib(root, list_stdlib(root)) for t in g]\n"
        "print(hashlib.sha256('\\0'.join(texts).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
