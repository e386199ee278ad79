"""The scripts in `runs/`, without a network: stand-ins answer for python, pip, uv and nvidia-smi.

The real thing, an environment made from nothing, is what CI does before it comes here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import endlex

ROOT = Path(__file__).resolve().parents[1]
PYTEST = f"-m pytest -n {min(8, (os.cpu_count() or 1) + 1)} --dist worksteal"
CPU_BUILD = ["filelock", "sympy>=1.13.3", 'optree; extra == "optree"']
CUDA_BUILD = ["filelock", 'nvidia-cudnn-cu13==9; platform_system == "Linux"', "triton~=3.9"]

# Logs how it is called; runs real code for `-c`, except for what only a finished install can do.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
*distribution\\(*) exit "${HAS_TORCH:-1}" ;;
*"import archerchat"*) exit "${IMPORTS:-0}" ;;
*cuda.is_available*) exit 1 ;;
-c*) exec "$REAL_PYTHON" "$@" ;;
*--report*) [ -f "$WHEEL_REPORT" ] && cat "$WHEEL_REPORT" ;;
"-m pip install -q -e"*) exit "${INSTALL:-0}" ;;
"-m uv"*) exit "${UV:-0}" ;;
"-m ruff check"* | "-m pytest"*) exit "${GATE:-0}" ;;
esac
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Sandbox:
    """A checkout's scripts with an environment of stand-ins."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        self.calls = root / "calls"
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in ("runs", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("pyproject.toml", "endlex/pyproject.toml", "endlex/server/pyproject.toml"):
            (self.root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        write_script(self.root / ".venv/bin/python", PYTHON)
        self.tool("uname", "echo Linux")
        self.tool("nvidia-smi", "exit 9")
        self.tool("apt-get", "exit 100")  # no test changes the machine
        self.report = root / "report.json"
        self.environment = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "WHEEL_REPORT": str(self.report),
        }

    def tool(self, name: str, body: str) -> None:
        write_script(self.bin / name, f"#!/bin/sh\n{body}\n")

    def offer_wheel(self, version: str, requirements: list[str]) -> None:
        """Let pip's wheel house hold one build of torch."""
        metadata = {"version": version, "requires_dist": requirements}
        self.report.write_text(json.dumps({"install": [{"metadata": metadata}]}))

    def run(
        self, *command: str, timeout: int = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", *command],
            cwd=self.root,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def set_up(self, extra: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        script = f". runs/environment.sh; setup_environment {extra}"
        return self.run("-euo", "pipefail", "-c", script, **environment)

    def installs(self) -> list[str]:
        """What was installed, an entry for each call of pip or uv."""
        calls = re.findall(r"-m (?:uv )?pip install -q (.*)", self.calls.read_text())
        return [call.replace(str(self.root), "ROOT") for call in calls if "--dry-run" not in call]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_the_range_of_torch_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [requirement] = [r for r in project["dependencies"] if r.startswith("torch")]
    assert f'TORCH="{requirement}"' in (ROOT / "runs/environment.sh").read_text()


def test_the_second_set_up_calls_no_installer(sandbox: Sandbox) -> None:
    sandbox.offer_wheel("2.13.0+cpu", CPU_BUILD)
    first = sandbox.set_up("dev")
    assert first.returncode == 0, first.stderr
    assert sandbox.installs()[-1] == "-e ROOT/endlex -e ROOT/endlex/server -e ROOT[dev]"
    for extra in ("dev", ""):  # the plain set-up is part of any other
        second = sandbox.set_up(extra)
        assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
        assert sandbox.installs() == []
    assert sandbox.set_up("server").returncode == 0
    assert sandbox.installs()[-1] == "-e ROOT/endlex -e ROOT/endlex/server -e ROOT[server]"


def test_changed_requirements_are_installed(sandbox: Sandbox) -> None:
    sandbox.set_up(HAS_TORCH="0")
    with (sandbox.root / "endlex/pyproject.toml").open("a") as file:
        file.write("# a change\n")
    assert sandbox.set_up(HAS_TORCH="0").returncode == 0
    assert sandbox.installs() == ["-e ROOT/endlex -e ROOT"]


@pytest.mark.parametrize("failure", [{"INSTALL": "1"}, {"IMPORTS": "1"}])
def test_a_set_up_cut_short_is_done_again(sandbox: Sandbox, failure: dict[str, str]) -> None:
    assert sandbox.set_up(HAS_TORCH="0", **failure).returncode != 0
    assert sandbox.set_up(HAS_TORCH="0").returncode == 0
    assert sandbox.installs() == ["-e ROOT/endlex -e ROOT"]


def test_torch_that_is_there_stays(sandbox: Sandbox) -> None:
    assert sandbox.set_up(HAS_TORCH="0").returncode == 0
    assert sandbox.installs() == ["-e ROOT/endlex -e ROOT"]


def test_torch_on_a_gpu_or_a_mac_is_the_registry_s(sandbox: Sandbox) -> None:
    sandbox.offer_wheel("2.13.0+cpu", CPU_BUILD)
    expected = "--force-reinstall --no-deps torch>=2.11"
    sandbox.tool("uname", "echo Darwin")
    sandbox.set_up()
    assert sandbox.installs()[0] == expected
    sandbox.tool("uname", "echo Linux")
    sandbox.tool("nvidia-smi", "echo 'GPU 0: NVIDIA GeForce RTX 4070'")
    result = sandbox.set_up("dev")
    assert sandbox.installs()[0] == expected
    assert "torch cannot use this machine's GPU" in result.stderr


def test_torch_on_a_cpu_comes_from_the_wheel_house(sandbox: Sandbox) -> None:
    sandbox.offer_wheel("2.13.0+cpu", CPU_BUILD)
    assert sandbox.set_up().returncode == 0
    assert sandbox.installs()[0] == "--force-reinstall --no-deps torch==2.13.0+cpu"


@pytest.mark.parametrize("wheel_house", [None, CUDA_BUILD])
def test_torch_on_a_cpu_never_brings_cuda(sandbox: Sandbox, wheel_house: list[str] | None) -> None:
    if wheel_house:
        sandbox.offer_wheel("2.15.0", wheel_house)
    assert sandbox.set_up().returncode == 0
    uv, torch, project = sandbox.installs()
    assert uv.startswith("uv>=")
    assert torch.endswith("--reinstall --no-deps --torch-backend=cpu torch>=2.11")
    assert project == "-e ROOT/endlex -e ROOT"


def test_no_cpu_build_says_what_to_do(sandbox: Sandbox) -> None:
    result = sandbox.set_up(UV="2")
    assert result.returncode == 1
    assert "install any build (torch>=2.11)" in result.stderr
    assert not list(sandbox.root.glob(".venv/.archerchat-stamp*"))


def test_a_python_that_will_not_do_is_named(sandbox: Sandbox) -> None:
    sandbox.tool("old-python", "exit 1")
    shutil.rmtree(sandbox.root / ".venv")
    result = sandbox.set_up(PYTHON="old-python")
    assert result.returncode == 1
    assert "PYTHON=old-python does not run or is older than Python 3.11" in result.stderr
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        sandbox.tool(name, "exit 1")
    result = sandbox.set_up()
    assert result.returncode == 1
    assert "no Python 3.11 or later found" in result.stderr


def test_a_broken_environment_is_not_removed(sandbox: Sandbox) -> None:
    python = sandbox.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("gone")  # as after an upgrade of the interpreter it was made with
    result = sandbox.set_up()
    assert result.returncode == 1
    assert "remove" in result.stderr
    assert python.is_symlink()


def test_no_ensurepip_and_no_pip_is_explained(sandbox: Sandbox) -> None:
    """Debian's python3 without python3-venv."""
    shutil.rmtree(sandbox.root / ".venv")
    sandbox.tool(
        "bare-python", f'case "$*" in *ensurepip*|*pip*) exit 1;; esac; {sys.executable} "$@"'
    )
    result = sandbox.set_up(PYTHON="bare-python")
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr


def test_every_gate_runs_and_the_failed_are_named(sandbox: Sandbox) -> None:
    failing = sandbox.run("runs/test.sh", HAS_TORCH="0", GATE="3")
    assert failing.returncode == 1
    assert failing.stderr.endswith("error: failed: lint tests\n")
    gates = re.findall("^-m (ruff format|ruff check|mypy|pytest)", sandbox.calls.read_text(), re.M)
    assert gates == ["ruff format", "ruff check", "mypy", "pytest"]
    passing = sandbox.run("runs/test.sh", "-k", "a b")
    assert (passing.returncode, passing.stderr) == (0, "")
    assert sandbox.calls.read_text().endswith(f"{PYTEST} -k a b\n")


def test_all_leaves_out_what_cannot_run_here(sandbox: Sandbox) -> None:
    result = sandbox.run("runs/test.sh", "--all", "-x", HAS_TORCH="0")
    assert result.returncode == 0, result.stderr
    called = sandbox.calls.read_text().splitlines()[-1]
    assert re.fullmatch(rf"{PYTEST} -m not network and not gpu( and not browser)? -x", called)
    sandbox.tool("nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
    sandbox.tool("chromium", "exit 0")
    sandbox.run("runs/test.sh", "--all")
    assert sandbox.calls.read_text().splitlines()[-1] == f"{PYTEST} -m not network"
    assert "== left out: tests marked" not in sandbox.run("runs/test.sh", "--all").stderr


BARE = ("bash", "cat", "cksum", "dirname", "env", "mv", "python3")


@pytest.fixture
def bare(sandbox: Sandbox) -> Sandbox:
    """A machine without a browser: PATH holds the stand-ins and little else."""
    for name in BARE:
        found = shutil.which(name)
        assert found, name
        (sandbox.bin / name).symlink_to(found)
    sandbox.tool("id", "echo 0")
    sandbox.environment |= {"PATH": str(sandbox.bin), "HAS_TORCH": "0"}
    return sandbox


def test_ci_installs_a_browser_where_it_can(bare: Sandbox) -> None:
    bare.tool("apt-get", f'echo "$*" >>$APT; ln -sf {shutil.which("true")} {bare.bin}/chromium')
    asked = bare.root / "apt"
    (bare.bin / "ln").symlink_to(str(shutil.which("ln")))
    result = bare.run(".ci/run", APT=str(asked))
    assert result.returncode == 0, result.stderr
    assert "install -y -qq --no-install-recommends chromium" in asked.read_text()
    assert bare.calls.read_text().splitlines()[-1] == f"{PYTEST} -m not network and not gpu"


@pytest.mark.parametrize("user", ["0", "1000"])
def test_ci_says_why_it_leaves_the_browser_s_tests_out(bare: Sandbox, user: str) -> None:
    bare.tool("id", f"echo {user}")
    bare.tool("apt-get", "echo asked >>$APT; exit 100")
    asked = bare.root / "apt"
    result = bare.run(".ci/run", APT=str(asked))
    assert result.returncode == 0, result.stderr
    assert asked.exists() == (user == "0")
    assert "no Chromium here, and it cannot be installed" in result.stdout
    assert "left out: tests marked browser (no chromium or google-chrome on PATH)" in result.stderr
    called = bare.calls.read_text().splitlines()[-1]
    assert called == f"{PYTEST} -m not network and not gpu and not browser"


class Dashboard:
    """What `describe_dashboard` of `runs/dashboard.sh` does for one run, with the real `endlex`."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.home = sandbox, sandbox.root / "a home"
        self.run_directory, self.data = self.home / "runs" / "demo", self.home / "endlex"
        self.page = self.home / "dashboard.html"
        sandbox.tool("endlex", f'echo "$1" >>"$CALLS"; exec {sys.executable} -m endlex "$@"')
        sandbox.environment["HOME"] = str(self.home)

    def train(self, loss: float) -> None:
        with endlex.init(
            "demo", "demo", directory=self.run_directory, mode="offline", id="dashboard1"
        ) as run:
            run.log({"train/loss": loss}, step=0)

    def describe(self, **environment: str) -> tuple[str, str, list[str]]:
        script = (
            ". runs/environment.sh; . runs/dashboard.sh; describe_dashboard "
            f"'{self.run_directory}' '{self.data}' '{self.page}'"
        )
        result = self.sandbox.run("-euo", "pipefail", "-c", script, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr, self.sandbox.calls.read_text().split()


@pytest.fixture
def dashboard(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Dashboard:
    pytest.importorskip("fastapi", reason="the server's packages are the extra endlex[server]")
    for name in ("URL", "TOKEN", "DIR", "RUN_ID", "MODE", "HOME"):
        monkeypatch.delenv(f"ENDLEX_{name}", raising=False)
        sandbox.environment.pop(f"ENDLEX_{name}", None)
    made = Dashboard(sandbox)
    made.train(2.5)
    return made


def test_a_dashboard_is_left_once_and_again_when_the_run_went_on(dashboard: Dashboard) -> None:
    said, errors, calls = dashboard.describe()
    assert str(dashboard.page) in said, errors
    assert f"endlex serve --data '{dashboard.data}'" in said
    assert calls == ["serve", "sync", "export"]
    assert "2.5" in dashboard.page.read_text()
    before = {path: path.stat().st_mtime_ns for path in dashboard.home.rglob("*")}
    assert dashboard.describe() == (said, "", [])
    assert {path: path.stat().st_mtime_ns for path in dashboard.home.rglob("*")} == before
    dashboard.train(1.25)
    assert dashboard.describe()[2] == ["serve", "sync", "export"]
    assert "1.25" in dashboard.page.read_text()


def test_a_run_that_a_server_has_is_shown_there(dashboard: Dashboard) -> None:
    said, _, calls = dashboard.describe(ENDLEX_URL="https://endlex.example.org")
    assert said == "The run is on https://endlex.example.org\n"
    assert calls == []


def test_a_dashboard_that_cannot_be_made_is_no_failure(dashboard: Dashboard) -> None:
    dashboard.sandbox.tool("endlex", "echo the server needs fastapi >&2; exit 1")
    _, errors, _ = dashboard.describe()
    assert "the server needs fastapi" in errors
    assert f"the run itself is complete: {dashboard.run_directory}" in errors
    assert not dashboard.page.exists()


SUMMARY = """mkdir -p "$ARCHERCHAT_HOME/runs/x"
ls "$ARCHERCHAT_HOME/data" &&
    echo '{"tokens_per_second": 5400.7, "mfu": 0.1}' >"$ARCHERCHAT_HOME/runs/x/summary.json"
"""


def test_the_quickstart_is_sized_to_the_machine(sandbox: Sandbox) -> None:
    """At 5,400 tokens/s, as with AVX2 alone, the 750 steps would take 9:30 and leave no time."""
    home = sandbox.root / "a home"
    (home / "data").mkdir(parents=True)
    sandbox.tool("train", SUMMARY)
    script = '. runs/sizing.sh; speed="$(measure_speed train)"; echo "$speed"; '
    script += 'for speed in "$speed" 100 10900 17000; do fit_steps 750 4096 280 "$speed"; done'
    result = sandbox.run("-euo", "pipefail", "-c", script, BASE=str(home), TMPDIR=str(sandbox.bin))
    assert result.stdout.split() == ["5400", "360", "120", "720", "750"], result.stderr
    assert not list(sandbox.bin.glob("tmp.*"))
    sandbox.tool("train", "echo no memory; exit 1")
    result = sandbox.run("-euo", "pipefail", "-c", script, BASE=str(home))
    assert (result.returncode, result.stderr) == (1, "no memory\n")


# Logs its call, and leaves what its stage would. FAIL names a stage that fails.
ARCHERCHAT = """echo "archerchat $*" >>"$CALLS"
case "$*" in ${FAIL:-nothing}*) exit 1 ;; esac
case "$*" in
"data download"*) made=data/climbmix ;;
"tokenizer train"*) made=tokenizers/default ;;
pretrain*) made=checkpoints/base/speedrun/step_000009 ;;
"eval base"*) made=evals/base/speedrun ;;
sft*) made=checkpoints/sft/speedrun/step_000009 ;;
"eval chat"*) made=evals/sft/speedrun ;;
report*) made=reports/speedrun ;;
esac
mkdir -p "$ARCHERCHAT_HOME/$made" && touch "$ARCHERCHAT_HOME/$made/meta.json"
"""
STAGES = ["data", "tokenizer", "pretrain", "eval base", "sft", "eval chat", "report"]


@pytest.fixture
def speedrun(sandbox: Sandbox) -> Callable[..., tuple[int, list[str]]]:
    """Run the speedrun on stand-ins; return its exit code and the stages that it began."""
    sandbox.tool("archerchat", ARCHERCHAT)
    sandbox.tool("endlex", 'echo "endlex $*" >>"$CALLS"')
    home = sandbox.root / "a home"
    plan = home / "cache/stages/speedrun/plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text('{\n "train_shards": 138,\n "steps": 5568\n}\n')

    def run(**environment: str) -> tuple[int, list[str]]:
        result = sandbox.run(
            "runs/speedrun.sh", ARCHERCHAT_HOME=str(home), HAS_TORCH="0", **environment
        )
        begun = re.findall(rf"^archerchat ({'|'.join(STAGES)})", sandbox.calls.read_text(), re.M)
        return result.returncode, begun

    return run


def test_a_run_s_stages_are_done_once(
    speedrun: Callable[..., tuple[int, list[str]]], sandbox: Sandbox
) -> None:
    assert speedrun()[0] == 1, "nothing may start without a GPU"
    one = {"NUM_GPUS": "1", "ENDLEX_URL": "https://endlex.example.org"}
    assert speedrun(FAIL="sft", **one) == (1, STAGES[:5])
    assert "data download --source climbmix --num-shards 138" in sandbox.calls.read_text()
    assert speedrun(**one) == (0, STAGES[4:])
    assert speedrun(**one) == (0, [])
    checked = sandbox.calls.read_text().splitlines()[-1]
    assert re.fullmatch("endlex verify .*/runs/speedrun .*/runs/speedrun-sft", checked)
    other = sandbox.root / "a home/evals/base/other/core.json"
    other.parent.mkdir()
    other.touch()  # another model's
    assert speedrun(**one) == (0, [])
    stamp = sandbox.root / "a home/cache/stages/speedrun/sft"
    stamp.unlink()  # a stage that is repeated repeats what is made of it
    assert speedrun(**one) == (0, STAGES[4:])


def test_several_gpus_are_several_ranks(
    speedrun: Callable[..., tuple[int, list[str]]], sandbox: Sandbox
) -> None:
    sandbox.tool("nvidia-smi", 'for i in 0 1 2; do echo "GPU $i: NVIDIA H100"; done')
    assert speedrun(ENDLEX_URL="https://endlex.example.org") == (
        0,
        ["data", "tokenizer", "report"],
    )
    launched = re.findall(
        "^-m torch.distributed.run --standalone --nproc-per-node=3 -m archerchat.cli (.*)",
        sandbox.calls.read_text(),
        re.M,
    )
    assert [re.match("|".join(STAGES), words)[0] for words in launched] == [*STAGES[2:6]]  # type: ignore[index]
    assert "--depth 24 --target-param-data-ratio 8" in launched[0]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script that prints plans and results, as a module."""
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("figures", ROOT / "runs/figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_plan_says_what_is_left(
    figures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prices = {"4": 16.0, "8": 16.0, "10": None}

    def make_plan(words: list[str]) -> dict[str, Any]:
        assert words[::2] == ["--depth", "--num-gpus"]
        size = {"steps": 100, "hours": 8.0, "size": ["1M", "2B", "4"], "text": "a page"}
        return {**size, "train_shards": 9, "cost": prices[words[1]]}

    monkeypatch.setattr(figures, "make_plan", make_plan)
    (tmp_path / "checkpoints/base/large/step_000075").mkdir(parents=True)

    def rows(*models: str) -> dict[str, list[str]]:
        monkeypatch.setattr("sys.stdin", StringIO("\n".join(models)))
        figures.main(["plan", str(tmp_path / "cache/plan.json"), "--num-gpus", "1"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {line[0]: line[1:] for line in lines if line}

    said = rows("small --depth 4", "large --depth 8")
    assert said["large"] == ["1M", "2B", "4", "75", "of", "100", "8.0", "h", "$16.00", "2.0", "h"]
    assert said["all"] == ["16.0", "h", "$32.00", "10.0", "h"]
    assert '"train_shards": 9' in (tmp_path / "cache/plan.json").read_text()
    said = rows("small --depth 4", "priceless --depth 10")
    assert said["all"] == ["16.0", "h", "?", "16.0", "h"]


def test_a_plan_is_that_of_the_command(figures: ModuleType) -> None:
    found = figures.make_plan(["--depth", "12", "--gpu", "H100"])
    assert found["steps"] == 2520
    assert found["size"][:2] == ["286M", "1.32B"]


def test_figures_stand_beside_the_reference_s(
    figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, bits in (("d8", 0.94), ("d8-sft", 0.42)):
        (tmp_path / "runs" / run).mkdir(parents=True)
        summary = {"val_bpb": bits, "training_seconds": 120, "peak_memory_bytes": 2**30}
        (tmp_path / "runs" / run / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evals/base/d8").mkdir(parents=True)
    (tmp_path / "evals/base/d8/core_000009.json").write_text('{"core": 0.1}')
    given = ["val_bpb=0.938", "core=0.0976", "sft_val_bpb=0.4185", "minutes=76.7", "mfu=0.39"]
    figures.main(["compare", str(tmp_path), "d8", *given])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["d8", "reference", "ours"],
        ["val_bpb", "0.938", "0.94"],
        ["core", "0.0976", "0.1"],
        ["sft_val_bpb", "0.4185", "0.42"],
        ["minutes", "76.7", "2"],
        ["mfu", "0.39"],
    ]


# The interpreter of a dry run is that of the tests, whose packages no script may replace.
NO_INSTALL = (
    """case "$*" in *"-m pip"* | *"-m uv"*) echo "no installing in tests" >&2; exit 9 ;; esac"""
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speedrun", "cpu"])
def test_a_dry_run_walks_through_and_resumes(sandbox: Sandbox, name: str) -> None:
    """Each trains, evaluates and reports toy models here, in an environment that is there."""
    for tool, module in (("archerchat", "archerchat.cli"), ("endlex", "endlex")):
        log = f'echo "{tool} $1" >>"$CALLS"'
        sandbox.tool(tool, f'{log}; exec {sys.executable} -m {module} "$@"')
    sandbox.tool("nvidia-smi", "echo 'GPU 0: NVIDIA H100'")  # a dry run leaves it alone
    write_script(
        sandbox.root / ".venv/bin/python",
        f'#!/bin/sh\n{NO_INSTALL}\nexec {sys.executable} "$@"\n',
    )
    stamped = sandbox.run(
        "-c", '. runs/environment.sh; write_stamp ""; write_stamp dashboard,serve'
    )
    assert stamped.returncode == 0, stamped.stderr
    home = {"ARCHERCHAT_HOME": str(sandbox.root / "home"), "ARCHERCHAT_DRY_RUN": "1"}
    clean = {"ENDLEX_URL": "", "XDG_STATE_HOME": str(sandbox.root), "OMP_NUM_THREADS": "1"}
    first = sandbox.run(f"runs/{name}.sh", timeout=900, **home, **clean)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr
    assert f"== dry run of {name}" in first.stdout
    assert "done before" not in first.stdout
    assert list((sandbox.root / f"home/dry-run/reports/{name}").glob("report.html"))
    again = sandbox.run(f"runs/{name}.sh", timeout=300, **home, **clean)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(STAGES)
    calls = sandbox.calls.read_text().split("\n")
    assert {call for call in calls if call.startswith("archerchat")} <= {"archerchat chat"}
