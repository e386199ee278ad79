"""What `archerchat doctor` says of a machine, and what it finds missing."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from archerchat import __version__
from archerchat.commands import doctor as module
from archerchat.commands.doctor import OPTIONAL, REQUIRED, DoctorConfig, doctor, examine
from archerchat.home import Home
from archerchat.planning.peak_flops import Measurement

ROOT = Path(__file__).resolve().parents[3]
ON_CPU = DoctorConfig(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = Measurement(5e11, (512, 512, 512), "float32")
    monkeypatch.setattr(module, "measure_peak", lambda runtime: measurement)


def test_every_dependency_is_looked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [re.match(r"[\w-]+", line) for line in project["dependencies"]]
    assert sorted(REQUIRED.split()) == sorted(match[0] for match in named if match)


def test_one_screen_says_what_runs_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(ON_CPU, Home(tmp_path / "new" / "home"))
    out = capsys.readouterr().out
    for text in ("float32: forced", "matmul: CPU", "0.5 TFLOP/s, 512x512x512", "no gradients on"):
        assert text in out
    assert len(out.splitlines()) <= 48
    assert "  text: archerchat data build stdlib\n" in out
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_with_the_same_parts(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run("doctor", "--json", "--device", "cpu") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["home"]["data"] == "tiny"
    assert report["home"]["tokenizers"] == "tiny"
    assert report["home"]["checkpoints"] == "base/tiny"
    assert report["packages"].keys() == {*REQUIRED.split(), *OPTIONAL.split()}
    assert report["packages"]["torch"] == report["machine"]["torch"]
    assert report["machine"]["archerchat"] == __version__
    assert not {"text", "a tokenizer", "a model"} & {what for what, _ in report["missing"]}


def test_what_is_missing_comes_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_version", lambda name: None if name == "tyro" else "1")
    monkeypatch.setattr(module, "_compiler", lambda: None)
    monkeypatch.setattr(module, "_driver", lambda: "580.1")
    monkeypatch.setattr(module, "LEAST_FREE_BYTES", 2**60)
    report = examine(ON_CPU, Home(tmp_path))
    remedies = dict(report["missing"])
    assert remedies["package tyro"] == "pip install tyro"
    assert remedies["a C++ compiler, to compile steps"] == "apt-get install g++"
    assert "a torch that uses the GPU" in remedies
    assert "ARCHERCHAT_HOME" in remedies["free disk space"]
    assert report["choices"]["training"] == "uncompiled: no working compiler"


@pytest.mark.gpu
def test_a_card_is_described(tmp_path: Path) -> None:
    report = examine(DoctorConfig(), Home(tmp_path))
    assert report["device"]["capability"].startswith("sm")
    assert 0 < report["device"]["free_bytes"] <= report["device"]["memory_bytes"]
    assert report["choices"]["attention"].startswith(("flex", "flash"))
    assert report["choices"]["decoding"].startswith("CUDA graphs")
