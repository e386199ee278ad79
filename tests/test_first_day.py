"""A newcomer's first day: eight commands from own text to a chat that answers as taught.

No command needs a flag to avoid a trap; none loses text or replaces a result in silence.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FACTS = {
    "What is the name of my boat?": "Your boat is called Halcyon.",
    "Where do I keep the spare key?": "The spare key is under the blue pot.",
    "Who feeds the cat on Mondays?": "Marta feeds the cat on Mondays.",
    "Which tea do I drink?": "You drink jasmine tea.",
}
TEXT_BYTES = 2_000_000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with 2 MB of long documents beside it, and 200 conversations of four facts."""
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path / "home"))
    folder, total = tmp_path / "texts", 0
    folder.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(library.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    for path in sources:
        text = path.read_text(encoding="utf-8", errors="replace")
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
        total += len(text.encode())
        if total > TEXT_BYTES:
            break
    lines = [
        json.dumps({"messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]})
        for _ in range(50) for question, answer in FACTS.items()
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    return tmp_path


def archerchat(words: str, answer: str = "") -> str:
    """Run a command; return all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "archerchat.cli", *words.split()],
        input=answer,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def test_own_text_and_own_conversations_become_a_chat(home: Path) -> None:
    small = "--aspect-ratio 32 --head-dim 32 --max-seq-len 128 --total-batch-size 2048"
    built = archerchat(f"data build {home / 'texts'} --name mine")
    assert re.search(r"\d+ documents", built), built
    archerchat("tokenizer train --data mine --vocab-size 1024 --name mine")
    trained = archerchat(
        f"pretrain --data mine --tokenizer mine --depth 2 {small} --num-iterations 60 "
        "--eval-every 30 --eval-tokens 8192 --no-compile"
    )
    # Long documents: best fit would drop nearly all of them, so they are continued row by row.
    assert "concat (best-fit keeps " in trained
    assert re.search(r"text: 0\.\d\d passes; .* of it was in a row", trained), trained
    first, last = map(float, re.findall(r"val/bpb (\d\.\d+)", trained))
    assert last < first
    archerchat("eval base --eval bpb --split-tokens 8192")
    tuned = archerchat(
        f"sft --mixture none --jsonl {home / 'mine.jsonl'} --num-epochs 40 "
        "--total-batch-size 2048 --eval-tokens 2048 --no-compile"
    )
    assert "too few" not in tuned
    question = next(iter(FACTS))
    said = archerchat("chat --temperature 0 --max-new-tokens 24", question + "\n")
    assert FACTS[question] in said, said
    archerchat("eval chat --tasks Arithmetic:8,SimpleSpelling:8 --max-new-tokens 16")
    archerchat("eval chat --tasks Arithmetic:2 --max-new-tokens 16")
    results = list((home / "home" / "evals").rglob("*.json"))
    assert len([path for path in results if "chat" in path.name]) == 2, results
    report = archerchat("report")
    assert "Arithmetic" in (home / "home" / "reports").rglob("*.md").__next__().read_text()
    assert report
