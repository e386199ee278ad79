"""The sandbox against programs that want out: each is stopped, and nothing of it is left."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archerchat.sandbox import limits as linux
from archerchat.sandbox.executor import Isolation, SandboxResult, run_sandboxed

LINUX = sys.platform.startswith("linux")


@pytest.fixture(params=["namespaces", "fallback"])
def namespaces(request: pytest.FixtureRequest) -> bool:
    """Both ways to run: as this system can, and as on one that allows no namespaces."""
    library, root = sysconfig.get_path("stdlib"), os.geteuid() == 0
    if request.param == "fallback" and root and not linux.readable_by_all(library):
        pytest.skip(f"root cannot fall back on another user, who may not read {library}")
    return bool(request.param == "namespaces")


@pytest.fixture(scope="module")
def confined() -> None:
    """Skips where the system cannot isolate everything."""
    isolation = run_sandboxed("pass", 10).isolation
    if isolation != Isolation(network=True, processes=True, files=True):
        pytest.skip(f"this system isolates no more than {isolation}")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No directory and no child process of a sandbox outlives its call."""
    made: list[str] = []
    make: Callable[..., str] = tempfile.mkdtemp

    def record(*arguments: object, **named: object) -> str:
        made.append(make(*arguments, **named))
        return made[-1]

    monkeypatch.setattr("archerchat.sandbox.executor.tempfile.mkdtemp", record)
    before = set(linux.children(os.getpid())) if LINUX else set()
    yield
    assert not [path for path in made if "archerchat-sandbox-" in path and Path(path).exists()]
    if LINUX:
        assert set(linux.children(os.getpid())) <= before


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory where every user may read, write and delete."""
    directory = Path(tempfile.mkdtemp(prefix="public-"))
    directory.chmod(0o777)
    victim = directory / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    yield directory
    shutil.rmtree(directory)


def run(
    program: str, namespaces: bool = True, timeout_s: float = 20, **limits: int
) -> SandboxResult:
    """Run a program; the call must end soon after the deadline."""
    started = time.monotonic()
    result = run_sandboxed(program, timeout_s, namespaces=namespaces, **limits)
    assert time.monotonic() - started < timeout_s + 15
    return result


def is_free(path: Path, within: float = 0.0) -> bool:
    """Say whether no process holds a lock on `path`, now or after a while."""
    deadline = time.monotonic() + within
    with path.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)


HOLD = """
import fcntl, os, time
def hold():
    file = open({path!r})
    fcntl.flock(file, fcntl.LOCK_SH)
    return file
