"""The facts of a session's environment, the commit read from git's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archerchat.training.environment import describe_environment, find_commit

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a branch whose commit stands in a file of its own."""
    git = tmp_path / "checkout" / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs/heads/main").write_text(COMMIT + "\n")
    (tmp_path / "checkout/src").mkdir()
    return tmp_path / "checkout"


def test_the_commit_of_a_branch(checkout: Path) -> None:
    assert find_commit(checkout / "src" / "module.py") == COMMIT


def test_a_detached_head(checkout: Path) -> None:
    (checkout / ".git/HEAD").write_text(OTHER)
    assert find_commit(checkout / "src" / "module.py") == OTHER


def test_a_packed_reference(checkout: Path) -> None:
    (checkout / ".git/refs/heads/main").unlink()
    lines = ["# pack-refs with: peeled", f"{OTHER} refs/heads/next", f"{COMMIT} refs/heads/main"]
    (checkout / ".git/packed-refs").write_text("\n".join([*lines, f"^{OTHER}"]))
    assert find_commit(checkout / "src" / "module.py") == COMMIT


def test_a_worktree(checkout: Path, tmp_path: Path) -> None:
    own = checkout / ".git/worktrees/second"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/main")
    (own / "commondir").write_text("../..\n")
    (tmp_path / "second").mkdir()
    (tmp_path / "second/.git").write_text(f"gitdir: {own}\n")
    assert find_commit(tmp_path / "second" / "module.py") == COMMIT


@pytest.mark.parametrize("head", ["ref: refs/heads/gone", "not a commit", ""])
def test_what_names_no_commit(checkout: Path, head: str) -> None:
    (checkout / ".git/HEAD").write_text(head)
    assert find_commit(checkout / "src" / "module.py") is None


def test_the_facts_are_text_and_numbers() -> None:
    facts = describe_environment()
    assert {"torch", "python", "git_commit", "command", "cpus"} <= facts.keys()
    assert json.loads(json.dumps(facts)) == facts
