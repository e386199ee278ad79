"""Runs are continued by name, and refuse what is not a number or not theirs."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.journal import read_journal
from endlex.protocol import MAX_NAME_CHARS, MAX_TEXT_CHARS, decode_number


def records(directory: Path) -> list[dict[str, Any]]:
    return list(read_journal(directory / "journal.jsonl"))


def test_a_run_is_a_session_its_records_and_its_end(tmp_path: Path) -> None:
    run = endlex.init("project", "d4", {"depth": 4, "home": tmp_path}, directory=tmp_path)
    run.log({"train/loss": 2.5, "train/tokens": 3}, step=0)
    run.log_text("sample", "def <b>f</b>():\n\treturn", step=7)
    run.finish()
    run.finish()
    start, metrics, text, end = records(tmp_path)
    assert start["type"] == "session"
    assert (start["project"], start["name"], start["protocol"]) == ("project", "d4", 1)
    assert start["config"] == {"depth": 4, "home": str(tmp_path)}
    assert metrics["values"] == {"train/loss": 2.5, "train/tokens": 3}
    assert (metrics["type"], metrics["step"]) == ("metrics", 0)
    assert (text["type"], text["step"]) == ("text", 7)
    assert text["text"] == "def <b>f</b>():\n\treturn"
    assert (end["type"], end["status"]) == ("finish", "finished")
    assert {record["session"] for record in records(tmp_path)} == {run.session}


def test_the_same_name_goes_on_as_a_new_session(tmp_path: Path) -> None:
    for step in range(3):
        run = endlex.init("p", "d4", directory=tmp_path)
        run.log({"loss": step}, step=step)
        if step == 1:
            run.finish()
    metrics = [record for record in records(tmp_path) if record["type"] == "metrics"]
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert len({record["session"] for record in metrics}) == 3


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    endlex.init("p", "d4", directory=tmp_path).finish()
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(endlex.EndlexError, match="journal of run 'd4' of project 'p'"):
        endlex.init("p", "d8", directory=tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_non_finite_numbers_return(tmp_path: Path) -> None:
    with endlex.init("p", "d4", directory=tmp_path) as run:
        run.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300}, step=0)
    values = {name: decode_number(v) for name, v in records(tmp_path)[1]["values"].items()}
    assert math.isnan(values.pop("a"))
    assert values == {"b": math.inf, "c": -math.inf, "d": 1e300}
    with pytest.raises(endlex.EndlexError, match="'infinity' is not a number"):
        decode_number("infinity")


def test_an_exception_finishes_the_run_as_failed(tmp_path: Path) -> None:
    def train() -> None:
        with endlex.init("p", "d4", directory=tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert records(tmp_path)[-1]["status"] == "failed"


def test_what_float_takes_is_a_number(tmp_path: Path) -> None:
    with endlex.init("p", "d4", directory=tmp_path) as run:
        run.log({"half": Fraction(1, 2), "flag": True}, step=0)
    assert records(tmp_path)[1]["values"] == {"half": 0.5, "flag": 1.0}


@pytest.mark.parametrize("value", ["3", b"3", None, [1.0], {}])
def test_what_is_not_a_number_is_named_and_not_recorded(tmp_path: Path, value: Any) -> None:
    run = endlex.init("p", "d4", directory=tmp_path)
    with pytest.raises(endlex.EndlexError, match="metric 'loss' is"):
        run.log({"fine": 1.0, "loss": value}, step=0)
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\0", "x" * (MAX_NAME_CHARS + 1), 3])
def test_names_that_are_not_names_are_refused(tmp_path: Path, name: Any) -> None:
    run = endlex.init("p", "d4", directory=tmp_path / "run")
    for call in (
        lambda: endlex.init(name, "d4", directory=tmp_path / "new"),
        lambda: endlex.init("p", name, directory=tmp_path / "new"),
        lambda: run.log({name: 1.0}, step=0),
        lambda: run.log_text(name, "text", step=0),
    ):
        with pytest.raises(endlex.EndlexError):
            call()
    assert not (tmp_path / "new").exists()


def test_steps_texts_and_finished_runs_are_checked(tmp_path: Path) -> None:
    run = endlex.init("p", "d4", directory=tmp_path)
    for step in (-1, 1.5, None):
        with pytest.raises(endlex.EndlexError, match="whole number"):
            run.log({"loss": 1.0}, step=step)  # type: ignore[arg-type]
    with pytest.raises(endlex.EndlexError, match="at most 1,000,000"):
        run.log_text("sample", "x" * (MAX_TEXT_CHARS + 1), step=0)
    run.finish()
    with pytest.raises(endlex.EndlexError, match="'d4' is finished"):
        run.log({"loss": 1.0}, step=0)


def test_the_client_needs_only_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import endlex; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"endlex"}
