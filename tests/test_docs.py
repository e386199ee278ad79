"""What the documentation says holds: its commands parse, its paths exist, its links resolve."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest

from archerchat.dial import DialConfig, build_hyperparameters

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob("runs/*.sh")), ROOT / ".ci" / "run"]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "endlex/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]

SHELL_BLOCK = re.compile(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
TOUR = ROOT / "docs" / "TOUR.md"
INLINE_COMMAND = re.compile(r"(?<!`)`(archerchat [^`]+)`(?!`)")
ASSIGNMENT = re.compile(r"^(?:export )?(\w+)=[\"']?([\w./-]*)", re.MULTILINE)
VARIABLE = re.compile(r"\$\{?(\w+)[^}\s\"]*\}|\$(\w+)")
# A number stands for these in a document; any other placeholder (RUN, DIR) is a name as it is.
NUMBERS = {"N", "STEP", "STEPS", "DEPTH", "PORT", "SEED"}
# What may stand before a command's name.
PREFIX = re.compile(r"\w+=.*|do|then|else|if|while|!|time|exec|env|nohup")

Command = tuple[str, list[str]]
"""A place, `file:line`, and the words of the simple command that stands there."""


def shell_texts() -> Iterator[tuple[str, int, str]]:
    """Every shell text: its file, the line it starts on, the text."""
    for path in SCRIPTS:
        yield path.relative_to(ROOT).as_posix(), 1, path.read_text(encoding="utf-8")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        found = [(block.start(1), block[1]) for block in SHELL_BLOCK.finditer(text)]
        inline = INLINE_COMMAND.finditer(text) if path == TOUR else ()
        found += [(span.start(1), " ".join(span[1].split())) for span in inline]
        for start, commands in found:
            yield path.relative_to(ROOT).as_posix(), 1 + text.count("\n", 0, start), commands


def commands() -> list[Command]:
    """Every simple command, its variables and placeholders filled in."""
    found = []
    for file, line_number, text in shell_texts():
        values = dict(ASSIGNMENT.findall(text))
        for line in re.split(r"(?<!\\)\n", text):
            joined = line.replace("\\\n", " ").strip().removeprefix("$ ")
            filled = VARIABLE.sub(partial(value_of, values), joined)
            found += [(f"{file}:{line_number}", words) for words in simple_commands(filled)]
            line_number += 1 + line.count("\n")
    return found


def value_of(values: dict[str, str], reference: re.Match[str]) -> str:
    """What a script's own assignment gives a variable; 1 where it comes from elsewhere."""
    return values.get(reference[1] or reference[2]) or "1"


def simple_commands(line: str) -> Iterator[list[str]]:
    """Split a line at its operators into commands, without redirections and comments."""
    line = re.sub(r"(?<=\s)\d(?=[<>])", "", line)  # the 2 of 2>&1 is no argument
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # prose, or a quotation that goes on in the next line
        tokens = line.split()
    words: list[str] = []
    redirected = False
    for token in [*tokens, ";"]:
        if re.fullmatch(r"[|&;()]+", token):
            if words:
                yield words
            words, redirected = [], False
        elif re.fullmatch(r"[<>&]+", token):
            redirected = True
        elif not redirected and (words or not PREFIX.fullmatch(token)):
            words.append("4" if token in NUMBERS else token)


def arguments(words: list[str]) -> list[str] | None:
    """The arguments of an `archerchat` command, by whatever launcher; None for another command."""
    if Path(words[0]).name == "archerchat":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["archerchat"]:
        return words[words.index("-m") + 2 :]
    return None


OWN_COMMANDS = [
    (place, args) for place, words in commands() if (args := arguments(words)) is not None
]


