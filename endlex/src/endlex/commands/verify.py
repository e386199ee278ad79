"""`endlex verify`: may this machine be torn down?

The answer is yes only when the server was asked just now and holds, with equal SHA-256, every byte
of every journal and every checkpoint that was saved, and nothing is at work here that could add to
them. Everything else, an unreachable server too, is a no, with what is missing and the command
that sends it. A checkpoint that the server published and that a rule or a person removed is named,
and no loss; one that it published and knows nothing of any more is. Endlex cannot compare files
that it was never given, so a run without any checkpoint on the server gets a warning.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from endlex.api import Api
from endlex.client.directories import RunFile, runs_folder
from endlex.client.shipper.control import BACKGROUND, read_state, shipper_process
from endlex.client.transport import Transport
from endlex.client.verify import Comparison, compare_directory
from endlex.commands.rendering import count, format_age, format_bytes, print_json, printable
from endlex.commands.targets import local_runs
from endlex.protocol import SYSTEM, EndlexError, UsageError
from endlex.reading import content_length, session_files, session_kind, writer_is_alive

SHIPPER_SECONDS = 10.0
NAMED = 5
"""Checkpoints that went for one reason and are named; the others are counted."""

REMEDIES = {
    "wait": "something is still at work: end it, or wait for it, and verify again",
    "restore": "the server does not have what was published once: is it the right one? If it is, "
    "restore its data, or `endlex push` the files again under the same name",
    "look": "what a damaged line of a journal names cannot be compared: look at the line, and at "
    "the run on the server, before you delete anything",
}
"""What to do where no `endlex sync` helps."""

Verdict = dict[str, Any]
"""What was found about one run's directory, as `--json` prints it."""


def verify(runs: Sequence[str], url: str | None, as_json: bool) -> int:
    """Print the verdict; 0 only when everything that was asked about is safe."""
    known = local_runs(runs)
    if not known.found and not known.unreadable:
        raise UsageError(
            f"{known}: none in {runs_folder()} (ENDLEX_DIR), and none in the list that endlex.init "
            "keeps; give a run's directory"
        )
    transport, no_server = None, None
    try:
        transport = Api(url).transport
    except EndlexError as error:
        no_server = str(error)
    verdicts = [_judge(*run, transport, no_server) for run in known.found.items()]
    unsafe = [verdict for verdict in verdicts if not verdict["safe"]]
    safe = not unsafe and not known.unreadable
    if as_json:
        unreadable = {str(place): why for place, why in known.unreadable.items()}
        gone = list(map(str, known.gone))
        print_json({"safe": safe, "runs": verdicts, "gone": gone, "unreadable": unreadable})
    else:
        for verdict in verdicts:
            _print(verdict, transport.url if transport else "")
        if not runs or known.unreadable:
            print(known)
        bare = [_name(verdict) for verdict in verdicts if verdict["no_checkpoint"]]
        names = ", ".join(bare[:NAMED]) + (f" and {len(bare) - NAMED} more" if bare[NAMED:] else "")
        if_no_model = f" if you need no model of {names}" if bare else ""
        print(f"safe to tear down{if_no_model}" if safe else "NOT safe to tear down")
        _print_remedy(unsafe, url)
    return 0 if safe else 1


def _judge(place: Path, owner: RunFile, server: Transport | None, error: str | None) -> Verdict:
    found, size, paths = Comparison(), 0, session_files(place)
    if server is not None:
        try:
            size = sum(content_length(path) for path in paths)
            _wait_for_shipper(place)
            found = compare_directory(place, server)
        except (EndlexError, OSError) as fault:
            error = str(fault)
    return {
        "directory": str(place),
        "project": owner["project"],
        "name": owner["name"],
        "journals": len(paths),
        "bytes": size,
        "safe": not found.missing and error is None,
        **asdict(found),
        "error": error,
    }


def _wait_for_shipper(directory: Path) -> None:
    """Give a shipper whose trainer is gone the moment that it needs to end by itself."""
    deadline = time.monotonic() + SHIPPER_SECONDS
    while time.monotonic() < deadline:
        shipper = shipper_process(directory)
        if shipper is None or shipper.kind != BACKGROUND or read_state(directory).get("error"):
            return
        trainers = [path for path in session_files(directory) if session_kind(path) != SYSTEM]
        if any(writer_is_alive(path) for path in trainers):
            return
        time.sleep(0.1)


def _name(verdict: Verdict) -> str:
    return f"{printable(verdict['project'])}/{printable(verdict['name'])}"


def _print(verdict: Verdict, url: str) -> None:
    print(f"{verdict['directory']}  ({_name(verdict)})")
    if verdict["safe"]:
        held = f"{count(verdict['journals'], 'journal')}, {format_bytes(verdict['bytes'])}"
        if not verdict["no_checkpoint"]:
            held += " and every checkpoint" + (" that is kept" if verdict["let_go"] else "")
        print(f"  {held}: the same on {url}")
    if verdict["safe"] and verdict["no_checkpoint"]:
        push = ("endlex", "push", "PATH", "--run", verdict["directory"], "--url", url)
        print(
            f"  warning: no checkpoint of run {_name(verdict)} is on the server. A model that is "
            f"saved only on this machine would be lost. To send one: {shlex.join(push)}"
        )
    for reason in dict.fromkeys(one["reason"] for one in verdict["let_go"]):
        gone = [one for one in verdict["let_go"] if one["reason"] == reason]
        names = ", ".join(printable(one["name"]) for one in gone[:NAMED])
        names += f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        when = format_age(max(one["removed"] for one in gone))
        print(
            f"  no longer on the server, on purpose ({printable(reason)}, {when}): "
            f"{count(len(gone), 'checkpoint')}: {names}"
        )
    if verdict["given_up"]:
        names = ", ".join(map(printable, verdict["given_up"]))
        print(f"  given up here, since it could not be sent: {names}")
    if verdict["error"] is not None:
        print(f"  nothing was compared: {printable(verdict['error'])}")
    for missing in verdict["missing"]:
        print("  " + printable(f"{missing['kind']} {missing['name']}: {missing['reason']}"))


def _print_remedy(unsafe: Sequence[Verdict], url: str | None) -> None:
    """Name the command that sends what is missing, or what to wait for."""
    sync = f"endlex sync{f' --url {shlex.quote(url)}' if url else ''}"

    def places(*remedies: str) -> str:
        """Return the directories where one of these helps."""
        return shlex.join(
            verdict["directory"]
            for verdict in unsafe
            if any(missing["remedy"] in remedies for missing in verdict["missing"])
            or (verdict["error"] is not None and "sync" in remedies)
        )

    for remedy, text in REMEDIES.items():
        if places(remedy):
            print(text)
    if hopeless := places("drop"):
        lost = "what cannot be sent: save it again, then give up the old one with"
        print(f"{lost}: {sync} {hopeless} --drop-failed")
    if unsent := places("sync", "resend"):
        resend = " --resend" if places("resend") else ""
        print(f"send what is missing with: {sync}{resend} {unsent}")
