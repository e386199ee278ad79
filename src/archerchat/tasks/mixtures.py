"""What to fine-tune on: the tasks that a command line names, as one mixture (SPEC section 7).

A mixture is a list such as `GSM8K*4,identity*2,Arithmetic:20000`: tasks by name, `:N` for the first
N examples only, `*N` to count them N times. `reference` and `generated` stand for such lists; the
second needs no network. Files of JSON lines come on top. To validate, the same tasks' test split is
taken once; of files, one conversation in twenty is kept back where there is no such task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archerchat.errors import UsageError
from archerchat.tasks.base import Task, TaskMixture
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.identity import IdentityTask
from archerchat.tasks.jsonl import JsonlTask
from archerchat.tasks.registry import TASKS, TaskChoice, build_task, parse_choices

PRESETS = {
    "reference": "SmolTalk,MMLU*3,GSM8K*4,identity*2,SimpleSpelling,SpellingBee",
    "generated": "identity*2,SimpleSpelling,SpellingBee,Arithmetic",
    "none": "",
}
HELD_BACK = 20
"""One conversation in twenty of files is for validation, if nothing else is."""


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
    """Random seed for the order of the conversations."""


def build_mixtures(config: MixtureConfig, files: TaskFiles) -> tuple[TaskMixture, TaskMixture]:
    """Build what to train on and what to validate on.

    Raises:
        UsageError: the list cannot be read, names no known task, or names nothing at all.
        DataError: files are missing or broken; the message says which and where.
    """
    entries = parse_mixture(config.mixture)
    if not entries and not config.jsonl:
        raise UsageError("--mixture none leaves nothing to learn: give --jsonl too, or tasks")
    # The user's own files first: a broken line is reported before gigabytes are downloaded.
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


def parse_mixture(text: str) -> list[TaskChoice]:
    """Read a preset's name or a list of tasks.

    Raises:
        UsageError: an entry cannot be read, or there is no such task.
    """
    text = PRESETS.get(text, text)
    flag = f"--mixture, which is {', '.join(PRESETS)}, or a list of tasks"
    return parse_choices(text, flag, (*TASKS, IdentityTask.name)) if text else []


def _build(entry: TaskChoice, split: str, config: MixtureConfig, files: TaskFiles) -> Task:
    train = split == "train"
    if entry.name != IdentityTask.name:
        task = build_task(entry.name, split, files)
    elif train and config.identity is not None:
        task = JsonlTask(config.identity)
    else:
        task = IdentityTask(split)
    return task[: entry.size] if train and entry.size is not None else task
