"""Conversations for training only: one's own, as JSON lines, and SmolTalk.

Each line of a file is a conversation, `{"messages": [...]}` or the list of messages alone. All of
them are checked when the file is read, so a broken one is found before training begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archerchat.errors import DataError
from archerchat.files import sha256_file
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, check_conversation
from archerchat.tasks.hub import Row, TableTask, TaskFiles, iter_json_lines, load_tables

TEST_SHARE = 20
"""One conversation in twenty of a local folder belongs to the test."""


class JsonlTask(Task):
    """The conversations of a file, or of the `*.jsonl` files of a folder in the names' order.

    Raises:
        DataError: there is none, or one is malformed; the message names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        self.name = path.name
        self.rows = [
            check_conversation(value, where)
            for each in paths
            for where, value in iter_json_lines(each)
        ]
        if not self.rows:
            raise DataError(
                f"{path} holds no conversation: give a file with one JSON line for each"
            )
        self._digests = [sha256_file(each) for each in paths]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sha256": self._digests}


class SmolTalkTask(TableTask):
    """General conversations of `smol-smoltalk`: 460 thousand for training.

    Among local files a folder `chat/` of JSON lines stands in for it where there is no `smoltalk/`.
    """

    name = "SmolTalk"

    def __init__(self, files: TaskFiles, split: str = "train") -> None:
        load_tables()[self.name].files(split)  # refuses an unknown split
        local = files.local
        if local is None or (local / "smoltalk").exists() or not (local / "chat").is_dir():
            super().__init__(files, split)
            return
        self.split = split
        self.rows = [
            conversation
            for number, conversation in enumerate(JsonlTask(local / "chat"))
            if (number % TEST_SHARE == 0) == (split == "test")
        ]

    def render(self, row: Row) -> Conversation:
        messages = row["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
