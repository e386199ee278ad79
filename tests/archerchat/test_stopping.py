"""Memory that ran out is explained, a model has one owner, an extension leaves one timeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.errors import ArcherChatError, UsageError
from archerchat.files import exclusive
from archerchat.runtime import explained_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_that_ran_out_is_explained(error: RuntimeError) -> None:
    with pytest.raises(ArcherChatError, match="lower --device-batch-size"), explained_memory():
        raise error


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_memory():
        raise RuntimeError("shapes do not match")


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    directory = tmp_path / "tag"
    script = (
        "import sys; from pathlib import Path; from archerchat.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UsageError, match="another process is using"), exclusive(directory):
            pass
        other.communicate("")
    with exclusive(directory):
        (directory / "file").touch()
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_an_unused_directory_is_not_left_behind(tmp_path: Path) -> None:
    with exclusive(tmp_path / "tag"):
        assert (tmp_path / "tag").is_dir()
    assert not (tmp_path / "tag").exists()


def test_extending_from_an_earlier_step_sets_the_later_ones_aside(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"save_every": 2, "keep_last": 9}
    assert tiny_home.pretrain(**run, num_iterations=6) == 0
    capsys.readouterr()
    longer = run | {"num_iterations": 8, "extend": True}
    assert tiny_home.pretrain(**longer, resume_from_step=2) == 0
    assert "moved step_000006 of the earlier run to" in capsys.readouterr().out
    assert tiny_home.steps() == [2, 4, 6, 8]
    assert tiny_home.steps("tiny.before-step-2") == [4, 6]


def test_tokens_are_counted_across_a_change_of_batch(tiny_home: Any) -> None:
    assert tiny_home.pretrain(num_iterations=4, total_batch_size=512) == 0
    changed = {"num_iterations": 6, "total_batch_size": 1024, "extend": True}
    assert tiny_home.pretrain(**changed) == 0
    summary = json.loads(next(tiny_home.root.glob("runs/*/summary.json")).read_text())
    assert summary["tokens"] == 4 * 512 + 2 * 1024
