"""`endlex prune`, `export`, `token`, `doctor`, `watch` and `serve`, as far as it can refuse."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import endlex
from endlex.client.directories import read_run_file
from endlex.client.shipper.system_stats import SystemRecorder
from endlex.server.api.auth import list_tokens


def run_of(directory: Path) -> str:
    owner = read_run_file(directory)
    assert owner is not None
    return owner["run"]


@pytest.fixture
def two_checkpoints(cli: Any, train: Any, online: str, place: Path) -> str:
    directory = train("pruning", save=b"first")
    assert cli("sync", directory)[0] == 0
    (place / "next.bin").write_bytes(b"second")
    assert cli("push", "next.bin", "--run", run_of(directory), "--step", 9)[0] == 0
    return run_of(directory)


def names(cli: Any, run: str) -> list[str]:
    return [c["name"] for c in json.loads(cli("show", run, "--json")[1])["checkpoints"]]


def test_prune_looks_asks_and_removes(
    cli: Any, two_checkpoints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = two_checkpoints
    rule = ("prune", "--run", run, "--keep-last", 1)
    status, out, _ = cli(*rule, "--dry-run")
    assert status == 0
    assert "step-5" in out
    assert "1 checkpoint would be removed" in out
    status, _, err = cli(*rule)  # nobody there to ask
    assert status == 2
    assert "--yes" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert cli(*rule)[0] == 1
    assert sorted(names(cli, run)) == ["next.bin", "step-5"]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert cli(*rule)[0] == 0
    assert names(cli, run) == ["next.bin"]


def test_prune_refuses_what_has_no_rule_or_no_bound(cli: Any, online: str) -> None:
    assert cli("prune", "--run", "r")[0] == 2
    assert cli("prune", "--keep-last", 1)[0] == 2
    assert cli("prune", "--keep-last", 1, "--run", "r", "--project", "p")[0] == 2


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "html"])
def test_export_writes_a_whole_file(
    cli: Any, train: Any, online: str, place: Path, kind: str
) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    status, out, err = cli("export", run_of(directory), "-o", f"run.{kind}")
    assert (status, out) == (0, "")
    assert f"run.{kind}" in err
    content = (place / f"run.{kind}").read_bytes()
    starts = {"csv": b"metric,step,time,value", "json": b"{", "parquet": b"PAR1", "html": b"<!"}
    assert content.startswith(starts[kind])
    assert [p.name for p in place.iterdir() if p.name.startswith(".run")] == []


def test_an_export_is_hidden_until_it_is_whole(
    cli: Any, train: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train()
    before, meanwhile = set(place.iterdir()), set[Path]()
    monkeypatch.setattr(
        "endlex.commands.transfer.write_run", lambda *_: meanwhile.update(place.iterdir())
    )
    assert cli("export", directory, "-o", "run.csv")[0] == 0
    (hidden,) = meanwhile - before
    assert re.fullmatch(r"\.run\.csv\.[0-9a-f]+\.part", hidden.name)
    assert set(place.iterdir()) - before == {place / "run.csv"}


def test_csv_of_a_directory_is_that_of_the_server(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    directory = train()
    again = endlex.init("demo", directory=directory, mode="offline")
    again.log({"train/loss": float("nan"), "late": 1e300}, step=3)  # replaces, and adds
    again.finish()
    assert cli("sync", directory)[0] == 0
    assert cli("export", run_of(directory), "-o", "there.csv")[0] == 0
    assert cli("export", directory, "-o", "here.csv")[0] == 0
    here, there = (
        list(csv.DictReader((place / f"{side}.csv").open())) for side in ("here", "there")
    )
    assert here == there
    values = {(row["metric"], row["step"]): row["value"] for row in here}
    assert len(values) == len(here) == 11
    assert values["train/loss", "3"] == "NaN"


def test_what_a_directory_is_exported_as_is_what_the_server_makes_of_it(
    cli: Any, online: str, place: Path
) -> None:
    """Everything that a run may hold: sessions that overlap, the machine's own, samples, NaN."""
    run = endlex.init(
        "demo", "all", {"lr": 0.1, "bad": math.inf}, tags=["a"], group="g", mode="offline"
    )
    assert run.directory is not None
    for step in (0, 2, 1):
        run.log({"loss": 1.0 / (step + 1), "n": step}, step=step)
        run.log_text("sample", f"first of {step}", step=step)
    run.log_text("sample", "the later one", step=2)
    run.log_table("scores", ["task", "score"], [["a", 0.5], ["b", math.nan]], step=1)
    (place / "w.bin").write_bytes(b"weights")
    run.save("w.bin", step=1, aliases=["best"], metadata={"loss": 0.5})
    run.finish()
    owner = read_run_file(run.directory)
    assert owner is not None
    for load in (1.0, 2.0):  # steps of the machine's sessions begin anew
        machine = SystemRecorder(run.directory, owner, seconds=1000.0)
        machine._journal.append("metrics", {"step": 1, "values": {"system/load": load}})
        machine.finish()
    again = endlex.init("demo", directory=run.directory, config={"lr": 0.2}, mode="offline")
    again.log({"loss": math.nan, "late": 1e300}, step=1)
    again.finish("failed")
    assert cli("sync", run.directory)[0] == 0
    for kind in ("json", "csv", "parquet"):
        assert cli("export", owner["run"], "-o", f"there.{kind}")[0] == 0
        assert cli("export", run.directory, "-o", f"here.{kind}")[0] == 0
    assert (place / "here.csv").read_text() == (place / "there.csv").read_text()
    tables = [pq.read_table(place / f"{side}.parquet") for side in ("here", "there")]
    assert str(tables[0].to_pylist()) == str(tables[1].to_pylist())
    here, there = (json.loads((place / f"{side}.json").read_text()) for side in ("here", "there"))
    assert here == there
    assert here["series"]["system/load"] == {
        "step": [1, 2],
        "time": here["series"]["system/load"]["time"],
        "value": [1.0, 2.0],
    }
    assert here["series"]["loss"]["value"] == [1.0, "NaN", 1.0 / 3]
    assert [text["text"] for text in here["texts"]] == ["the later one", "first of 1", "first of 0"]
    assert (here["status"], here["config"]["lr"]) == ("failed", 0.2)


