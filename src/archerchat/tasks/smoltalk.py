"""SmolTalk: general conversations, for training only.

Among local files (`--data-dir`) a folder `chat/` of JSON lines stands in for it where there is no
`smoltalk/`; every twentieth conversation there is the test's.
"""

from __future__ import annotations

from archerchat.tasks.conversation import Conversation
from archerchat.tasks.hub import SMOLTALK, Row, TableTask, TaskFiles
from archerchat.tasks.jsonl import JsonlTask

TEST_SHARE = 20


class SmolTalkTask(TableTask):
    """The conversations of `smol-smoltalk`: 460 thousand for training."""

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
