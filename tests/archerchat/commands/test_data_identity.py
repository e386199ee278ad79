"""`archerchat data identity`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from archerchat.cli import main
from archerchat.tasks.jsonl import JsonlTask


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def identity(*words: str) -> int:
    return main(["data", "identity", *words])


def test_the_file_is_one_that_can_be_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--name", "Zed", "--creator", "Ann", "--num-conversations", "30")
    assert identity(*words, "--output", "zed.jsonl") == 0
    assert capsys.readouterr().out == "wrote 30 conversations of Zed to zed.jsonl\n"
    assert len(JsonlTask(Path("zed.jsonl"))) == 30
    text = Path("zed.jsonl").read_text()
    assert "Zed" in text
    assert "Ann" in text
    assert identity(*words) == 0  # the default name
    assert Path("identity.jsonl").read_text() == text
    assert identity(*words, "--seed", "1") == 0
    assert Path("identity.jsonl").read_text() != text


def test_the_template_is_saved_edited_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert identity("--save-template", "mine.toml") == 0
    assert not Path("identity.jsonl").exists()
    template = Path("mine.toml")
    template.write_text(template.read_text().replace("I'm {name}", "I am the great {name}"))
    assert identity("--template", "mine.toml") == 0
    assert "I am the great Archer" in Path("identity.jsonl").read_text()
    assert identity("--save-template", "mine.toml") == 2
    assert "mine.toml exists: name a new file" in capsys.readouterr().err
    assert "the great" in template.read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--name", " "), 2, "--name is empty"),
        (("--creator", ""), 2, "--creator is empty"),
        (("--num-conversations", "0"), 2, "--num-conversations is 0; it must be at least 1"),
        (("--template", "none.toml"), 1, "cannot read the template none.toml"),
        (("--output", "home-file/x.jsonl"), 1, "cannot write home-file/x.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("home-file").write_text("not a folder")
    assert identity(*words) == code
    assert message in capsys.readouterr().err
    assert not Path("identity.jsonl").exists()
