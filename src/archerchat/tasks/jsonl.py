"""Conversations for training only: one's own, as JSON lines, and SmolTalk.

Each line of a file, or each value of a JSON list, is a conversation, `{"messages": [...]}` or the
list of messages alone. All of them are checked when the file is read, so a broken one is found
before training begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from archerchat.errors import DataError
from archerchat.files import sha256_file
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, check_conversation
from archerchat.tasks.hub import SMOLTALK, Row, TableTask, TaskFiles
from archerchat.text_files import JSON_KINDS, iter_rows, list_folder

TEST_SHARE = 20
"""One conversation in twenty of a local folder belongs to the test."""


class JsonlTask(Task):
    """The conversations of a file, or of the JSON files below a folder in the names' order.

    Args:
        split: the files to read of a folder that names train and others; None reads all.

    Raises:
        DataError: there is none, or one is malformed; the message names the file and the line.
    """

    def __init__(self, path: Path, split: Literal["train", "validation"] | None = None) -> None:
        folder = list_folder(path, JSON_KINDS)
        paths = {"train": folder.train, "validation": folder.held_out}.get(
            split or "", sorted([*folder.train, *folder.held_out])
        )
        self.name, self.left_out = path.name, folder.left_out
        self.split = split if folder.held_out else None
        self._conversations = [
            check_conversation(value, where) for each in paths for where, value in iter_rows(each)
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


class SmolTalkTask(TableTask):
    """General conversations of `smol-smoltalk`: 460 thousand for training.

    Among local files a folder `chat/` of JSON lines stands in for it where there is no `smoltalk/`.
    """

    name = "SmolTalk"
    table = SMOLTALK

    def __init__(self, files: TaskFiles, split: str = "train") -> None:
        self.table.files(split)  # refuses an unknown split
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
