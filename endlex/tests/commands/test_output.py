"""What a terminal cannot show is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import endlex


def test_a_terminal_without_a_character_shows_another(place: Path) -> None:
    with endlex.init("démo", "学習 → d12", mode="offline") as run:
        run.log({"loss": 1.0})
    for words in (["ls", "--local"], ["show", str(run.directory)], ["verify"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "endlex", *words],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "UnicodeEncodeError" not in done.stderr
        assert done.stdout


def test_the_shipper_s_log_takes_any_name(place: Path) -> None:
    (place / "学習").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "endlex.client.shipper", "学習"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "ENDLEX_URL": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "?? has no run.json" in done.stdout
