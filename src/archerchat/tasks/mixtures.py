"""What to fine-tune on: the tasks that a command line names, as one mixture (SPEC section 7).

A mixture is a list such as `GSM8K*4,identity*2,Arithmetic:20000`: tasks by name, `:N` for the first
N examples only, `*N` to count them N times. `reference` and `generated` stand for such lists; the
second needs no network. Files of JSON lines come on top. To validate, the same tasks' test split is
taken once; of files, one conversation in twenty is kept back where there is no such task.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.errors import UsageError
from archerchat.tasks.base import Task, TaskMixture
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.generated import check_split
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.identity import default_template, draw_identity, parse_template
from archerchat.tasks.jsonl import JsonlTask
from archerchat.tasks.registry import TASKS, build_task

PRESETS = {
    "reference": "SmolTalk,MMLU*3,GSM8K*4,identity*2,SimpleSpelling,SpellingBee",
    "generated": "identity*2,SimpleSpelling,SpellingBee,Arithmetic",
    "none": "",
}
IDENTITY = "identity"
IDENTITY_SIZE = 1000
IDENTITY_TEST_SIZE = 64
IDENTITY_VALUES = {"name": "Archer", "creator": "the person who runs me"}
HELD_BACK = 20
"""One in so many conversations of files is for validation, where nothing else is."""
_ENTRY = re.compile(r"([\w-]+)(?::(\d+))?(?:\*(\d+))?")


@dataclass(frozen=True)
class MixtureConfig:
    """Choose what to fine-tune on."""

    mixture: str = "reference"
    """`reference` (needs the hub), `generated` (no network), `none` (only --jsonl), or a list such
    as GSM8K*4,identity*2,Arithmetic:20000."""
    jsonl: tuple[Path, ...] = ()
    """Files, or folders, of your own conversations as JSON lines."""
    val_jsonl: tuple[Path, ...] = ()
    """Files of conversations to validate on, instead of the tasks' tests."""
    identity: Path | None = None
    """JSON lines in which the assistant says who it is (`archerchat data identity`); by default
    the package's."""
    data_dir: Path | None = None
    """A folder of local files that stands in for the hub's."""
    mixture_seed: int = 42
    """Of the order of the conversations."""


@dataclass(frozen=True)
class _Entry:
    """One task of a mixture."""

    name: str
    size: int | None
    times: int


class IdentityTask(Task):
    """Conversations drawn from the package's template; the test's are other draws of it.

    Raises:
        UsageError: the split is neither `train` nor `test`.
    """

    name = IDENTITY

    def __init__(self, split: str) -> None:
        check_split(split)
        self.split = split
        self._text = default_template()
        template = parse_template(self._text, IDENTITY_VALUES, "the template")
        size, seed = (IDENTITY_SIZE, 0) if split == "train" else (IDENTITY_TEST_SIZE, 1)
        self._conversations = draw_identity(template, size, seed)

    def num_examples(self) -> int:
        return len(self._conversations)

    def example(self, index: int) -> Conversation:
        return self._conversations[index]

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return super().describe() | {"template": digest}


def build_mixtures(config: MixtureConfig, files: TaskFiles) -> tuple[TaskMixture, TaskMixture]:
    """Build what to train on and what to validate on.

    Raises:
        UsageError: the list cannot be read, names no known task, or names nothing at all.
        DataError: files are missing or broken; the message says which and where.
    """
    entries = parse_mixture(config.mixture)
    if not entries and not config.jsonl:
        raise UsageError("--mixture none leaves nothing to learn: give --jsonl too, or tasks")
    # First what is the user's own: a broken line is said before gigabytes are downloaded.
    own: list[Task] = [JsonlTask(path) for path in config.jsonl]
    judges: list[Task] = [JsonlTask(path) for path in config.val_jsonl]
    train = [
        task for entry in entries for task in [_build(entry, "train", config, files)] * entry.times
    ]
    if not judges:
        judges = [_build(entry, "test", config, files) for entry in entries]
    if not judges:
        shuffled = [task.shuffled(config.mixture_seed) for task in own]
        judges = [task[: max(1, len(task) // HELD_BACK)] for task in shuffled]
        own = [task[len(task) // HELD_BACK :] for task in shuffled]
    return (
        TaskMixture([*train, *own], config.mixture_seed),
        TaskMixture(judges, config.mixture_seed),
    )


def parse_mixture(text: str) -> list[_Entry]:
    """Read a preset's name or a list of tasks.

    Raises:
        UsageError: an entry cannot be read, or there is no such task.
    """
    names = {name.lower(): name for name in (*TASKS, IDENTITY)}
    entries = []
    for word in filter(None, PRESETS.get(text, text).replace(" ", "").split(",")):
        match = _ENTRY.fullmatch(word)
        size = int(match[2]) if match and match[2] else None
        times = int(match[3]) if match and match[3] else 1
        if match is None or size == 0 or times == 0:
            raise UsageError(
                f"--mixture: {word!r} cannot be read: write a task's name, then :N for its first "
                "N examples and *N to count them N times, such as SpellingBee:5000*2"
            )
        if match[1].lower() not in names:
            raise UsageError(
                f"--mixture: there is no task {match[1]!r}: give {', '.join(PRESETS)}, or a list "
                f"of {', '.join(names.values())}"
            )
        entries.append(_Entry(names[match[1].lower()], size, times))
    return entries


def _build(entry: _Entry, split: str, config: MixtureConfig, files: TaskFiles) -> Task:
    train = split == "train"
    if entry.name != IDENTITY:
        task = build_task(entry.name, split, files)
    elif train and config.identity is not None:
        task = JsonlTask(config.identity)
    else:
        task = IdentityTask(split)
    return task[: entry.size] if train and entry.size is not None else task