"""


def test_a_program_runs_to_its_end(namespaces: bool) -> None:
    result = run("import sys\nprint(6 * 7)\nprint('ö', file=sys.stderr)", namespaces)
    assert result.outcome == "completed"
    assert (result.stdout, result.stderr) == ("42\n", "ö\n")
    if not namespaces:
        assert result.isolation == Isolation()


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("1 / 0", "failed"),
        ("def broken(:", "failed"),
        ("assert False", "failed"),
        ("\0", "failed"),
        ("def f(): f()\nf()", "failed"),
        ("print('\ud800')", "completed"),
        ("raise SystemExit", "exited"),
        ("import sys; sys.exit(3)", "exited"),
        ("import sys; sys.exit('no')", "exited"),
        ("import os; os._exit(0)", "exited"),
        ("import os; os.abort()", "killed"),
        ("input()", "failed"),
        ("", "completed"),
        ("import threading; threading.Thread(target=print, args=(1,)).start()", "completed"),
    ],
)
def test_how_a_program_ended_is_told(program: str, outcome: str) -> None:
    result = run(program)
    assert result.outcome == outcome


def test_an_exception_is_shown() -> None:
    assert "ZeroDivisionError: division by zero" in run("1 / 0").stderr


def test_the_deadline_holds(namespaces: bool) -> None:
    for program in ("while True: pass", "import time\ntime.sleep(100)"):
        assert run(program, namespaces, timeout_s=0.3).outcome == "timeout"


def test_what_was_said_before_the_deadline_is_kept() -> None:
    assert run("print('so far', flush=True)\nwhile True: pass", timeout_s=0.5).stdout == "so far\n"


def test_a_memory_bomb_meets_its_limit(namespaces: bool) -> None:
    assert run("x = bytearray(1 << 40)", namespaces).outcome == "memory"
    program = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert run(program, namespaces, memory_bytes=200 << 20).outcome == "memory"


def test_endless_output_is_cut_and_ended(namespaces: bool) -> None:
    for stream in ("stdout", "stderr"):
        program = f"import sys\nwhile True: sys.{stream}.write('x' * 10_000)"
        result = run(program, namespaces, max_output_bytes=5000)
        assert result.outcome == "output"
        assert len(getattr(result, stream)) == 5000
    assert run("print('x' * 1_000_000)", namespaces).outcome == "output"  # at the default limit


def test_every_codec_and_package_can_be_imported(namespaces: bool) -> None:
    """Also those of packages that were imported before the library moved."""
    program = "import importlib.resources, json.tool\nfor codec in ('ascii', 'cp437', 'idna'):\n"
    result = run(program + "    open(codec, 'w', encoding=codec).write('a')", namespaces)
    assert result.outcome == "completed", result.stderr


def test_output_up_to_the_limit_is_no_crime() -> None:
    result = run("print('x' * 4999)", max_output_bytes=5000)
    assert (result.outcome, len(result.stdout)) == ("completed", 5000)


def test_a_huge_file_meets_its_limit(namespaces: bool) -> None:
    program = "with open('huge', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
    result = run(program, namespaces, disk_bytes=4 << 20)
    assert result.outcome == "failed"
    assert "File too large" in result.stderr or "No space left" in result.stderr


def test_many_files_meet_the_directory_s_limit(confined: None) -> None:
    program = "for i in range(99): open(str(i), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(program, disk_bytes=4 << 20).stderr


@pytest.mark.parametrize(
    "program",
    [
        "while True: os.fork()",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        "def bomb():\n    while True: threading.Thread(target=bomb).start()\nbomb()",
        "while True: subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
    ],
    ids=["fork", "stubborn fork", "threads", "subprocess"],
)
def test_a_fork_bomb_dies_out(program: str, namespaces: bool, public: Path) -> None:
    hold = HOLD.format(path=str(public / "victim"))
    program = f"{hold}\nimport subprocess, sys, threading\nheld = hold()\n{program}"
    result = run(program, namespaces, timeout_s=1)
    assert result.outcome in ("failed", "exited", "timeout", "output")
    assert is_free(public / "victim")


def test_processes_are_counted(confined: None) -> None:
    program = """
import os, time
started = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        started += 1
except OSError:
    print(started)
"""
    assert run(program, max_processes=10).stdout == "9\n"


def test_writing_and_deleting_outside_fails(namespaces: bool, public: Path) -> None:
    victim = public / "victim"
    for attempt in (
        f"open({str(victim)!r}, 'w').write('gone')",
        f"open({str(public / 'new')!r}, 'x')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.mkdir({str(public / 'new')!r})",
        f"import os; os.symlink('x', {str(public / 'new')!r})",
        f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w')",
        f"import shutil; shutil.rmtree({str(public)!r})",
        f"import pathlib; pathlib.Path({str(victim)!r}).unlink()",
        "open('/archerchat-was-here', 'w')",
    ):
        assert run(attempt, namespaces).outcome == "failed", attempt
    assert [path.name for path in public.iterdir()] == ["victim"]
    assert victim.read_text() == "precious"
    assert not Path("/archerchat-was-here").exists()


def test_inside_its_directory_a_program_is_free(namespaces: bool) -> None:
    program = """
