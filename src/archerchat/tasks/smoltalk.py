"""SmolTalk: general conversations, for training only."""

from __future__ import annotations

from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.hub import SMOLTALK, TaskFiles


class SmolTalkTask(Task):
    """The conversations of `smol-smoltalk`: 460 thousand for training."""

    name = "SmolTalk"

    def __init__(self, files: TaskFiles, split: str = "train") -> None:
        self.split = split
        self._rows = files.rows(SMOLTALK, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        messages = self._rows[index]["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
