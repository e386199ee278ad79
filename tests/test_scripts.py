"""The scripts in `runs/`, without a network: stand-ins answer for python, pip, uv and nvidia-smi.

The real thing, an environment made from nothing, is what CI does before it comes here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
        shutil.copytree(ROOT / "runs", self.root / "runs")
        for name in ("pyproject.toml", "endlex/pyproject.toml"):
            (self.root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        write_script(self.root / ".venv/bin/python", PYTHON)
        self.tool("uname", "echo Linux")
        self.tool("nvidia-smi", "exit 9")
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

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", *command],
            cwd=self.root,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
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
    assert sandbox.installs()[-1] == "-e ROOT/endlex -e ROOT[dev]"
    for extra in ("dev", ""):  # the plain set-up is part of any other
        second = sandbox.set_up(extra)
        assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
        assert sandbox.installs() == []
    assert sandbox.set_up("server").returncode == 0
    assert sandbox.installs()[-1] == "-e ROOT/endlex -e ROOT[server]"


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
    assert sandbox.calls.read_text().endswith("-m pytest -k a b\n")


def test_all_leaves_out_what_cannot_run_here(sandbox: Sandbox) -> None:
    result = sandbox.run("runs/test.sh", "--all", "-x", HAS_TORCH="0")
    assert result.returncode == 0, result.stderr
    called = sandbox.calls.read_text().splitlines()[-1]
    assert re.fullmatch(r"-m pytest -m not network and not gpu( and not browser)? -x", called)
    sandbox.tool("nvidia-smi", "echo 'GPU 0: NVIDIA H200'")
    sandbox.tool("chromium", "exit 0")
    sandbox.run("runs/test.sh", "--all")
    assert sandbox.calls.read_text().splitlines()[-1] == "-m pytest -m not network"
