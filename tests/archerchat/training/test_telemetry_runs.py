"""Whole runs with a telemetry server and without: what each costs, and what outlives a machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archerchat.home import Home
from endlex.client.shipper.control import stop_shipper

Launch = Callable[[list[str]], Any]

WITNESS = """
import json, sys

seen = set()
PROCESSES = ("subprocess.", "os.posix_spawn", "os.fork", "os.exec", "os.spawn", "os.system")

def watch(event, arguments):
    if event.startswith((*PROCESSES, "socket.")):
        seen.add(event)

sys.addaudithook(watch)
from archerchat.cli import main

status = main(json.loads(sys.argv[1]))
print(json.dumps(sorted(seen)))
sys.exit(status)
"""
"""Runs a command, and prints the system's events that telemetry must not cause without a server."""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URL", "TOKEN", "DIR", "RUN_ID", "MODE", "HOME"):
        monkeypatch.delenv(f"ENDLEX_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))


def events_of(words: list[str], **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", WITNESS, json.dumps(words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    events: list[str] = json.loads(result.stdout.splitlines()[-1])
    return events


def records_of(home: Home, run: str) -> list[dict[str, Any]]:
    files = sorted((home.run_dir(run) / "journal").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
def test_without_a_server_a_run_keeps_its_journal_and_starts_and_connects_to_nothing(
    tiny_home: Any,
) -> None:
    assert events_of(tiny_home.pretrain_words()) == []
    directory = tiny_home.run_dir("tiny")
    # The lock and the rest of a shipper are not there either, nor links to any checkpoint.
    assert sorted(path.name for path in directory.iterdir()) == [
        *("journal", "run.json", "summary.json"),
    ]
    records = records_of(tiny_home, "tiny")
    assert sum("train/loss" in r.get("values", {}) for r in records) == 4
    assert records[-1]["status"] == "finished"


@pytest.mark.slow
def test_the_witness_sees_what_a_server_brings(tiny_home: Any) -> None:
    """The test above would fail if training did what it does with a server."""
    events = events_of(tiny_home.pretrain_words(), ENDLEX_URL="http://127.0.0.1:1")
    assert "subprocess.Popen" in events
    end_shipper(tiny_home.run_dir("tiny"))


def test_a_session_tells_the_settings_the_recipe_and_the_samples(tiny_home: Any) -> None:
    assert tiny_home.pretrain(tags="baseline") == 0
    session, *records = records_of(tiny_home, "tiny")
    assert (session["group"], session["tags"]) == ("pretrain", ["baseline"])
    config = session["config"]
    assert config["config"]["dial"]["depth"] == 2
    assert config["identity"]["learning_rates"]["matrix"] > 0
    assert config["hardware"]["device"]
    assert {"git_commit", "command", "torch"} <= config["environment"].keys()
    logged = {name for r in records for name in r.get("values", {})}
    assert logged >= {
        *("train/loss", "train/lr_multiplier", "train/matrix_lr", "train/muon_weight_decay"),
        *("train/tokens_per_second", "train/mfu", "train/memory_bytes", "val/bpb"),
        *("train/tokens", "train/flops", "train/seconds"),
    }
    steps = [r["values"] for r in records if "train/loss" in r.get("values", {})]
    rates = config["identity"]["learning_rates"]
    assert [values["train/matrix_lr"] for values in steps] == pytest.approx(
        [rates["matrix"] * values["train/lr_multiplier"] for values in steps]
    )
    texts = {r["name"]: r["text"] for r in records if r["type"] == "text"}
    assert texts["sample/def main("].startswith("def main(")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A telemetry server in a process of its own; yields its address."""
    pytest.importorskip("fastapi", reason="the server's packages are the extra endlex[server]")
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "endlex", "serve", "--port", "0", "--data", tmp_path / "data"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield wait_for(lambda: address_in(log.read_text()), process)
    finally:
        process.terminate()
        process.wait(30)


def address_in(text: str) -> str | None:
    words = [word for word in text.split() if word.startswith("http://127.0.0.1:")]
    return words[0].rstrip("/") if words else None


def wait_for(find: Callable[[], Any], process: subprocess.Popen[Any]) -> Any:
    """Wait until `find` finds something while a process lives."""
    deadline = time.monotonic() + 600
    while not (found := find()):
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def endlex(*words: object) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "endlex", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def end_shipper(directory: Path) -> None:
    """End the process that would send for as long as it takes."""
    assert stop_shipper(directory)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def saved_names(home: Home, run: str) -> list[str]:
    return [r["name"] for r in records_of(home, run) if r["type"] == "checkpoint"]


@pytest.mark.slow
def test_a_machine_that_dies_leaves_all_on_the_server_and_another_goes_on_bit_for_bit(
    tiny_home: Any,
    launch: Launch,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    assert_same_run: Callable[..., None],
) -> None:
    run = {"num_iterations": 40, "save_every": 10, "eval_every": 20, "sample_every": 20}
    assert tiny_home.pretrain(**run, model_tag="whole") == 0
    monkeypatch.setenv("ENDLEX_URL", server)
    words = tiny_home.pretrain_words(**run, model_tag="killed", keep_last=1)
    child = launch(words)
    child.wait_for(lambda: "step_000020" in saved_names(tiny_home, "killed"))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    directory = tiny_home.run_dir("killed")
    assert endlex("sync", directory)[0] == 0
    status, said = endlex("verify", directory)
    assert (status, said.splitlines()[-1]) == (0, "safe to tear down")

    identity = json.loads((directory / "run.json").read_text())["run"]
    listed = get(f"{server}/api/v1/runs/{identity}/checkpoints")
    kept = {c["name"]: c for c in listed if c["state"] == "published"}
    assert len(kept) == 2, "the tokenizer, and the last checkpoint in place of those before"
    (last,) = kept.keys() - {"tokenizer"}
    assert kept[last]["step"] >= 20

    new = type(tiny_home)(tmp_path / "new machine")
    for name in ("data", "cache"):  # what anybody can make again
        shutil.copytree(tiny_home.root / name, new.root / name)
    place = new.checkpoint_dir("base", "killed") / last
    for what, where in (("last", place), ("tokenizer", new.tokenizer_dir("tiny"))):
        status, said = endlex("pull", f"{identity}@{what}", where)
        assert status == 0, said
    monkeypatch.setenv("ARCHERCHAT_HOME", str(new.root))
    assert launch(words).wait() == 0

    assert_same_run(tiny_home.checkpoint_dir("base", "whole"), place.parent, 40)
    status, said = endlex("sync", new.run_dir("killed"))
    assert status == 0, said
    for home in (tiny_home, new):  # the old machine's last checkpoint made room for the new one's
        status, said = endlex("verify", home.run_dir("killed"))
        assert (status, said.splitlines()[-1]) == (0, "safe to tear down"), said
    found = get(f"{server}/api/v1/runs/{identity}")
    trainers = [s["status"] for s in found["sessions"] if s["kind"] == "trainer"]
    assert sorted(trainers) == ["crashed", "finished"]
    losses = get(f"{server}/api/v1/runs/{identity}/series?metric=train/loss")["series"]
    assert losses["train/loss"]["x"] == list(range(40))
    whole = [r["values"]["train/loss"] for r in records_of(tiny_home, "whole") if is_step(r)]
    assert losses["train/loss"]["y"] == pytest.approx(whole, rel=1e-8)
    assert get(f"{server}/api/v1/runs")["total"] == 1


def is_step(record: dict[str, Any]) -> bool:
    return "train/loss" in record.get("values", {})


@pytest.mark.slow
def test_ctrl_c_with_a_server_ends_as_interrupted_with_its_checkpoint_there(
    tiny_home: Any, launch: Launch, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDLEX_URL", server)
    run = {"num_iterations": 4000, "save_every": None, "eval_every": None, "sample_every": None}
    child = launch(tiny_home.pretrain_words(**run, push_checkpoints="all"))
    child.wait_for(lambda: any(map(is_step, records_of(tiny_home, "tiny"))))
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130, child.output()
    directory = tiny_home.run_dir("tiny")
    assert endlex("sync", directory)[0] == 0
    assert endlex("verify", directory)[0] == 0
    identity = json.loads((directory / "run.json").read_text())["run"]
    found = get(f"{server}/api/v1/runs/{identity}")
    assert [s["status"] for s in found["sessions"] if s["kind"] == "trainer"] == ["interrupted"]
    (step,) = tiny_home.steps()
    names = {c["name"] for c in found["checkpoints"]}
    assert names == {"tokenizer", f"step_{step:06d}"}
