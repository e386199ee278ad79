"""`archerchat report` and `archerchat report scaling` on models that were really trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TinyHome = Any
"""What the fixture `trained_home` is: a home with the commands that use it."""


def test_a_trained_model_has_a_report(
    trained_home: TinyHome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run("report") == 0
    folder = trained_home.root / "reports" / "tiny"
    assert str(folder / "report.html") in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "Training report: tiny" in page
    assert page.count('<svg class="chart"') == 3
    assert all(label in page for label in ("nats per token", "bits per byte", "tokens/s"))
    assert "The capital of France is" in page
    charts = list((folder / "charts").iterdir())
    assert len(charts) == page.count('<svg class="chart"')
    assert (folder / "report.md").read_text().count("](charts/") == len(charts)


def test_offline_tasks_are_evaluated_and_reported_as_what_they_are(
    trained_home: TinyHome, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "base", "--eval", "core", "--bundle", "offline", "--device", "cpu"]
    assert trained_home.run(*words, "--dtype", "float32", "--max-per-task", "8") == 0
    out = capsys.readouterr().out
    assert "offline tasks (not CORE):" in out
    assert "are not CORE" in out
    folder = trained_home.root / "evals" / "base" / "tiny"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["offline_000004_max8.json"]
    assert trained_home.run("report") == 0
    page = (trained_home.root / "reports" / "tiny" / "report.html").read_text()
    assert "They are not CORE" in page
    assert "offline_next_number" in page
    assert "at most 8 per task" in page
    assert "CORE has not been measured" in page


def test_it_is_replaced_and_the_same_again(trained_home: TinyHome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert trained_home.run("report", "tiny", "--out", str(out)) == 0
    first = (out / "report.html").read_bytes()
    assert trained_home.run("report", "tiny", "--out", str(out)) == 0
    assert (out / "report.html").read_bytes() == first


def test_a_directory_with_other_things_is_left_alone(
    trained_home: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert trained_home.run("report", "--out", str(tmp_path)) == 2
    assert "is not a report" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("out", [".", ".."])
def test_a_directory_without_a_name_is_refused(
    trained_home: TinyHome,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert trained_home.run("report", "--out", out) == 2
    assert f"--out {out} cannot be replaced from here" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "there is no run 'nope'"),
        (["tiny", "other"], "report scaling tiny other"),
        (["--price-per-hour", "-2"], "--price-per-hour is -2.0"),
        (["scaling", "tiny"], "name at least two"),
        (["scaling", "tiny", "tiny"], "named twice"),
        (["scaling", "tiny", "nope"], "there is no run 'nope'"),
        (["scaling", "tiny", "tiny2", "--metric", "x"], "has not logged x"),
    ],
)
def test_nonsense_is_refused(
    trained_home: TinyHome, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert trained_home.run("report", *words) == 2
    assert message in capsys.readouterr().err
    assert not (trained_home.root / "reports").exists()


def test_a_law_over_two_runs(
    trained_home: TinyHome, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert trained_home.pretrain(model_tag="longer", num_iterations=8) == 0
    capsys.readouterr()
    target = tmp_path / "law.json"
    assert trained_home.run("report", "scaling", "tiny", "longer", "--json", str(target)) == 0
    out = capsys.readouterr().out
    assert "L(C) = " in out
    assert "too few" in out
    figures = json.loads(target.read_text())
    assert [run["tag"] for run in figures["runs"]] == ["tiny", "longer"]
    assert figures["runs"][1]["flops"] == 2 * figures["runs"][0]["flops"]
    assert all(run["predicted"] == pytest.approx(run["loss"]) for run in figures["runs"])
    page = (trained_home.root / "reports" / "scaling" / "report.html").read_text()
    assert "longer" in page