import os, shutil, tempfile
assert os.getcwd() == os.path.expanduser('~') == os.path.realpath(tempfile.gettempdir())
os.mkdir('a'); open('a/b', 'w').write('text'); os.rename('a/b', 'a/c')
assert open('a/c').read() == 'text'
shutil.rmtree('a')
with tempfile.TemporaryDirectory() as there: open(there + '/x', 'w')
"""
    result = run(program, namespaces)
    assert (result.outcome, result.stderr) == ("completed", "")


def test_there_is_no_environment(monkeypatch: pytest.MonkeyPatch, namespaces: bool) -> None:
    monkeypatch.setenv("SECRET", "42")
    result = run("import os\nprint(sorted(os.environ))", namespaces)
    assert result.stdout == "['HOME', 'TMPDIR']\n"


def test_the_outside_s_processes_are_not_to_be_seen(confined: None) -> None:
    program = "import os\nprint(sum(name.isdigit() for name in os.listdir('/proc')), os.getpid())"
    assert run(program).stdout == "2 2\n"


def test_there_is_no_way_out_to_the_network(namespaces: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)", namespaces
        )
        assert result.outcome == "failed"
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("target", ["os.getppid()", "1", "-1", "{caller}"])
def test_a_program_cannot_kill_what_is_not_its_own(target: str, namespaces: bool) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        program = f"import os\nos.kill({target.format(caller=os.getpid())}, 9)"
        assert run(program, namespaces).outcome in ("completed", "failed")
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")


BACKGROUND = """
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        held = hold()
        for descriptor in (0, 1, 2): os.close(descriptor)
        os.write(write, b'x')
        time.sleep(600)
    os._exit(0)
os.read(read, 1)
print('left it behind')
"""


def test_what_stays_behind_in_the_background_is_killed(confined: None, public: Path) -> None:
    result = run(HOLD.format(path=str(public / "victim")) + BACKGROUND)
    assert (result.outcome, result.stdout) == ("completed", "left it behind\n")
    assert is_free(public / "victim")


def test_what_stays_behind_is_killed_at_the_deadline_too(confined: None, public: Path) -> None:
    program = HOLD.format(path=str(public / "victim")) + BACKGROUND + "while True: pass"
    assert run(program, timeout_s=1).outcome == "timeout"
    assert is_free(public / "victim")


@pytest.mark.skipif(not LINUX, reason="only Linux ends children with their parent")
def test_nothing_survives_the_caller(public: Path) -> None:
    victim = public / "victim"
    program = HOLD.format(path=str(victim)) + "held = hold()\ntime.sleep(600)"
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from archerchat.sandbox.executor import run_sandboxed; "
            "run_sandboxed(sys.argv[1], 600)",
            program,
        ],
        env=os.environ | {"TMPDIR": str(public)},
    )
    deadline = time.monotonic() + 20
    while is_free(victim):
        assert caller.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert is_free(victim, within=20)
    while list(public.glob("archerchat-sandbox-*")):
        assert time.monotonic() < deadline + 20
        time.sleep(0.01)


def test_a_child_that_ends_well_does_not_speak_for_its_parent(confined: None) -> None:
    program = "import os\nif child := os.fork():\n    os.waitpid(child, 0)\n    os._exit(0)"
    assert run(program).outcome == "exited"


def test_a_program_has_no_rights_to_undo_its_walls(confined: None) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
root = os.fsencode('/')
assert libc.mount(None, root, None, 32 | 0x1000, None) == -1, 'remounted'
assert libc.umount2(b'/proc', 2) == -1, 'unmounted'
assert libc.sethostname(b'x', 1) == -1, 'renamed'
try:
    os.setuid(0)
except OSError:
    pass
else:
    raise SystemExit('became root')
print([line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')])
"""
    result = run(program)
    assert (result.stdout, result.stderr) == ("['0000000000000000']\n", "")


def test_many_sandboxes_run_at_a_time() -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: run(f"print({number} ** 2)", True, 60), range(24)))
    assert [result.stdout for result in results] == [f"{number**2}\n" for number in range(24)]
    assert {result.outcome for result in results} == {"completed"}
