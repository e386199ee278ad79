"""Conversations from files of JSON lines, for training only: one's own data, and identities.

Each line is a conversation, `{"messages": [...]}` or the list of messages alone. All of them are
checked when the file is read, so a broken one is found before training begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archerchat.errors import DataError
from archerchat.files import sha256_file
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, check_conversation
from archerchat.tasks.hub import iter_json_lines


class JsonlTask(Task):
    """The conversations of a file, or of the `*.jsonl` files of a folder in the names' order.

    Raises:
        DataError: there is none, or one is malformed; the message names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        self.name = path.name
        self._conversations = [
            check_conversation(value, where)
            for each in paths
            for where, value in iter_json_lines(each)
        ]
        if not self._conversations:
            raise DataError(
                f"{path} holds no conversation: give a file with one JSON line for each"
            )
        self._digests = [sha256_file(each) for each in paths]

    def num_examples(self) -> int:
        return len(self._conversations)

    def example(self, index: int) -> Conversation:
        return self._conversations[index]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sha256": self._digests}
