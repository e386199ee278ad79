"""What `log` and its kin take, what they refuse, and which step is meant when none is given."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
import types
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import endlex
from endlex.client.journal import Journal
from endlex.protocol import MAX_BATCH_BYTES, MAX_NAME_CHARS, MAX_TEXT_CHARS
from endlex.reading import read_run, session_files


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


def test_scalars_of_every_library_are_numbers(run: endlex.Run) -> None:
    torch = pytest.importorskip("torch")

    class JaxScalar:
        """As jax.Array is: with item() and no type of Python's."""

        def item(self) -> float:
            return 1.5

    run.log(
        {
            "decimal": Decimal("0.25"),
            "bool": np.bool_(True),
            "half": np.float16(0.5),
            "int8": np.int8(-3),
            "torch": torch.tensor(2.5, dtype=torch.bfloat16, requires_grad=True),
            "torch_bool": torch.tensor([[True]]),
            "jax": JaxScalar(),
        }
    )
    assert list(values(run).values()) == [0.25, 1.0, 0.5, -3, 2.5, 1.0, 1.5]
    assert not run.refused


def test_nested_values_are_named_by_their_path(run: endlex.Run) -> None:
    run.log({"train": {"loss": 1.0, "rates": {"matrix": 0.02}}, "val/bpb": 1.5})
    assert values(run) == {"train/loss": 1.0, "train/rates/matrix": 0.02, "val/bpb": 1.5}


@pytest.mark.parametrize("value", ["3", b"3", None, [1.0], {"x": None}, 10**400])
def test_what_is_not_a_number_is_named_once_and_the_others_are_recorded(
    run: endlex.Run, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(3):
        run.log({"fine": 1.0, "loss": value}, step=step)
    assert [r["values"] for r in of_type(run, "metrics")] == [{"fine": 1.0}] * 3
    assert capsys.readouterr().err.count("endlex: metric 'loss") == 1
    assert sum(run.refused.values()) == 3
    run.finish()
    assert "not recorded as it was: 'loss" in capsys.readouterr().err


def test_strict_raises_for_what_is_not_recorded_otherwise(tmp_path: Path) -> None:
    strict = endlex.init("p", "d4", directory=tmp_path / "run", strict=True)
    for call, message in (
        (lambda: strict.log({"fine": 1.0, "loss": None}), "metric 'loss' is None"),
        (lambda: strict.log({"a\tb": 1.0}), "printable"),
        (lambda: strict.log({"a": 1.0}, step=-1), "whole number from 0"),
        (lambda: strict.log_text("a", "x" * (MAX_TEXT_CHARS + 1)), "1,000,001 characters"),
        (lambda: strict.log_table("t", ["a"], [[1, 2]]), "2 values for 1 columns"),
    ):
        with pytest.raises(endlex.EndlexError, match=message):
            call()
    assert of_type(strict, "metrics") == []


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("", "unnamed"),
        ("  ", "unnamed"),
        ("a\tb", "a_b"),
        ("\0", "_"),
        ("x" * (MAX_NAME_CHARS + 1), "x" * (MAX_NAME_CHARS - 9) + "~84a0678c"),
        (3, "3"),
    ],
)
def test_names_that_are_not_names_are_tidied(run: endlex.Run, name: Any, kept: str) -> None:
    for call in (
        lambda: run.log({name: 1.0}, step=0),
        lambda: run.log_text(name, "text", step=0),
        lambda: run.log_table(name, ["a"], [[1]]),
    ):
        call()
    assert values(run) == {kept: 1.0}
    assert [of_type(run, kind)[0]["name"] for kind in ("text", "table")] == [kept, kept]


def test_a_name_may_hold_what_json_escapes(run: endlex.Run) -> None:
    name = 'a"b\\c {train} <b>é</b>'
    run.log({name: 1.0})
    assert values(run) == {name: 1.0}