@pytest.mark.skipif(
    not (ROOT / "src" / "archerchat" / "cli.py").exists(), reason="no command line yet"
)
@pytest.mark.parametrize(
    ("place", "args"),
    OWN_COMMANDS,
    ids=[f"{place} {' '.join(args)}" for place, args in OWN_COMMANDS],
)
def test_commands_parse(place: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parse = importlib.import_module("archerchat.cli").parse
    try:
        parse(args)
        code = None
    except SystemExit as stop:  # --help exits 0
        code = stop.code
    said = capsys.readouterr()
    assert not code, f"{place}: archerchat {' '.join(args)}\n{said.err}{said.out}"


def test_the_readme_sets_up_with_two_commands() -> None:
    readme = [words for place, words in commands() if place.startswith("README.md:")]
    assert ["bash", "runs/quickstart.sh"] in readme
    assert ["bash", "runs/test.sh"] in readme


def test_paths_in_commands_exist() -> None:
    for place, words in commands():
        for word in words:
            path = word.split("::")[0]
            if re.fullmatch(r"(runs|benchmarks|tests|endlex/tests|\.ci)/[\w./-]+", path):
                assert (ROOT / path).exists(), f"{place}: {path} does not exist"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as repository browsers make them."""
    headings = re.findall(r"^#+ +(.+?) *$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", document.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        destination = (document.parent / path).resolve() if path else document
        assert destination.exists(), f"{document.name} links to {target}, which does not exist"
        if anchor and destination.suffix == ".md":
            assert anchor in anchors(destination), f"{document.name}: no heading for {target}"


SPEC = ROOT / "docs" / "SPEC.md"
CITATION = re.compile(r"\bSPEC(?:'s)?\s+(?:section\s+)?(\d+)")


def test_cited_sections_exist() -> None:
    """Code cites the specification as `SPEC section 4` or `SPEC 4`."""
    sections = set(re.findall(r"^## (\d+)\. ", SPEC.read_text(encoding="utf-8"), re.MULTILINE))
    cited = set()
    for folder in ("src", "tests", "docs", "benchmarks"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            found = set(CITATION.findall(path.read_text(encoding="utf-8")))
            assert found <= sections, f"{path.relative_to(ROOT)} cites SPEC {found - sections}"
            cited |= found
    assert len(cited) > 5


GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED_FILE = re.compile(r"(?<!`)`([\w./-]+\.(?:py|sh|md|toml|svg|png))(?:::([\w.]+))?`(?!`)")
PLACES = (ROOT, ROOT / "src" / "archerchat", ROOT / "benchmarks")
"""Where a path in a guide may begin."""


@cache
def definitions(module: Path) -> set[str]:
    """The functions, classes and constants of a module; members of a class as `Class.name`."""
    found = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + each.id for each in targets if isinstance(each, ast.Name))

    collect(ast.parse(module.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_named_files_and_functions_exist(guide: Path) -> None:
    """Guides name code as `path.py` or `path.py::function`, and folders of it as `path/`."""
    text = guide.read_text(encoding="utf-8")
    for path, name in NAMED_FILE.findall(text):
        file = next((place / path for place in PLACES if (place / path).exists()), None)
        assert file, f"{guide.name} names {path}, which does not exist"
        assert not name or name in definitions(file), f"{guide.name}: {path} has no {name}"
    folders = re.findall(r"(?<!`)`([\w./-]+/)`(?!`)", text) if guide == SPEC else []
    for folder in folders:
        if folder != "eval_data/":  # a folder of CORE's bundle
            assert any((place / folder).is_dir() for place in PLACES), f"SPEC.md: no {folder}"


def test_the_architecture_names_methods_that_exist() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]\w+\.\w+)(?:\(\))?`", text))
    assert len(named) > 10
    known = {name for path in (ROOT / "src").rglob("*.py") for name in definitions(path)}
    assert named <= known, f"ARCHITECTURE.md names {named - known}"


def test_every_section_of_the_tour_has_code_and_proof() -> None:
    sections = re.split(r"^## (\d+)\. ", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    numbers, texts = sections[::2], sections[1::2]
    assert numbers == [str(n) for n in range(1, 16)]
    for number, text in zip(numbers, texts, strict=True):
        paths = [f"{path}::{name}" for path, name in NAMED_FILE.findall(text) if name]
        assert [path for path in paths if "/test_" not in path], f"section {number} names no code"
        assert [path for path in paths if "::test_" in path], f"section {number} names no test"


def test_the_tour_s_python_runs_and_its_figures_are_the_dial_s() -> None:
    """Its blocks are one session, and their assertions the claims of the text."""
    text = TOUR.read_text(encoding="utf-8")
    session: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, str(TOUR), "exec"), session)
    assert "evaluate" in session
    for depth in (4, 12, 24):
        dial = build_hyperparameters(DialConfig(depth=depth), vocab_size=32768)
        counts = dial.parameters.total, dial.parameters.scaling, dial.target_tokens
        row = depth, dial.model.model_dim, *counts, dial.total_batch_tokens, dial.num_iterations
        assert "| " + " | ".join(f"{value:,}" for value in row) + " |" in text
