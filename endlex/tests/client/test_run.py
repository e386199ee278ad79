"""What `log` and its kin take, what they refuse, and which step is meant when none is given."""

from __future__ import annotations

import json
import math
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import endlex
from endlex.client.journal import read_run, session_files
from endlex.client.journal_writer import Journal
from endlex.protocol import MAX_BATCH_BYTES, MAX_NAME_CHARS, MAX_TEXT_CHARS


@pytest.fixture
def run(tmp_path: Path) -> endlex.Run:
    return endlex.init("p", "d4", directory=tmp_path / "run")


def of_type(run: endlex.Run, kind: str) -> list[dict[str, Any]]:
    assert run.directory is not None
    return [record for record in read_run(run.directory) if record["type"] == kind]


def values(run: endlex.Run) -> dict[str, Any]:
    return dict(of_type(run, "metrics")[-1]["values"])


def test_non_finite_numbers_return(run: endlex.Run) -> None:
    run.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300}, step=0)
    found = values(run)
    assert math.isnan(found.pop("a"))
    assert found == {"b": math.inf, "c": -math.inf, "d": 1e300}


def test_what_float_takes_is_a_number(run: endlex.Run) -> None:
    run.log({"half": Fraction(1, 2), "flag": True, "np": np.float32(0.5), "i": np.int64(3)})
    assert values(run) == {"half": 0.5, "flag": 1.0, "np": 0.5, "i": 3.0}
    run.log({"exact": 2**53, "large": 2**70, "nan": np.float64("nan"), "zero": -0.0})
    found = values(run)
    assert math.isnan(found.pop("nan"))
    assert found == {"exact": 2**53, "large": 2.0**70, "zero": 0.0}


def test_every_float_comes_back_as_it_was(run: endlex.Run) -> None:
    numbers = [0.1, 1e-320, 1.7976931348623157e308, 5e-324, 1 / 3, 123456789.123456789, -1e16]
    run.log({f"m{i}": number for i, number in enumerate(numbers)})
    assert list(values(run).values()) == numbers


def test_nested_values_are_named_by_their_path(run: endlex.Run) -> None:
    run.log({"train": {"loss": 1.0, "rates": {"matrix": 0.02}}, "val/bpb": 1.5})
    assert values(run) == {"train/loss": 1.0, "train/rates/matrix": 0.02, "val/bpb": 1.5}


@pytest.mark.parametrize("value", ["3", b"3", None, [1.0], {"x": None}, 10**400])
def test_what_is_not_a_number_is_named_and_not_recorded(run: endlex.Run, value: Any) -> None:
    with pytest.raises(endlex.EndlexError, match=r"metric 'loss.*' is"):
        run.log({"fine": 1.0, "loss": value}, step=0)
    assert of_type(run, "metrics") == []


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\0", "x" * (MAX_NAME_CHARS + 1), 3])
def test_names_that_are_not_names_are_refused(run: endlex.Run, name: Any) -> None:
    for call in (
        lambda: run.log({name: 1.0}, step=0),
        lambda: run.log_text(name, "text", step=0),
        lambda: run.log_table(name, ["a"], [[1]]),
    ):
        with pytest.raises(endlex.EndlexError):
            call()
    assert len(list(read_run(run.directory))) == 1  # type: ignore[arg-type]


def test_a_name_may_hold_what_json_escapes(run: endlex.Run) -> None:
    name = 'a"b\\c {train} <b>é</b>'
    run.log({name: 1.0})
    assert values(run) == {name: 1.0}


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, math.nan])
def test_steps_that_are_none_are_refused(run: endlex.Run, step: Any) -> None:
    with pytest.raises(endlex.EndlexError, match="whole number from 0"):
        run.log({"loss": 1.0}, step=step)
    run.log({"loss": 1.0}, step=np.int64(5))  # type: ignore[arg-type]
    assert [record["step"] for record in of_type(run, "metrics")] == [5]


def test_a_step_that_is_not_given_follows_the_last_also_of_the_session_before(
    run: endlex.Run,
) -> None:
    run.log({"loss": 1.0})
    run.log({"loss": 1.0}, step=10)
    run.log({"loss": 1.0})
    run.log_text("sample", "text")
    assert [r["step"] for r in of_type(run, "metrics")] == [0, 10, 11]
    assert of_type(run, "text")[0]["step"] == 11
    run.finish()
    assert run.directory is not None
    system = Journal(run.directory, {"kind": "system"})  # whose steps are seconds
    system.append("metrics", {"step": 5000, "values": {"system/load": 1.0}})
    system.close()
    again = endlex.init("p", "d4", directory=run.directory)
    again.log_text("sample", "before any metric of this session")
    again.log({"loss": 1.0})
    assert of_type(run, "text")[1]["step"] == 11
    assert of_type(run, "metrics")[-1]["step"] == 12