def test_json_of_a_directory_holds_everything(cli: Any, train: Any, place: Path) -> None:
    directory = train()
    assert cli("export", directory, "-o", "run.json")[0] == 0
    whole = json.loads((place / "run.json").read_text())
    assert whole["series"]["train/loss"]["value"] == [3.0 / (i + 1) for i in range(5)]
    status, _, err = cli("export", directory, "--format", "html")
    assert status == 2
    assert "endlex sync" in err


def test_a_token_is_printed_once_and_stored_hashed(cli: Any, place: Path) -> None:
    status, out, err = cli("token", "create", "--name", "box", "--scope", "checkpoint,write")
    assert status == 0
    secret = out.strip()
    assert secret.startswith("endlex_")
    data = Path(os.environ["HOME"]) / ".local/share/endlex"
    assert [t["name"] for t in list_tokens(data)] == ["box"]
    assert secret not in cli("token", "list")[1]
    assert all(secret.encode() not in p.read_bytes() for p in data.rglob("*") if p.is_file())
    (listed,) = json.loads(cli("token", "list", "--json")[1])
    assert (listed["name"], sorted(listed["scopes"])) == ("box", ["checkpoint", "write"])
    assert cli("token", "grant", "box", "abcdefgh01", "abcdefgh02")[0] == 0
    assert json.loads(cli("token", "list", "--json")[1])[0]["runs"] == ["abcdefgh01", "abcdefgh02"]
    assert cli("token", "grant", "nobody", "abcdefgh01")[0] == 1
    create = ("token", "create", "--scope", "write", "--name")
    assert cli(*create, "next", "--run", "abcdefgh01")[0] == 0
    assert cli(*create, "none", "--run", "no id")[0] == 1
    assert cli("token", "revoke", "box")[0] == 0
    status, _, err = cli("token", "revoke", "box")
    assert status == 1
    assert "endlex token list" in err
    assert cli("token", "create", "--name", "x", "--scope", "root")[0] == 2


