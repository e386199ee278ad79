"""The built-in corpus: sources and documentation of this Python's standard library.

It is the same for the same Python build. The files are parsed, never imported. Their documentation
is rendered like `help()`: a signature and, indented, the docstring. The language reference's topics
(`pydoc_data`) and the built-in types' documentation are added. Tests, tables of numbers and
descriptions of this machine are left out.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from archerchat.data.corpus import Group
from archerchat.data.folder import split_text
from archerchat.errors import DataError

MIN_CHARACTERS = 100
MAX_CHARACTERS = 8_000
_EXCLUDED = re.compile(
    r"(.*/)?((site-packages|dist-packages|tests?|idle_test|lib-dynload|__pycache__|__phello__"
    r"|config-[^/]*)/.*|_sysconfigdata[^/]*|(sitecustomize|usercustomize)\.py)"
)
_TOPICS = "pydoc_data/topics"
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_directory() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def list_stdlib(root: Path) -> list[Path]:
    """Return the corpus's source files below `root`, in order; a DataError if there are none."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = [found[name] for name in sorted(found) if not _EXCLUDED.fullmatch(name)]
    if not files:
        raise DataError(
            f"this Python has no standard library sources in {root}: use another Python, or build "
            f"from a folder of text with `archerchat data build DIRECTORY`"
        )
    return files


def describe_stdlib(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return a JSON value that changes with the Python build."""
    return {
        "python": [platform.python_implementation(), platform.python_version()],
        "files": [[path.relative_to(root).as_posix(), path.stat().st_size] for path in files],
    }


def iter_stdlib(root: Path, files: Sequence[Path]) -> Iterator[Group]:
    """Yield a group of documents per module, topic and built-in, without exact duplicates."""
    seen: set[str] = set()
    for texts in _iter_texts(root, files):
        pieces = (
            piece.strip("\n") + "\n" for text in texts for piece in split_text(text, MAX_CHARACTERS)
        )
        group = [piece for piece in pieces if len(piece) >= MIN_CHARACTERS and piece not in seen]
        seen.update(group)
        if group:
            yield group


def _iter_texts(root: Path, files: Sequence[Path]) -> Iterator[list[str]]:
    for path in files:
        try:
            with tokenize.open(path) as file:
                source = file.read()
            with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue  # not text or not Python: nothing to learn from
        name = path.relative_to(root).with_suffix("").as_posix()
        if name == _TOPICS:  # a dictionary of strings
            tables = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
            yield from ([text] for table in tables for text in ast.literal_eval(table).values())
        elif "charmap_build(" not in source:  # the encodings' tables
            name = name.removesuffix("/__init__").replace("/", ".")
            yield [source, render_help(name, tree)]
    yield from ([render_builtin(name)] for name in sorted(vars(builtins)))


def render_help(name: str, tree: ast.Module) -> str:
    """Render a module's documentation; "" if it has none."""
    parts = [docstring] if (docstring := ast.get_docstring(tree)) else []
    parts += _render_definitions(tree.body)
    return "\n\n".join([f"Help on module {name}:", *parts]) + "\n" if parts else ""


def _render_definitions(body: Sequence[ast.stmt]) -> list[str]:
    """Render public definitions that have a docstring, or contain one that has."""
    rendered = []
    for node in body:
        if not isinstance(node, _Definition) or node.name.startswith("_"):
            continue
        parts = [docstring] if (docstring := ast.get_docstring(node)) else []
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            head = f"class {node.name}({bases})" if bases else f"class {node.name}"
            parts += _render_definitions(node.body)
        else:
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            head = f"{node.name}({ast.unparse(node.args)}){returns}"
        if parts:
            rendered.append(f"{head}\n{indent(chr(10).join(parts), '    ')}")
    return rendered


def render_builtin(name: str) -> str:
    """Render the documentation of a built-in class or function; "" for anything else."""
    value = getattr(builtins, name)
    if name.startswith("_") or not (inspect.isclass(value) or inspect.isbuiltin(value)):
        return ""
    members = sorted(vars(value).items()) if inspect.isclass(value) else ()
    methods = (
        indent(_render_callable(member, found), "    ")
        for member, found in members
        if callable(found) and not member.startswith("_")
    )
    return "\n\n".join([f"Help on {name}:", _render_callable(name, value), *methods]) + "\n"


def _render_callable(name: str, value: Any) -> str:
    try:
        signature = str(inspect.signature(value))
    except ValueError:  # written in C without one
        signature = "(...)"
    return f"{name}{signature}\n{indent(inspect.getdoc(value) or '', '    ')}"
