"""The promise: exit status 0 only when the server holds everything, just now, by hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client import checkpoints
from endlex.client.directories import read_run_file
from endlex.client.shipper.control import unsent
from endlex.client.transport import Answer, Transport
from endlex.reading import session_files


def test_what_is_not_sent_is_not_safe_and_named(cli: Any, train: Any, online: str) -> None:
    directory = train(save=b"weights")
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "NOT safe to tear down" in out
    assert session_files(directory)[0].stem in out
    assert "checkpoint step-5: not sent yet" in out
    assert f"endlex sync {directory}" in out


def test_the_command_that_it_names_makes_it_safe(cli: Any, train: Any, online: str) -> None:
    directory = train(save=b"weights")
    _, out, _ = cli("verify", directory)
    command = out.rpartition("endlex ")[2].split()
    assert cli(*command)[0] == 0
    status, out, _ = cli("verify", directory)
    assert (status, out.splitlines()[-1]) == (0, "safe to tear down")


def test_a_run_without_a_checkpoint_on_the_server_gets_a_warning(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    directory = train("bare")
    assert cli("sync", directory)[0] == 0
    status, out, _ = cli("verify", directory)
    last = out.splitlines()[-1]
    assert (status, last) == (0, "safe to tear down if you need no model of demo/bare")
    assert "every checkpoint" not in out
    assert "no checkpoint of run demo/bare is on the server" in out
    assert json.loads(cli("verify", directory, "--json")[1])["runs"][0]["no_checkpoint"]

    (place / "model.bin").write_bytes(b"weights")
    command = out.partition("endlex ")[2].splitlines()[0].replace("PATH", "model.bin")
    assert cli(*command.split())[0] == 0
    status, out, _ = cli("verify", directory)
    assert (status, out.splitlines()[-1]) == (0, "safe to tear down")
    assert "and every checkpoint: the same" in out
    assert not json.loads(cli("verify", directory, "--json")[1])["runs"][0]["no_checkpoint"]


def test_no_server_is_not_safe(cli: Any, train: Any) -> None:
    directory = train()
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "no server is known" in out
    assert "NOT safe to tear down" in out


def test_an_unreachable_server_is_not_safe(cli: Any, train: Any, online: str) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    status, out, _ = cli("verify", directory, "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "cannot reach http://127.0.0.1:1" in out
    assert "endlex serve" in out


def test_a_record_more_is_not_safe(cli: Any, train: Any, online: str) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    (path,) = session_files(directory)
    with path.open("ab") as file:
        file.write(b'{"type":"metrics"}\n')
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "19 bytes are not sent" in out


def test_one_changed_byte_is_not_safe(cli: Any, train: Any, online: str) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    (path,) = session_files(directory)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "differs" in out


def test_a_live_trainer_is_not_safe(cli: Any, train: Any, online: str) -> None:
    run = endlex.init("demo", "alive", mode="offline")
    run.log({"loss": 1.0}, step=0)
    assert cli("sync", run.directory)[0] == 0
    status, out, _ = cli("verify", run.directory)
    assert status == 1
    assert "a process still writes this session" in out
    assert "wait for it" in out
    assert "endlex sync" not in out  # nothing is left to send
    run.finish()


def test_all_runs_here_are_meant_without_a_word(cli: Any, train: Any, online: str) -> None:
    sent, unsent = train("sent"), train("unsent")
    assert cli("sync", sent)[0] == 0
    status, out, _ = cli("verify", "--json")
    verdict = json.loads(out)
    assert status == 1
    assert not verdict["safe"]
    assert {str(Path(r["directory"]).resolve()): r["safe"] for r in verdict["runs"]} == {
        str(sent): True,
        str(unsent): False,
    }
    assert cli("sync", "endlex-runs")[0] == 0
    assert cli("verify")[0] == 0


def test_a_run_here_goes_by_id_and_name_too(cli: Any, train: Any, online: str) -> None:
    directory = train("by-name")
    owner = read_run_file(directory)
    assert owner is not None
    assert cli("sync", directory)[0] == 0
    for word in ("by-name", "demo/by-name", owner["run"]):
        assert cli("verify", word)[0] == 0
    train("by-name")
    status, _, err = cli("verify", "by-name")
    assert status == 1
    assert "2 runs here" in err


def test_what_is_not_here_is_wrong_usage(cli: Any, place: Path, online: str) -> None:
    status, _, err = cli("verify", "nowhere")
    assert status == 2
    assert "'nowhere' is no run's directory" in err
    status, _, err = cli("verify")
    assert status == 2
    assert "ENDLEX_DIR" in err


def test_verify_right_after_the_trainer_waits_for_its_shipper_to_end(
    cli: Any, online: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endlex.commands.verify.SHIPPER_SECONDS", 120.0)  # a busy machine
    with endlex.init("demo", "at-once") as run:
        run.log({"loss": 1.0})
        (place / "w.bin").write_bytes(b"weights")
        run.save("w.bin")
    status, out, _ = cli("verify", run.directory)
    # That is said only where no shipper is at work. Whether one is by now is another question: on a
    # slow machine the run's end may have started a second one, which looks around and ends.
    assert (status, out.splitlines()[-1]) == (0, "safe to tear down")


def test_what_a_rule_removed_on_the_server_is_named_and_no_loss(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    directory = train("pruned", save=b"first")
    owner = read_run_file(directory)
    assert owner is not None
    assert cli("sync", directory)[0] == 0
    later = place / "later.bin"
    later.write_bytes(b"second")
    assert cli("push", later, "--run", owner["run"], "--step", 9)[0] == 0
    assert cli("prune", "--run", owner["run"], "--keep-last", 1, "--yes")[0] == 0
    status, out, _ = cli("verify", directory)
    assert status == 0
    assert "on purpose (pruned by keep-last 1, now): 1 checkpoint: step-5" in out
    (verdict,) = json.loads(cli("verify", directory, "--json")[1])["runs"]
    assert [gone["reason"] for gone in verdict["let_go"]] == ["pruned by keep-last 1"]
    assert cli("doctor", directory)[1].count("all of it is on the server") == 1
    assert cli("pull", f"{owner['run']}@step-5", "out")[0] == 1  # it is in no list


def test_what_the_server_lost_is_missing(
    cli: Any, train: Any, server: str, online: str, tmp_path: Path
) -> None:
    directory = train("lost", save=b"weights")
    assert cli("sync", directory)[0] == 0
    kept = directory / "manifests" / "step-5.json"
    kept.rename(kept.with_name("other.json"))  # published once, as far as this side knows
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "checkpoint other: the server has no checkpoint 'other'" in out
    assert "though it was published there once" in out
    assert "does not have what was published once" in out
    assert "endlex sync" not in out  # which has nothing to send


def test_other_files_under_a_removed_name_are_no_copy(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    directory = train("other-files", save=b"first")
    owner = read_run_file(directory)
    assert owner is not None
    assert cli("sync", directory)[0] == 0
    (place / "later.bin").write_bytes(b"second")
    assert cli("push", "later.bin", "--run", owner["run"], "--step", 9)[0] == 0
    assert cli("prune", "--run", owner["run"], "--keep-last", 1, "--yes")[0] == 0
    kept = directory / "manifests" / "step-5.json"
    manifest = json.loads(kept.read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    kept.write_text(json.dumps(manifest))
    status, out, _ = cli("verify", directory)
    assert status == 1
    assert "the server's files differ" in out


def test_a_checkpoint_that_can_never_be_sent_is_named_and_may_be_given_up(
    cli: Any, train: Any, online: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    run = endlex.init("demo", "rewritten", mode="offline")
    (place / "last.pt").write_bytes(b"first")
    run.save("last.pt", step=1, name="first", link=True)
    (place / "last.pt").write_bytes(b"second, over the first")
    run.finish()
    for _ in range(2):  # before it was tried, and after
        status, out, _ = cli("verify", run.directory)
        assert status == 1
        assert "checkpoint first: it cannot be sent: " in out
        assert f"endlex sync {run.directory} --drop-failed" in out
        assert cli("sync", run.directory)[0] == 1
    assert not any(unsent(run.directory))  # type: ignore[arg-type]
    assert cli("sync", "--drop-failed", run.directory)[0] == 0
    status, out, _ = cli("verify", run.directory)
    no_model = "safe to tear down if you need no model of demo/rewritten"
    assert (status, out.splitlines()[-1]) == (0, no_model)
    assert "given up here, since it could not be sent: first" in out
    again = endlex.init("demo", directory=run.directory, mode="offline")
    assert again.save("last.pt", step=1, name="first") == "first-2"  # nothing hides behind the name
    again.finish()
    assert cli("verify", run.directory)[0] == 1


def test_without_arguments_every_run_of_the_machine_counts(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    assert cli("sync", train("sent"))[0] == 0
    elsewhere = train("unsent", directory=place.parent / "elsewhere" / "run")
    status, out, _ = cli("verify")
    assert status == 1
    assert "looked at 2 runs" in out
    assert f"send what is missing with: endlex sync {elsewhere}" in out
    assert len(json.loads(cli("ls", "--local", "--json")[1])) == 2
    assert str(elsewhere) in cli("doctor")[1]
    assert cli("sync")[0] == 0
    assert cli("verify")[0] == 0
    assert cli("verify", "unsent")[0] == 0  # found by its name


def test_what_is_gone_is_named_and_what_cannot_be_read_is_not_safe(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    here, gone, broken = (train(name, directory=place / name) for name in ("a", "b", "c"))
    assert cli("sync")[0] == 0
    gone.rename(place / "moved")
    status, out, _ = cli("verify")
    assert (status, f"1 gone (deleted, or not mounted): {gone}" in out) == (0, True)
    (broken / "run.json").write_text("{")
    status, out, _ = cli("verify")
    assert status == 1
    assert f"cannot read {broken}" in out
    found = json.loads(cli("verify", "--json")[1])
    assert (found["safe"], found["gone"]) == (False, [str(gone)])
    assert list(found["unreadable"]) == [str(broken)]
    assert [run["directory"] for run in found["runs"]] == [str(here)]
    assert cli("sync")[0] == 1


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("media", b'"parts":[', b'"parts":{'),
        ("media", b'"name":', b'"nome":'),
        ("checkpoint", b'{"type":"checkpoint"', b'{"tXpe":"checkpoint"'),
        ("checkpoint", b'"time":', b'"tine":'),
    ],
)
def test_a_damaged_line_may_hide_something_so_the_answer_is_no(
    cli: Any, place: Path, online: str, kind: str, old: bytes, new: bytes
) -> None:
    run = endlex.init("demo", "damaged", mode="offline")
    (place / "a.txt").write_bytes(b"a")
    run.log_file("a", place / "a.txt", step=1)
    run.save(place / "a.txt", step=1)
    run.finish()
    assert run.directory is not None
    (path,) = session_files(run.directory)
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(
        i for i, line in enumerate(lines) if line.startswith(b'{"type":"%s"' % kind.encode())
    )
    lines[number] = lines[number].replace(old, new)
    path.write_bytes(b"".join(lines))
    if kind == "media":
        status, out, _ = cli("verify", run.directory)
        assert (status, "not sent yet" in out) == (1, True)
    assert cli("sync", run.directory)[0] == 1
    status, out, _ = cli("verify", run.directory)
    assert status == 1
    assert f"journal {path.stem}: line {number + 1} is damaged" in out
    assert "look at the line" in out
    assert "endlex sync" not in out


STRANGE = "does not answer like an Endlex server"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, STRANGE),
        ({"state": "published"}, STRANGE),
        (7, STRANGE),
        ({"state": "published", "created": 9e9, "metadata": None}, "is 'failed', not published"),
    ],
)
def test_a_server_that_answers_nonsense_is_a_no_in_words(
    cli: Any, place: Path, online: str, monkeypatch: pytest.MonkeyPatch, entry: Any, said: str
) -> None:
    run = endlex.init("demo", "nonsense", mode="offline")
    (place / "a.txt").write_bytes(b"a")
    name = run.save(place / "a.txt", step=1, replaces="last")
    run.finish()
    assert run.directory is not None
    assert cli("sync", run.directory)[0] == 0
    ask = Transport.request

    def answer(self: Transport, method: str, path: str, **rest: Any) -> Answer:
        if path.endswith("/checkpoints"):
            return Answer(entry and [entry])
        if path.endswith(f"/checkpoints/{name}"):
            return Answer({"state": "failed"})
        return ask(self, method, path, **rest)

    monkeypatch.setattr(Transport, "request", answer)
    status, out, _ = cli("verify", run.directory)
    assert (status, said in out) == (1, True)