def test_doctor_says_how_to_get_what_the_dashboard_lacks(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endlex.server.web.pages.missing_assets", lambda: ["uPlot.js"])
    assert "charts lack uPlot.js: install endlex again where" in cli("doctor")[1]


def test_doctor_names_faults_and_remedies(cli: Any, train: Any, server: str) -> None:
    directory = train()
    found = json.loads(cli("doctor", "--json", "--url", server)[1])
    by_check: dict[str, list[str]] = {}
    for finding in found:
        by_check.setdefault(finding["check"], []).append(f"{finding['state']} {finding['message']}")
    assert "ok no token is set, and without one this machine may write" in by_check["token"][0]
    assert "ok equal to the server's" in by_check["clock"]
    assert f"endlex sync {directory.relative_to(Path.cwd())}" in by_check["journals"][0]
    status, out, _ = cli("doctor", "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "fault  server" in out
    (path,) = (directory / "journal").iterdir()
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*content[:2], b"{torn\n", *content[2:]]))
    status, out, _ = cli("doctor")
    assert status == 1
    assert "1 damaged line" in out


def test_serve_without_its_packages_says_what_to_install(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(endlex, "server", endlex.server)  # for the tests that come after
    for name in [name for name in sys.modules if name.startswith("endlex.server")]:
        monkeypatch.delitem(sys.modules, name)
    status, _, err = cli("serve")
    assert status == 1
    assert "pip install 'endlex[server]'" in err


@pytest.mark.parametrize("where", ["a-file", "a-file/below"])
def test_a_data_directory_that_cannot_be_is_named(cli: Any, place: Path, where: str) -> None:
    (place / "a-file").write_text("not a directory")
    for command in (
        ["serve", "--port", 0],
        ["token", "create", "--name", "me", "--scope", "read"],
    ):
        status, out, err = cli(*command, "--data", where)
        assert status == 1
        assert f"cannot keep data in {where}" in err
        assert "--data or ENDLEX_HOME" in err
        assert "serving" not in out
    assert (place / "a-file").read_text() == "not a directory"


def test_serve_lets_nobody_in_by_mistake(cli: Any, place: Path) -> None:
    status, _, err = cli("serve", "--host", "0.0.0.0", "--port", 0, "--data", "data")
    assert status == 1
    assert "--public" in err
    status, _, err = cli("serve", "--public", "--port", 0, "--data", "data")
    assert status == 1
    assert "endlex token create" in err


def test_serve_refuses_an_address_that_no_alert_can_reach(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ("serve", "--public", "--port", 0, "--data", "data")  # no token: it never begins
    for words in (
        ("--alert", ""),
        ("--alert", "ftp://x"),
        ("--ntfy", "x"),
        ("--alert-webhook", "x"),
    ):
        status, _, err = cli(*serve, *words)
        assert (status, "endlex token create" in err) == (1, False), words
    words = ("--ntfy", "", "--alert-webhook", "", "--ntfy", "https://ntfy.example/t")
    assert "endlex token create" in cli(*serve, *words)[2]
    monkeypatch.setenv("ENDLEX_ALERTS", "ftp://x")
    assert "ftp://x" in cli(*serve)[2]


def test_watch_prints_lines_on_a_pipe_until_the_end(cli: Any, train: Any, online: str) -> None:
    directory = train()
    status, out, _ = cli("watch", directory)
    assert status == 0
    assert out.count("\n") == 1
    assert "finished  step 4  train/loss 0.6  val/bpb 0.6" in out
    assert cli("sync", directory)[0] == 0
    assert cli("watch", run_of(directory), "--metric", "val/bpb")[1].endswith("val/bpb 0.6\n")
    assert cli("watch", directory, "--metric", "nope")[0] == 2


def test_watch_follows_a_run_that_goes_on(cli: Any, place: Path) -> None:
    run = endlex.init("demo", "live", mode="offline")
    run.log({"loss": 2.0}, step=0)
    threading.Timer(0.5, lambda: (run.log({"loss": 1.0}, step=1), run.finish())).start()
    _, out, _ = cli("watch", run.directory, "--every", "0.1")
    assert "running  step 0  loss 2" in out
    assert out.splitlines()[-1].endswith("finished  step 1  loss 1")


def test_plots_are_drawn_on_a_terminal(
    cli: Any, train: Any, online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plotext = pytest.importorskip("plotext")
    if not hasattr(plotext, "clear_figure"):
        pytest.skip("another version of plotext")
    directory = train(steps=30)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "60")
    _, out, _ = cli("watch", directory, "--once")
    assert "train/loss" in out
    assert "val/bpb" in out
    assert any("⠀" <= c <= "⣿" for c in out)  # braille dots


def test_plots_without_plotext_say_what_to_install(
    cli: Any, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "plotext", None)
    status, _, err = cli("watch", directory)
    assert status == 1
    assert "endlex[watch]" in err
