"""Writing is whole or not at all, and leftovers are told from live temporaries."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from archerchat import files
from archerchat.errors import DataError, UsageError
from archerchat.files import hash_ends
from archerchat.home import Home


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path))
    home = Home.from_environment()
    assert home.checkpoint_dir("base", "d4") == tmp_path / "checkpoints" / "base" / "d4"
    monkeypatch.setenv("ARCHERCHAT_HOME", "")
    assert Home.from_environment().root == Path.home() / ".cache" / "archerchat"
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["d4", "step_000100", "my-run.v2", "a..b", "7", "_x", "-"])
def test_names_of_the_allowed_characters_are_taken(name: str, tmp_path: Path) -> None:
    assert Home(tmp_path).run_dir(name) == tmp_path / "runs" / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../d4",
        "a/b",
        "a\\b",
        "a\0b",
        ".hidden",
        "my run",
        " d4",
        "d4\n",
        "a:b",
        "a*",
        "~",
        "$HOME",
        "d4é",
        "４",
    ],
)
def test_names_of_other_characters_are_refused(name: str, tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(UsageError, match="cannot be a directory's name"):
        home.checkpoint_dir("base", name)
    with pytest.raises(UsageError, match="cannot be a directory's name"):
        home.stage_dir(name)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(descriptor: int) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="gone"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["a.json"]


def test_a_failed_block_leaves_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "made" / "new"

    def write_half() -> None:
        with files.new_directory(path) as temporary:
            (temporary / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(path.parent) == []


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for content in ("old", "new"):
        with files.new_directory(path) as temporary:
            (temporary / content).mkdir()
            (temporary / content / "file").write_text(content)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["d"]


def test_an_interrupted_replacement_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "d", Path.replace
    with files.new_directory(path) as temporary:
        (temporary / "old").touch()

    def interrupt(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(files.STALE):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), files.new_directory(path) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["d"]
    assert names(path) == ["old"]


def test_what_a_kill_between_two_renames_left_is_found_and_restored(tmp_path: Path) -> None:
    path, stale = tmp_path / "d", tmp_path / f".d{files.STALE}"
    stale.mkdir()
    (stale / "old").touch()
    assert files.current(path) == stale
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["d"]
    assert files.current(path) == path


def test_leftovers_go_and_live_temporaries_stay(tmp_path: Path) -> None:
    (tmp_path / ".file.abc.tmp").touch()
    (tmp_path / ".d.abc.tmp").mkdir()
    (tmp_path / ".d.abc.tmp" / "part").touch()
    (tmp_path / "kept").touch()
    with files.new_directory(tmp_path / "live") as temporary:
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == [temporary.name, "kept"]
    assert names(tmp_path) == ["kept", "live"]


def test_remove_directory_takes_the_name_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d"
    path.mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed there
    files.remove_directory(path)
    assert names(tmp_path) == [".d.removed.tmp"]


def answering(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_work_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    files._warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", answering(number))
    for _ in range(2):
        with files.exclusive(tmp_path / "run"):
            files.write_json(tmp_path / "run" / "x", 1)
    assert capsys.readouterr().err.count("this file system cannot lock files") == 1
    monkeypatch.setattr(fcntl, "flock", answering(errno.EWOULDBLOCK))
    with pytest.raises(UsageError, match="another process is using"):
        files.exclusive(tmp_path / "run").__enter__()


def test_what_a_file_system_does_not_offer_is_skipped_and_a_failing_disk_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files._warn_once.cache_clear()
    monkeypatch.setattr(os, "fsync", answering(errno.EINVAL))
    monkeypatch.setattr(Path, "chmod", answering(errno.EPERM))
    for name in ("a", "b"):
        with files.new_directory(tmp_path / name) as made:
            files.write_json(made / "x", 1)
    assert (tmp_path / "b" / "x").read_text() == "1\n"
    said = capsys.readouterr().err
    assert said.count("write to the disk on request") == said.count("set permissions") == 1
    monkeypatch.setattr(os, "fsync", answering(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.write_json(tmp_path / "y", 1)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)]
)
def test_space_is_advised_only_where_it_is_missing(
    tmp_path: Path, number: int, is_full: bool
) -> None:
    with pytest.raises(DataError) as refused, files.explained_writes(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert ("free some space" in str(refused.value)) == is_full


def test_hashes_of_ends_tell_files_apart(tmp_path: Path) -> None:
    content = bytes(5 * 2**20)
    paths = [tmp_path / str(i) for i in range(4)]
    for path in paths:
        path.write_bytes(content)
    assert hash_ends(paths[0]) == hash_ends(paths[1])
    paths[1].write_bytes(content[:-1] + b"x")
    paths[2].write_bytes(b"x" + content[1:])
    paths[3].write_bytes(content + bytes(1))
    assert len({hash_ends(path) for path in paths}) == 4
