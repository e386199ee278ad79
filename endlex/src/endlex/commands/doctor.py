"""`endlex doctor`: look at everything that can be wrong, and name the remedy of what is.

Each check is one line: ok, a note (works, but less), or a fault (exit status 1).
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import endlex
from endlex.api import Api
from endlex.client.directories import runs_folder, server_token, server_url
from endlex.client.process import describe
from endlex.client.shipper.control import read_state, shipper_process, sync_command
from endlex.client.transport import Refused, TransportError
from endlex.client.verify import compare_directory
from endlex.commands.rendering import count, format_bytes, print_json, printable
from endlex.commands.targets import local_runs
from endlex.protocol import PROTOCOL, EndlexError
from endlex.reading import summarize

LITTLE_SPACE = 2 * 2**30
CLOCK_SECONDS = 5.0
LIBRARIES = {
    "system": ("psutil pynvml", "some figures of this machine are not recorded"),
    "watch": ("plotext", "`endlex watch` prints lines only"),
    "import": ("wandb tensorboard pyarrow", "not every tool's runs can be imported"),
    "server": ("fastapi uvicorn sse_starlette orjson numpy pyarrow", "`endlex serve` cannot run"),
}
"""By extra: its modules, and what is missing without them."""


Finding = tuple[str, str, str]
"""A state (ok, note or fault), what was checked, and a message."""


def doctor(directories: Sequence[str], url: str | None, as_json: bool) -> int:
    """Run every check; 1 when one of them found a fault."""
    findings = [*_installation(), *_server(url), *_journals(directories, url)]
    if as_json:
        print_json([dict(zip(("state", "check", "message"), f, strict=True)) for f in findings])
    else:
        for state, check, message in findings:
            print(f"{state:5}  {check:10}  {printable(message)}")
    return 1 if any(state == "fault" for state, _, _ in findings) else 0


def _installation() -> Iterator[Finding]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "ok", "version", f"endlex {endlex.__version__}, protocol {PROTOCOL}; {python}"
    for extra, (modules, without) in LIBRARIES.items():
        absent = [name for name in modules.split() if importlib.util.find_spec(name) is None]
        if absent:
            lacking = ", ".join(absent).replace("pynvml", "nvidia-ml-py")
            yield "note", extra, f"no {lacking}: {without}; pip install 'endlex[{extra}]'"
            continue
        yield "ok", extra, "its packages are here"
        is_server = extra == "server" and importlib.util.find_spec("endlex.server")
        pages = "endlex.server.web.pages"
        if is_server and (assets := importlib.import_module(pages).missing_assets()):
            lacking = f"the dashboard's charts lack {', '.join(assets)}"
            remedy = "where the build can reach npm's registry, or from a wheel"
            yield "fault", "server", f"{lacking}: install endlex again {remedy}"


def _server(url: str | None) -> Iterator[Finding]:
    if not (url or server_url()):
        said = "none is set (ENDLEX_URL): runs stay on this machine until `endlex sync`"
        yield "note", "server", said
        return
    try:
        server = Api(url, read_only=False)
        before = time.time()
        answer = server.transport.request("GET", "/health")
        after = time.time()
    except EndlexError as error:
        yield "fault", "server", str(error)
        return
    health = answer.content if isinstance(answer.content, dict) else {}
    theirs, free = health.get("protocol"), health.get("disk_free_bytes", 0)
    if theirs is None:
        yield "fault", "server", f"{server.url} answers, but not as an Endlex server"
    elif theirs != PROTOCOL:
        said = f"{server.url} speaks protocol {theirs}, and this side {PROTOCOL}"
        yield "fault", "server", f"{said}: upgrade the older side"
    else:
        yield "ok", "server", f"{server.url}, endlex {health.get('version')}"
        yield _space("server", free, "on the server's disk", "free some with `endlex prune`")
        yield _clock(answer.date, before, after)
        yield _scopes(server)


def _space(check: str, free: int, where: str, remedy: str) -> Finding:
    said = f"{format_bytes(free)} free {where}"
    return ("ok", check, said) if free >= LITTLE_SPACE else ("fault", check, f"{said}: {remedy}")


def _clock(date: str | None, before: float, after: float) -> Finding:
    """Compare clocks by the answer's Date header, which counts whole seconds."""
    if not date:
        return "note", "clock", "the server's answer has no date to compare with"
    said = parsedate_to_datetime(date).timestamp()
    apart = max(0.0, said - after, before - said - 1)
    if apart <= CLOCK_SECONDS:
        return "ok", "clock", "equal to the server's"
    where = "times on charts are this machine's; nothing else depends on them"
    return "note", "clock", f"this machine's and the server's are {apart:,.0f} s apart: {where}"


def _scopes(server: Api) -> Finding:
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
    for scope, question in questions.items():
        try:
            server.send(*question)
        except Refused as error:
            if error.status in (401, 403):
                continue
        except EndlexError as error:
            return "fault", "token", str(error)
        allowed.append(scope)
    given = "the token" if server_token() else "no token is set, and without one this machine"
    if not allowed:
        remedy = "set ENDLEX_TOKEN or ~/.config/endlex/token to one from `endlex token create`"
        return "fault", "token", f"{given} may do nothing there: {remedy}"
    said = f"{given} may {', '.join(allowed)}"
    if lacking := [scope for scope in ("write", "checkpoint") if scope not in allowed]:
        needs = "a box that trains needs write and checkpoint"
        return "note", "token", f"{said}, not {', '.join(lacking)}: {needs}"
    return "ok", "token", said


def _journals(directories: Sequence[str], url: str | None) -> Iterator[Finding]:
    folder = runs_folder().absolute()
    while not folder.exists():
        folder = folder.parent
    remedy = "journals and checkpoints need more; free some, or set ENDLEX_DIR"
    yield _space("disk", shutil.disk_usage(folder).free, f"in {folder}", remedy)
    known = local_runs(directories)
    for directory in known.found:
        try:
            for session in summarize(directory)["sessions"]:
                if session["damaged_lines"]:
                    lines = count(session["damaged_lines"], "damaged line")
                    what = f"session {session['session']} of {directory} has {lines}"
                    remedy = "the disk may be failing; the rest is sent all the same"
                    yield "fault", "journals", f"{what}: {remedy}"
            state, said = _sending(directory, url)
            yield state, "journals", f"{directory}: {said}"
        except (EndlexError, OSError) as error:
            yield "fault", "journals", str(error)
    state = "fault" if known.unreadable else "ok"
    yield state, "journals", "; ".join(str(known).splitlines())


def _sending(directory: Path, url: str | None) -> tuple[str, str]:
    """Say whether one run's directory is sent, and who sends it."""
    if shipper := shipper_process(directory):
        said = f"its shipper, {describe(shipper.name)}, sends it"
        error = read_state(directory).get("error")
        return ("fault", f"{said}: it says: {error}") if error else ("ok", said)
    try:
        missing = compare_directory(directory, Api(url).transport).missing
    except TransportError:
        return "note", "cannot be compared with the server now"
    except EndlexError as reason:
        return "note", f"not compared with a server: {reason}"
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return "note", f"{missing[0]}{more}: {sync_command(directory)}"
    return "ok", "all of it is on the server"
