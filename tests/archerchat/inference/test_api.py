"""The Python API: what the README shows, against the engine's parts and the plain forward pass."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat import load
from archerchat.errors import UsageError

README = Path(__file__).parents[3] / "README.md"


def test_the_readmes_lines_run(trained_home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(from archerchat import load\n.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10
    monkeypatch.setenv("ARCHERCHAT_HOME", str(trained_home.root))
    checkpoints = trained_home.root / "checkpoints"
    (checkpoints / "base" / "tiny").rename(checkpoints / "base" / "d6")
    (checkpoints / "sft").symlink_to(checkpoints / "base")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(block, names)
    assert said.getvalue()
    assert names["paris"] < 0
    assert len(names["chat"].turns) == 1


def test_generate_and_score(trained_home: Any) -> None:
    model = load("tiny", device="cpu", dtype="float32", home=trained_home.root)
    texts = model.generate("ab", "cd", max_new_tokens=3, temperature=0, num_samples=1)
    assert texts == [
        model.generate(prompt, max_new_tokens=3, temperature=0)[0] for prompt in ("ab", "cd")
    ]
    tokenizer = model.loaded.tokenizer
    before = [tokenizer.bos_id, *tokenizer.encode("ab")]
    row = [tokenizer.bos_id, *tokenizer.encode("ab cd")]
    assert row[: len(before)] == before
    logprobs = model.loaded.model(torch.tensor([row]))[0].log_softmax(dim=-1)
    expected = sum(float(logprobs[i - 1, row[i]]) for i in range(len(before), len(row)))
    scores = model.score("ab", " cd", "", " e")
    assert scores[:2] == [pytest.approx(expected, abs=1e-4), 0.0]
    with pytest.raises(UsageError, match="temperature is -1"):
        model.generate("ab", temperature=-1)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, archerchat; sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
