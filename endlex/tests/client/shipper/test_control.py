"""What a trainer decides about its shipper from the lock and the state that it finds."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from endlex.client.shipper import control
from endlex.client.shipper.control import (
    BACKGROUND,
    LOCK_FILE,
    STOPPED,
    read_state,
    restart_shipper_if_killed,
    take_lock,
    write_state,
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories for which a shipper was started; none is in fact."""
    found: list[Path] = []
    monkeypatch.setattr(control, "start_shipper", found.append)
    return found


def test_a_shipper_is_started_unless_one_lives_or_was_stopped(
    started: list[Path], tmp_path: Path
) -> None:
    restart_shipper_if_killed(tmp_path)
    assert started == [tmp_path]
    lock = take_lock(tmp_path, BACKGROUND)
    assert lock is not None
    restart_shipper_if_killed(tmp_path)
    lock.close()
    assert started == [tmp_path]
    restart_shipper_if_killed(tmp_path)
    assert started == [tmp_path, tmp_path]
    write_state(tmp_path, STOPPED, {})
    restart_shipper_if_killed(tmp_path)
    assert started == [tmp_path, tmp_path]


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_shippers_do_not_pile_up_where_the_lock_is_another_users(
    started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    (tmp_path / LOCK_FILE).touch()
    plain = io.open

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if Path(path).name == LOCK_FILE and mode != "r":
            raise OSError(reason, "refused", str(path))
        return plain(path, mode, *rest, **more)

    monkeypatch.setattr(io, "open", opened)
    restart_shipper_if_killed(tmp_path)
    assert started == []


def test_a_shipper_that_was_stopped_between_two_looks_is_not_started_again(
    started: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(tmp_path, "shipping", {})
    lock = take_lock(tmp_path, BACKGROUND)
    assert lock is not None

    def read_and_end(directory: Path) -> dict[str, Any]:
        """Return the state, and do at once what a shipper does that is told to stop."""
        state = read_state(directory)
        write_state(directory, STOPPED, {})
        lock.close()
        return state

    monkeypatch.setattr(control, "read_state", read_and_end)
    restart_shipper_if_killed(tmp_path)
    assert started == []
    lock.close()
