"""SmolTalk: general conversations, for training only.

Among local files (`--data-dir`) a folder `chat/` of JSON lines stands in for it where there is no
`smoltalk/`; every twentieth conversation there is the test's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.hub import SMOLTALK, TaskFiles
from archerchat.tasks.jsonl import JsonlTask

TEST_SHARE = 20


class SmolTalkTask(Task):
    """The conversations of `smol-smoltalk`: 460 thousand for training."""

    name = "SmolTalk"

    def __init__(self, files: TaskFiles, split: str = "train") -> None:
        SMOLTALK.files(split)  # refuses an unknown split
        self.split = split
        local = files.local
        self._rows: Sequence[Conversation]
        if local is not None and not (local / "smoltalk").exists() and (local / "chat").is_dir():
            self._rows = _read_folder(local / "chat", split)
        else:
            self._rows = files.rows(SMOLTALK, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        messages = self._rows[index]["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}


def _read_folder(folder: Path, split: str) -> list[Conversation]:
    is_test = split == "test"
    return [
        conversation
        for number, conversation in enumerate(JsonlTask(folder))
        if (number % TEST_SHARE == 0) == is_test
    ]