def test_texts_and_tables_have_limits(run: endlex.Run) -> None:
    with pytest.raises(endlex.EndlexError, match="at most 1,000,000"):
        run.log_text("sample", "x" * (MAX_TEXT_CHARS + 1), step=0)
    with pytest.raises(endlex.EndlexError, match="row 1 of table 't' has 1 values for 2 columns"):
        run.log_table("t", ["a", "b"], [[1, 2], [3]])
    with pytest.raises(endlex.EndlexError, match="log less at once"):
        run.log_table("t", ["a"], [["x" * MAX_BATCH_BYTES]])
    run.log_table("t", ["a", "b"], [[math.inf, None], (Path("x"), "é")], step=2)
    assert of_type(run, "table")[0]["rows"] == [["Infinity", None], ["x", "é"]]


def test_a_finished_run_takes_nothing_more(run: endlex.Run, tmp_path: Path) -> None:
    with pytest.raises(endlex.EndlexError, match="status 'done' must be one of"):
        run.finish("done")  # type: ignore[arg-type]
    run.finish("failed")
    for call in (
        lambda: run.log({"loss": 1.0}),
        lambda: run.log_text("a", "b"),
        lambda: run.save(tmp_path),
    ):
        with pytest.raises(endlex.EndlexError, match="'d4' is finished"):
            call()
    run.finish()
    assert [record["status"] for record in of_type(run, "finish")] == ["failed"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (ValueError(), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(), "finished"),
        (SystemExit(0), "finished"),
        (SystemExit("no GPU"), "failed"),
    ],
)
def test_what_leaves_the_block_is_the_status(
    run: endlex.Run, error: BaseException | None, status: str
) -> None:
    def train() -> None:
        with run:
            if error is not None:
                raise error

    if error is None:
        train()
    else:
        with pytest.raises(type(error)):
            train()
    assert of_type(run, "finish")[0]["status"] == status


def test_checkpoints_are_named_after_their_path_and_step(run: endlex.Run, tmp_path: Path) -> None:
    for name, step, expected in (
        ("step_000012", 12, "step_000012"),
        ("model 1.pt", 3, "model-1.pt-3"),
        (".hidden", 3, "hidden-3"),
        ("ünïcode", 4, "n-code-4"),
    ):
        (tmp_path / name).write_text(name)
        assert run.save(tmp_path / name, step=step) == expected
    assert run.save(tmp_path / ".hidden", step=3) == "hidden-3-2"
    assert not run.has_saved("best")
    assert run.save(tmp_path / ".hidden", name="best", aliases=["best"]) == "best"
    assert run.has_saved("best")
    assert [r["name"] for r in of_type(run, "checkpoint")][-2:] == ["hidden-3-2", "best"]


def test_what_cannot_be_saved_is_named(run: endlex.Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "pipe")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "up").symlink_to(tmp_path)
    (tmp_path / "file").write_text("x")
    for call, message in (
        (lambda: run.save(tmp_path / "nowhere"), "neither a file nor a directory"),
        (lambda: run.save(tmp_path / "empty"), "has 0 files"),
        (lambda: run.save(tmp_path / "odd"), "pipe' is neither"),
        (lambda: run.save(tmp_path / "links"), "links to no file"),
        (lambda: run.save(tmp_path / "file", name="../x"), "checkpoint name"),
        (lambda: run.save(tmp_path / "file", aliases=["a b"]), "checkpoint name 'a b'"),
    ):
        with pytest.raises(endlex.EndlexError, match=message):
            call()
    assert of_type(run, "checkpoint") == []
    assert not list((run.directory / "staged").glob("*"))  # type: ignore[operator]


def test_a_linked_file_is_saved_as_what_it_links_to(run: endlex.Run, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    source.mkdir()
    (tmp_path / "blob").write_text("weights")
    (source / "model.bin").symlink_to(tmp_path / "blob")
    name = run.save(source, step=1)
    (tmp_path / "blob").unlink()
    staged = run.directory / "staged" / name / "model.bin"  # type: ignore[operator]
    assert not staged.is_symlink()
    assert staged.read_text() == "weights"


def test_a_forked_child_records_nothing_and_may_have_a_run_of_its_own(run: endlex.Run) -> None:
    child = os.fork()
    if not child:
        run.log({"loss": 9.0})
        run.finish()
        endlex.init("p", "d4", directory=run.directory).log({"loss": 2.0})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    run.log({"loss": 1.0})
    run.finish()
    assert [r["values"]["loss"] for r in of_type(run, "metrics")] == [1.0, 2.0]
    assert len(session_files(run.directory)) == 2  # type: ignore[arg-type]
    assert len(of_type(run, "finish")) == 1


def test_logging_is_one_write_and_asks_nobody(
    run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, b: written.append(b) or write(fd, b))
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("log must not wait for the disk"))
    for step in range(3):
        run.log({"loss": 1.0, "lr": 0.5}, step=step)
    assert len(written) == 3
    assert json.loads(written[2])["values"] == {"loss": 1.0, "lr": 0.5}


def test_a_clock_that_goes_back_is_recorded_as_it_is(
    run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", iter([5.0, 3.0, 4.0]).__next__)
    for _ in range(3):
        run.log({"loss": 1.0})
    assert [r["time"] for r in of_type(run, "metrics")] == [5.0, 3.0, 4.0]
    assert [r["seq"] for r in of_type(run, "metrics")] == [1, 2, 3]
