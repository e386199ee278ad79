"""Runs are continued in their directory or by their id, and refuse what is not theirs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.directories import read_run_file, register, registered, registry
from endlex.protocol import MAX_NAME_CHARS
from endlex.reading import read_run, session_files


def records(directory: Path) -> list[dict[str, Any]]:
    return list(read_run(directory))


def test_a_run_is_a_session_its_records_and_its_end(tmp_path: Path) -> None:
    run = endlex.init(
        "project",
        "d4",
        {"depth": 4, "home": tmp_path},
        directory=tmp_path,
        tags=["small"],
        group="sweep",
        notes="first try",
    )
    run.log({"train/loss": 2.5, "train/tokens": 3}, step=0)
    run.log_text("sample", "def <b>f</b>():\n\treturn", step=7)
    run.log_table("scores", ["task", "score"], [("arc", 0.5)], step=7)
    run.finish()
    run.finish()
    start, metrics, text, table, end = records(tmp_path)
    assert (start["type"], start["protocol"], start["kind"]) == ("session", 2, "trainer")
    assert (start["project"], start["name"], start["run"]) == ("project", "d4", run.id)
    assert start["config"] == {"depth": 4, "home": str(tmp_path)}
    assert (start["tags"], start["group"], start["notes"]) == (["small"], "sweep", "first try")
    assert metrics["values"] == {"train/loss": 2.5, "train/tokens": 3}
    assert (metrics["type"], metrics["step"]) == ("metrics", 0)
    assert (text["type"], text["step"]) == ("text", 7)
    assert text["text"] == "def <b>f</b>():\n\treturn"
    assert (table["columns"], table["rows"]) == (["task", "score"], [["arc", 0.5]])
    assert (end["type"], end["status"]) == ("finish", "finished")
    assert {record["session"] for record in records(tmp_path)} == {run.session}


def test_the_same_directory_goes_on_as_a_new_session(tmp_path: Path) -> None:
    runs = []
    for step in range(3):
        runs.append(endlex.init("p", "d4" if step < 2 else None, directory=tmp_path))
        runs[-1].log({"loss": step}, step=step)
        if step == 1:
            runs[-1].finish()
    metrics = [record for record in records(tmp_path) if record["type"] == "metrics"]
    assert [record["step"] for record in metrics] == [0, 1, 2]
    assert len({record["session"] for record in metrics}) == 3
    assert len({run.id for run in runs}) == 1
    assert runs[2].name == "d4"


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    run = endlex.init("p", "d4", directory=tmp_path)
    run.finish()
    with pytest.raises(endlex.EndlexError, match="directory of run 'd4' of project 'p'"):
        endlex.init("p", "d8", directory=tmp_path)
    with pytest.raises(endlex.EndlexError, match=f"id '{run.id}', not 'abcdefgh'"):
        endlex.init("p", "d4", directory=tmp_path, id="abcdefgh")
    assert len(session_files(tmp_path)) == 1


def test_without_a_directory_there_is_one_by_project_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDLEX_DIR", str(tmp_path))
    run = endlex.init("my/../project", "../d 4")
    assert run.directory == tmp_path / "my-..-project" / f"d-4-{run.id}"
    unnamed = endlex.init("p")
    assert unnamed.name == f"run-{unnamed.id}"
    monkeypatch.delenv("ENDLEX_DIR")
    monkeypatch.chdir(tmp_path)
    run = endlex.init("p", "d4")
    assert run.directory == tmp_path / "endlex-runs" / "p" / f"d4-{run.id}"


def test_a_run_is_joined_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDLEX_DIR", str(tmp_path))
    run = endlex.init("p", "d4", id="abcdefghij")
    assert run.id == "abcdefghij"
    monkeypatch.setenv("ENDLEX_RUN_ID", "abcdefghij")
    again = endlex.init("p")
    assert (again.id, again.name, again.directory) == (run.id, "d4", run.directory)
    elsewhere = endlex.init("p", "d4", directory=tmp_path / "other machine")
    assert elsewhere.id == run.id
    monkeypatch.setenv("ENDLEX_RUN_ID", "../x")
    with pytest.raises(endlex.EndlexError, match=r"run id '\.\./x'"):
        endlex.init("p", "d4")


def test_a_group_and_notes_become_text_and_a_tag_must_be_one(tmp_path: Path) -> None:
    run = endlex.init("p", directory=tmp_path / "run", group=5, notes=["a"])  # type: ignore[arg-type]
    run.finish()
    assert run.directory is not None
    first = records(run.directory)[0]
    assert (first["group"], first["notes"]) == ("5", "['a']")
    with pytest.raises(endlex.EndlexError, match="tag 7 must be printable text"):
        endlex.init("p", directory=tmp_path / "other", tags=[7])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\0", "x" * (MAX_NAME_CHARS + 1), 3])
def test_names_that_are_not_names_are_refused(tmp_path: Path, name: Any) -> None:
    for call in (
        lambda: endlex.init(name, "d4", directory=tmp_path / "new"),
        lambda: endlex.init("p", name, directory=tmp_path / "new"),
    ):
        with pytest.raises(endlex.EndlexError):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"run": "../../x", "project": "p", "name": "n"}'])
def test_a_damaged_run_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(endlex.EndlexError, match=r"run\.json does not say whose run this is"):
        endlex.init("p", "d4", directory=tmp_path)


def test_only_rank_0_records_unless_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run = endlex.init("p", "d4", directory=tmp_path / "run")
    run.log({"loss": 1.0})
    run.log_text("a", "b")
    run.log_table("t", ["a"], [[1]])
    assert run.save("nothing there") == ""
    run.finish()
    assert run.disabled
    assert list(tmp_path.iterdir()) == []
    endlex.init("p", "d4", directory=tmp_path / "run", all_ranks=True).finish()
    monkeypatch.setenv("RANK", "0")
    endlex.init("p", "d4", directory=tmp_path / "run", all_ranks=True).finish()
    starts = [r for r in records(tmp_path / "run") if r["type"] == "session"]
    assert [start["rank"] for start in starts] == [1, 0]
    assert len({start["run"] for start in starts}) == 1
    with pytest.raises(endlex.EndlexError, match="all_ranks needs a directory or an id"):
        endlex.init("p", "d4", all_ranks=True)


def test_ranks_that_start_together_share_one_run(tmp_path: Path) -> None:
    script = (
        "import endlex, sys; run = endlex.init('p', 'd4', directory=sys.argv[1], all_ranks=True);"
        "print(run.id)"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    ids = {rank.communicate()[0] for rank in ranks}
    assert len(ids) == 1
    assert len(session_files(tmp_path)) == 4
    owner = read_run_file(tmp_path)
    assert owner is not None
    assert ids == {f"{owner['run']}\n".encode()}


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert endlex.init("p", "d4", directory=tmp_path / "a", mode="disabled").disabled
    monkeypatch.setenv("ENDLEX_MODE", "disabled")
    assert endlex.init("p", "d4", directory=tmp_path / "a").disabled
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("ENDLEX_MODE", "sideways")
    with pytest.raises(endlex.EndlexError, match="mode 'sideways' must be one of online, offline"):
        endlex.init("p", "d4", directory=tmp_path / "a")
    with pytest.raises(endlex.EndlexError, match="set ENDLEX_URL"):
        endlex.init("p", "d4", directory=tmp_path / "a", mode="online")


def test_the_module_acts_on_the_run_that_init_returned_last(tmp_path: Path) -> None:
    endlex.init("p", "d3", directory=tmp_path / "other")
    run = endlex.init("p", "d4", directory=tmp_path / "run")
    assert endlex.run is run
    (tmp_path / "weights").write_text("w")
    endlex.log({"loss": 1.0})
    endlex.log_text("sample", "text")
    endlex.log_table("table", ["a"], [[1]])
    assert endlex.save(tmp_path / "weights") == "weights-0"
    endlex.finish("failed")
    kinds = [record["type"] for record in records(tmp_path / "run")]
    assert kinds == ["session", "metrics", "text", "table", "checkpoint", "finish"]
    assert records(tmp_path / "run")[-1]["status"] == "failed"
    assert endlex.__version__.count(".") == 2


def test_without_a_run_the_module_says_so() -> None:
    script = "import endlex; assert endlex.run is None; endlex.log({'loss': 1.0})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "there is no run yet: call endlex.init first" in done.stderr


def test_a_run_that_could_not_begin_is_not_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = endlex.init("p", "first", directory=tmp_path / "first")
    monkeypatch.setattr("endlex.client.environment.Console", None)
    with pytest.raises(TypeError):
        endlex.init("p", "second", directory=tmp_path / "second", console=True)
    assert endlex.run is first


def test_a_disabled_run_ends_at_once() -> None:
    script = (
        "import sys, endlex; run = endlex.init('p', mode='disabled'); before = set(sys.modules); "
        "run.finish(); print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_client_needs_only_the_standard_library_and_little_of_it() -> None:
    script = (
        "import sys; before = set(sys.modules); import endlex; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; "]
    command[-1] += script
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert loaded - sys.stdlib_module_names == {"endlex"}
    assert not loaded & {"http", "ssl", "socket", "subprocess", "asyncio", "email", "hashlib"}


def test_a_run_is_recorded_where_the_list_of_runs_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    endlex.init("p", "r", directory=tmp_path / "run").finish()
    assert "`endlex verify` finds it there only if you name it" in capsys.readouterr().err


def test_the_list_of_runs_survives_a_torn_line(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        register(tmp_path / name)
    with registry().open("ab") as file:
        file.write(b'"/torn')
    register(tmp_path / "c")
    assert registered() == [tmp_path / name for name in "abc"]
