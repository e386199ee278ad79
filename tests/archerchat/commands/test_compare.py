"""`archerchat compare` on a run that was really trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archerchat.report.comparison import read_course

TinyHome = Any
"""What the fixture `trained_home` is: a home with the commands that use it."""


def test_a_run_agrees_with_itself_and_not_with_another(
    trained_home: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    words = ["compare", "tiny", "tiny", "--json", str(figures), "--plot", str(plot)]
    assert trained_home.run(*words) == 0
    shown = capsys.readouterr().out
    assert "DIFFERS" not in shown
    assert "4 common step(s) are too few to say that losses agree" in shown
    said = json.loads(figures.read_text())
    assert said["agree"]
    assert {row["difference"] for row in said["rows"]} == {0.0}
    assert plot.read_text().startswith("<svg")
    log = tmp_path / "log"
    log.write_text("step 00000/00004 | loss: 3.0\nStep 00004 | Validation bpb: 0.5\n")
    assert trained_home.run("compare", "tiny", str(log)) == 1
    said = capsys.readouterr()
    assert "DIFFERS" in said.out
    assert "do not agree in loss of the first 20 steps, loss of the last tenth, bits" in said.err
    loss = read_course(trained_home, "tiny").losses[0]
    log.write_text(f"step 00000/00004 | loss: {loss}\n")
    assert trained_home.run("compare", "tiny", str(log), "--json", str(figures)) == 2
    said = capsys.readouterr()
    assert "agrees" not in said.out
    assert "cannot be compared: 1 common step(s) are too few" in said.err
    assert json.loads(figures.read_text())["agree"] is None
    log.write_text("ChatCORE metric: 0.2\n")
    assert trained_home.run("compare", "tiny", str(log)) == 2