class Int32(int):
    """Like a 32-bit tensor, which cannot be compared with a number of more bits."""

    def __le__(self, other: int) -> bool:
        if other > 2**31:
            raise OverflowError("too large to convert to int32")
        return int(self) <= other


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, math.nan, 2**62 + 1, [1, 2]])
def test_what_is_logged_at_no_step_is_recorded_at_the_next(
    run: endlex.Run, step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run.log({"loss": 1.0}, step=4)
    run.log({"loss": 1.0}, step=step)
    assert "whole number from 0 to 2**62; recorded as step 5" in capsys.readouterr().err
    for good in (np.int64(6), 7.0, Int32(9), 2**62, None):
        run.log({"loss": 1.0}, step=good)  # type: ignore[arg-type]
    steps = [record["step"] for record in of_type(run, "metrics")]
    assert steps == [4, 5, 6, 7, 9, 2**62, 2**62]


def test_a_step_stays_open_until_it_is_committed(run: endlex.Run) -> None:
    run.log({"a": 1.0}, commit=False)
    run.log({"b": np.array([[2.0]])})
    run.log({"a": 3.0})
    assert [(r["step"], r["values"]) for r in of_type(run, "metrics")] == [
        (0, {"a": 1.0}),
        (0, {"b": 2.0}),
        (1, {"a": 3.0}),
    ]


def test_threads_without_steps_get_one_each(run: endlex.Run) -> None:
    threads = [
        threading.Thread(target=lambda: [run.log({"a": 1.0}) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r["step"] for r in of_type(run, "metrics")) == list(range(2000))


def test_a_signal_handler_may_log_and_finish_in_the_middle_of_a_log(
    run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def interrupted(descriptor: int, content: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        signal.raise_signal(signal.SIGUSR1)
        return write(descriptor, content)

    def handler(*_: object) -> None:
        run.log({"in": 2.0}, step=5)
        run.finish("interrupted")

    before = signal.signal(signal.SIGUSR1, handler)
    signal.alarm(20)  # it used to wait for itself for ever
    try:
        monkeypatch.setattr(os, "write", interrupted)
        with contextlib.suppress(OSError):
            run.log({"out": 1.0}, step=4)
        run.log({"after": 3.0})
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGUSR1, before)
    assert values(run) == {"in": 2.0}
    assert of_type(run, "finish")[0]["status"] == "interrupted"


def test_what_changes_in_the_configuration_is_recorded(tmp_path: Path) -> None:
    config = {"lr": 0.1, "optim": {"betas": [0.9, 0.95]}}
    run = endlex.init("p", "d4", config, directory=tmp_path / "run")
    run.config["depth"] = 4
    run.config.update({"lr": 0.2, "depth": 4}, allow_val_change=True)
    run.config |= {"seed": 1}
    copy.deepcopy(run.config)["depth"] = 5
    run.config["optim"]["betas"][0] = 0.8
    run.finish()
    assert [record["config"] for record in of_type(run, "config")] == [
        {"depth": 4},
        {"lr": 0.2},
        {"seed": 1},
        {"optim": {"betas": [0.8, 0.95]}},
    ]


class Size(Enum):
    SMALL = "small"


@dataclass
class Optim:
    lr: float = 0.1
    sizes: tuple[Size, ...] = (Size.SMALL,)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (Optim(), {"lr": 0.1, "sizes": ["small"]}),
        (argparse.Namespace(depth=4, optim=Optim()), {"depth": 4, "optim": {"lr": 0.1}}),
        (types.SimpleNamespace(at={1, 2}), {"at": [1, 2]}),
        ({Size.SMALL: 1, ("a", 2): math.nan, 3: Path("x")}, {"small": 1, "3": "x"}),
        ("adam", {"config": "adam"}),
    ],
)
def test_a_configuration_may_have_any_usual_shape(tmp_path: Path, config: Any, kept: Any) -> None:
    run = endlex.init("p", "d4", config, directory=tmp_path / "run", tags="fast")
    run.finish()
    (started,) = of_type(run, "session")
    assert started["tags"] == ["fast"]
    recorded = started["config"]
    if "optim" in recorded:
        assert recorded["optim"].pop("sizes") == ["small"]
    assert recorded.pop("('a', 2)", "NaN") == "NaN"
    assert recorded == kept
    assert of_type(run, "config") == []


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


def test_texts_and_tables_have_limits(run: endlex.Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.log_text("sample", "x" * (MAX_TEXT_CHARS + 1), step=0)
    assert of_type(run, "text")[0]["text"] == "x" * MAX_TEXT_CHARS
    run.log_table("t", ["a", "b"], [[1, 2], [3]])
    assert "row 1 of table 't' has 1 values for 2 columns" in capsys.readouterr().err
    run.log_table("large", ["a"], [["x" * MAX_BATCH_BYTES]])
    assert "log less at once" in capsys.readouterr().err
    run.log_table("no rows", ["a"], 3)  # type: ignore[arg-type]
    run.log_table("u", "a", [[math.inf], (Path("x"),)], step=2)
    tables = of_type(run, "table")
    assert [table["rows"] for table in tables] == [[[1, 2]], [["Infinity"], ["x"]]]
    assert tables[1]["columns"] == ["a"]


def test_a_finished_run_takes_nothing_more(
    run: endlex.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(endlex.EndlexError, match="status 'done' must be one of"):
        run.finish("done")  # type: ignore[arg-type]
    run.finish("failed")
    run.log({"loss": 1.0})
    run.log_text("a", "b")
    assert "'d4' is finished" in capsys.readouterr().err
    with pytest.raises(endlex.EndlexError, match="'d4' is finished"):
        run.save(tmp_path)
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
    assert run.save(tmp_path / ".hidden", name="best", aliases="best") == "best"
    assert run.has_saved("best")
    assert of_type(run, "checkpoint")[-1]["aliases"] == ["best"]
    assert [r["name"] for r in of_type(run, "checkpoint")][-2:] == ["hidden-3-2", "best"]


def test_what_cannot_be_saved_is_named(run: endlex.Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for call, message in (
        (lambda: run.save(tmp_path / "nowhere"), "neither a file nor a directory"),
        (lambda: run.save(tmp_path / "file", name="../x"), "checkpoint name"),
        (lambda: run.save(tmp_path / "file", aliases=["a b"]), "checkpoint name 'a b'"),
    ):
        with pytest.raises(endlex.EndlexError, match=message):
            call()
    assert of_type(run, "checkpoint") == []
    assert not list((run.directory / "staged").glob("*"))  # type: ignore[operator]


def test_links_pipes_and_empty_directories_stop_nobody(
    run: endlex.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.save(_directory(tmp_path / "empty" / "inside").parent) == ""
    assert "holds no files: nothing to save" in capsys.readouterr().err
    source = _directory(tmp_path / "step_1")
    (source / "model").write_text("x")
    (_directory(source / "part") / "a").write_text("a")
    (_directory(tmp_path / "elsewhere") / "tokenizer").write_text("t")
    os.mkfifo(source / "pipe")
    for name, target in (("up", ".."), ("again", "part"), ("t", "../elsewhere"), ("gone", "no")):
        (source / name).symlink_to(target)
    with pytest.raises(
        endlex.EndlexError, match=r"'t/tokenizer' leads out of .*outside_links=True"
    ):
        run.save(source)
    run.save(source, outside_links=True)
    files = [file["path"] for file in of_type(run, "checkpoint")[0]["files"]]
    assert files == ["again/a", "model", "part/a", "t/tokenizer"]
    err = capsys.readouterr().err
    assert "pipe' is neither a file nor a directory" in err
    assert "gone' links to nothing" in err


def _directory(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_linked_file_is_saved_as_what_it_links_to(run: endlex.Run, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    source.mkdir()
    (tmp_path / "blob").write_text("weights")
    (source / "model.bin").symlink_to(tmp_path / "blob")
    name = run.save(source, step=1, outside_links=True)
    (tmp_path / "blob").unlink()
    staged = run.directory / "staged" / name / "model.bin"  # type: ignore[operator]
    assert not staged.is_symlink()
    assert staged.read_text() == "weights"


def test_a_forked_child_records_nothing_and_may_have_a_run_of_its_own(
    run: endlex.Run, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert capfd.readouterr().err.count("forked from the one that records") == 1


def test_logging_is_one_write_and_asks_nobody(
    run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write, fsync, here = [], os.write, os.fsync, threading.current_thread()

    def note(fd: int, content: bytes) -> int:
        if threading.current_thread() is here:  # others are servers of other tests
            written.append(content)
        return write(fd, content)

    def wait(fd: int) -> None:
        assert threading.current_thread() is not here, "log must not wait for the disk"
        fsync(fd)

    monkeypatch.setattr(os, "write", note)
    monkeypatch.setattr(os, "fsync", wait)
    for step in range(3):
        run.log({"loss": 1.0, "lr": 0.5}, step=step)
    assert len(written) == 3
    assert json.loads(written[2])["values"] == {"loss": 1.0, "lr": 0.5}


def test_a_clock_that_goes_back_is_recorded_as_it_is(
    run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(time, "time", lambda: next(clock, 4.0))  # servers of other tests ask too
    for _ in range(3):
        run.log({"loss": 1.0})
    assert [r["time"] for r in of_type(run, "metrics")] == [5.0, 3.0, 4.0]
    assert [r["seq"] for r in of_type(run, "metrics")] == [1, 2, 3]
