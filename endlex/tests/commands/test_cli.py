"""The parser, the exit statuses, and that every command that a message names does parse."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.cli import build_parser, read_spec

SOURCES = Path(endlex.__file__).parent
QUOTED = re.compile(r"`(endlex [^`]+)`|: (endlex [a-z]+ .*)$")
PLACEHOLDERS = {"N": "1", "STEP": "1", "SCOPE": "write", "PORT": "0"}
SPEC = read_spec()


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string constant; in a formatted one, a 1 stands for each value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "1" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted_commands() -> list[str]:
    found = set()
    for path in SOURCES.rglob("*.py"):
        for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
            found.update(a or b for a, b in QUOTED.findall(text))
    return sorted(found)


def test_some_commands_are_quoted() -> None:
    assert len(quoted_commands()) > 10


@pytest.mark.parametrize("command", quoted_commands())
def test_a_command_that_is_written_somewhere_parses(command: str) -> None:
    words = shlex.split(re.sub(r"\s*\|.*|[\[\]()]", "", command))[1:]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    parser: Any = build_parser()
    assert words[0] in SPEC["commands"], command
    if words[1:] not in ([], ["create"]):  # a bare name, as in "see `endlex pull`", is enough
        parser.parse_args(words)


DOCUMENTS = [
    path
    for path in [*SOURCES.parents[1].glob("*.md"), *SOURCES.parents[1].glob("docs/*.md")]
    if path.is_file()
]
SHELL_BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def documented_commands() -> list[list[str]]:
    """The words of every `endlex` command in the documentation's shell blocks."""
    found = []
    for path in DOCUMENTS:
        for block in SHELL_BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                words = words[3:] if words[:1] == ["sudo"] else words
                if words and Path(words[0]).name == "endlex":
                    found.append(words[1 : words.index("&&") if "&&" in words else None])
    return found


def test_every_command_is_documented() -> None:
    shown = {words[0] for words in documented_commands()}
    assert shown == {*SPEC["commands"]}


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_a_command_of_the_documentation_parses(words: list[str]) -> None:
    build_parser().parse_args([PLACEHOLDERS.get(word, word) for word in words])


@pytest.mark.parametrize(
    "command",
    [
        each
        for command in SPEC["commands"].values()
        for each in command.get("commands", {"": command}).values()
    ],
    ids=lambda command: command["does"],
)
def test_every_command_has_a_function_that_takes_its_arguments(command: dict[str, Any]) -> None:
    module, _, function = command["does"].partition(":")
    tree = ast.parse((SOURCES / "commands" / f"{module}.py").read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    given = [SPEC["shared"][a] if isinstance(a, str) else a for a in command["args"]]
    names = {a.get("dest") or a["name"].split()[-1].strip("-").replace("-", "_") for a in given}
    taken = {argument.arg for argument in found.args.args}
    assert names == taken or (found.args.kwarg and taken <= names)


def test_help_needs_neither_server_nor_network_modules() -> None:
    code = (
        "import sys; from endlex.cli import build_parser; build_parser().format_help(); "
        "print([m for m in ('fastapi', 'uvicorn', 'http.client', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_wrong_usage_and_failure_have_their_own_status(cli: Any, place: Path) -> None:
    assert cli()[0] == 2
    assert cli("no-such-command")[0] == 2
    assert cli("ls", "--limit", "0")[0] == 2
    assert cli("serve", "--port", "70000")[0] == 2
    status, _, err = cli("ls")
    assert status == 1
    assert "ENDLEX_URL" in err
    assert cli("--version")[0] == 0


def test_a_reader_that_goes_away_is_no_error(train: Any) -> None:
    directory = train(steps=20_000)
    command = f'"{sys.executable}" -m endlex export "{directory}" | head -1'
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("metric,step,time,value\n", "")


def test_no_token_is_taken_as_an_argument_or_shown(cli: Any, monkeypatch: Any) -> None:
    assert "--token" not in build_parser().format_help()
    assert cli("ls", "--token", "secret")[0] == 2
    monkeypatch.setenv("ENDLEX_TOKEN", "endlex_secret")
    status, out, err = cli("ls", "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "secret" not in out + err
