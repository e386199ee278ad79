"""`endlex doctor`: look at everything that can be wrong, and name the remedy of what is.

Each check is one line: ok, a note (works, but less), or a fault (exit status 1).
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from endlex.api import Api
from endlex.client.directories import runs_folder, server_token, server_url
from endlex.client.process import describe
from endlex.client.shipper.control import read_state, shipper_process, sync_command
from endlex.client.transport import Refused, TransportError
from endlex.client.verify import compare_directory
from endlex.commands.rendering import count, format_bytes, print_json, printable
from endlex.commands.targets import find_server, local_runs
from endlex.protocol import PROTOCOL, EndlexError
from endlex.reading import summarize

LITTLE_SPACE = 2 * 2**30
CLOCK_SECONDS = 5.0
LIBRARIES: dict[str, tuple[dict[str, str], str]] = {
    "system": (
        {"psutil": "psutil", "pynvml": "nvidia-ml-py"},
        "some figures of this machine are not recorded",
    ),
    "watch": ({"plotext": "plotext"}, "`endlex watch` prints lines only"),
    "import": (
        {"wandb": "wandb", "tensorboard": "tensorboard", "pyarrow": "pyarrow"},
        "not every tool's runs can be imported",
    ),
    "server": (
        {
            name: name
            for name in ("fastapi", "uvicorn", "sse_starlette", "orjson", "numpy", "pyarrow")
        },
        "this machine cannot be the server",
    ),
}
"""By extra: its packages by module, and what is missing without them."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    state: Literal["ok", "note", "fault"]
    check: str
    message: str


def finding(check: str, good: bool, message: str, remedy: str = "") -> Finding:
    """Return what a check found, with the remedy if something is not good."""
    if good:
        return Finding("ok", check, message)
    return Finding("fault", check, f"{message}: {remedy}" if remedy else message)


def note(check: str, message: str) -> Finding:
    """Return what works, but less."""
    return Finding("note", check, message)


def doctor(directories: Sequence[str], url: str | None, as_json: bool) -> int:
    """Run every check; 1 when one of them found a fault."""
    findings = [_versions(), *_libraries(), *_server(url), _disk(), *_journals(directories, url)]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:5}  {finding.check:10}  {printable(finding.message)}")
    return 1 if any(finding.state == "fault" for finding in findings) else 0


def _versions() -> Finding:
    try:
        version = metadata.version("endlex")
    except metadata.PackageNotFoundError:
        version = "not installed as a package"
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("ok", "version", f"endlex {version}, protocol {PROTOCOL}; {python}")


def _libraries() -> Iterator[Finding]:
    here = []
    for extra, (libraries, without) in LIBRARIES.items():
        absent = [name for name in libraries if importlib.util.find_spec(name) is None]
        if absent:
            lacking = ", ".join(libraries[name] for name in absent)
            yield note(extra, f"no {lacking}: {without}; pip install 'endlex[{extra}]'")
        else:
            here.append(extra)
            yield Finding("ok", extra, "its packages are here")
    if "server" in here and importlib.util.find_spec("endlex.server") is not None:
        assets = importlib.import_module("endlex.server.web.pages").missing_assets()
        if assets:
            yield Finding(
                "fault",
                "server",
                f"the dashboard's charts lack {', '.join(assets)}: install endlex again where the "
                "build can reach npm's registry, or from a wheel",
            )


def _server(url: str | None) -> Iterator[Finding]:
    if not (url or server_url()):
        yield note(
            "server", "none is set (ENDLEX_URL): runs stay on this machine until `endlex sync`"
        )
        return
    try:
        server = find_server(url)
        before = time.time()
        answer = server.transport.request("GET", "/health")
        after = time.time()
    except EndlexError as error:
        yield Finding("fault", "server", str(error))
        return
    health = answer.content if isinstance(answer.content, dict) else {}
    if (theirs := health.get("protocol")) != PROTOCOL:
        said = f"{server.url} answers, but not as an Endlex server"
        if theirs is not None:
            said = f"{server.url} speaks protocol {theirs}, and this side {PROTOCOL}"
            said += ": upgrade the older side"
        yield Finding("fault", "server", said)
        return
    yield Finding("ok", "server", f"{server.url}, endlex {health.get('version')}")
    free = int(health.get("disk_free_bytes", 0))
    said = f"{format_bytes(free)} free on the server's disk"
    yield finding("server", free > LITTLE_SPACE, said, "free some with `endlex prune`")
    yield _clock(answer.date, before, after)
    yield from _scopes(server)


def _clock(date: str | None, before: float, after: float) -> Finding:
    """Compare clocks by the answer's Date header, which counts whole seconds."""
    if not date:
        return note("clock", "the server's answer has no date to compare with")
    said = parsedate_to_datetime(date).timestamp()
    apart = max(0.0, said - after, before - said - 1)
    if apart <= CLOCK_SECONDS:
        return Finding("ok", "clock", "equal to the server's")
    return note(
        "clock",
        f"this machine's and the server's are {apart:,.0f} s apart: "
        "times on charts are this machine's; nothing else depends on them",
    )


def _scopes(server: Api) -> Iterator[Finding]:
    """Find out what the token may do by asking for things that change nothing."""
    nobody = "0" * 10
    questions: dict[str, tuple[str, str, Any]] = {
        "write": ("GET", f"/runs/{nobody}/sessions/0/journal?upto=0", None),
        "checkpoint": ("POST", "/parts/missing", {"parts": []}),
        "read": ("GET", "/runs?limit=1", None),
        "annotate": ("PATCH", f"/runs/{nobody}", {"archived": False}),
        "manage": ("POST", "/prune", {"run": nobody, "keep_last": 1, "dry_run": True}),
    }
    allowed = []
    for scope, (method, path, body) in questions.items():
        try:
            server.send(method, path, body)
        except Refused as error:
            if error.status in (401, 403):
                continue
        except EndlexError as error:
            yield Finding("fault", "token", str(error))
            return
        allowed.append(scope)
    given = "the token" if server_token() else "no token is set, and without one this machine"
    lacking = [scope for scope in ("write", "checkpoint") if scope not in allowed]
    if not allowed:
        said = f"{given} may do nothing there"
        remedy = "set ENDLEX_TOKEN or ~/.config/endlex/token to one from `endlex token create`"
        yield finding("token", False, said, remedy)
    elif lacking:
        said = f"{given} may {', '.join(allowed)}, not {', '.join(lacking)}"
        yield note("token", f"{said}: a box that trains needs write and checkpoint")
    else:
        yield Finding("ok", "token", f"{given} may {', '.join(allowed)}")


def _disk() -> Finding:
    folder = runs_folder().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    remedy = "journals and checkpoints need more; free some, or set ENDLEX_DIR"
    said = f"{format_bytes(free)} free in {folder}"
    return finding("disk", free >= LITTLE_SPACE, said, remedy)


def _journals(directories: Sequence[str], url: str | None) -> Iterator[Finding]:
    known = local_runs(directories)
    for directory in known.found:
        try:
            yield from _damage(directory)
            yield _sending(directory, url)
        except (EndlexError, OSError) as error:
            yield Finding("fault", "journals", str(error))
    yield finding("journals", not known.unreadable, "; ".join(str(known).splitlines()))


def _damage(directory: Path) -> Iterator[Finding]:
    for session in summarize(directory)["sessions"]:
        if session["damaged_lines"]:
            lines = count(session["damaged_lines"], "damaged line")
            what = f"session {session['session']} of {directory} has {lines}"
            remedy = "the disk may be failing; the rest is sent all the same"
            yield finding("journals", False, what, remedy)


def _sending(directory: Path, url: str | None) -> Finding:
    """Say whether one run's directory is sent, and who sends it."""
    shipper = shipper_process(directory)
    if shipper is not None:
        error = read_state(directory).get("error")
        said = f"{directory}: its shipper, {describe(shipper.name)}, sends it"
        return finding("journals", not error, said, f"it says: {error}")
    try:
        missing = compare_directory(directory, find_server(url).transport).missing
    except TransportError:
        return note("journals", f"{directory}: cannot be compared with the server now")
    except EndlexError as reason:
        return note("journals", f"{directory}: not compared with a server: {reason}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return note("journals", f"{directory}: {missing[0]}{more}: {sync_command(directory)}")
    return Finding("ok", "journals", f"{directory}: all of it is on the server")
