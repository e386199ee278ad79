"""Find tasks by the names that commands and reports use.

task = build_task("ARC-Easy", "test", files)[:200]
parse_choices("GSM8K*4,MMLU:500", "--mixture", TASKS)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from archerchat.errors import UsageError
from archerchat.tasks.base import Task, TaskMixture
from archerchat.tasks.collected import ARCTask, GSM8KTask, JsonlTask, MMLUTask, SmolTalkTask
from archerchat.tasks.generated import ArithmeticTask, SimpleSpellingTask, SpellingBeeTask
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.humaneval import HumanEvalTask
from archerchat.tasks.identity import IdentityTask

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
"""The tasks whose mean is ChatCORE (SPEC section 9)."""

TASKS: dict[str, Callable[[TaskFiles, str], Task]] = {
    "ARC-Easy": lambda files, split: ARCTask(files, "ARC-Easy", split),
    "ARC-Challenge": lambda files, split: ARCTask(files, "ARC-Challenge", split),
    "MMLU": lambda files, split: MMLUTask(files, MMLU_TRAIN if split == "train" else split),
    "GSM8K": GSM8KTask,
    "HumanEval": HumanEvalTask,
    "SmolTalk": SmolTalkTask,
    "SpellingBee": lambda files, split: SpellingBeeTask(split, _size(split, 80_000)),
    "SimpleSpelling": lambda files, split: SimpleSpellingTask(split, _size(split, 200_000)),
    "Arithmetic": lambda files, split: ArithmeticTask(split, _size(split, 80_000)),
}
MMLU_TRAIN = "auxiliary_train"
PRESETS = {
    "reference": "SmolTalk,MMLU*3,GSM8K*4,identity*2,SimpleSpelling,SpellingBee",
    "generated": "identity*2,SimpleSpelling,SpellingBee,Arithmetic",
    "none": "",
}
HELD_BACK = 20
"""One conversation in twenty of the files is for validation, if nothing else is."""
_CHOICE = re.compile(r"([\w-]+)(?::0*([1-9]\d*))?(?:\*0*([1-9]\d*))?")


@dataclass(frozen=True)
class TaskChoice:
    """One task of a list on a command line."""

    name: str
    size: int | None
    """Number of its examples to take; None takes all."""
    times: int
    """How often to count each of them."""


def build_task(name: str, split: str, files: TaskFiles) -> Task:
    """Return a split of the task `name`, in upper or lower case.

    Raises:
        UsageError: there is no such task or split; the message lists the known ones.
    """
    known = {each.lower(): build for each, build in TASKS.items()}
    if name.lower() not in known:
        raise UsageError(f"there is no task {name!r}: choose from {', '.join(TASKS)}")
    return known[name.lower()](files, split)


def _size(split: str, train: int) -> int:
    """Return the number of a generated task's examples."""
    return train if split == "train" else 256


def parse_choices(text: str, flag: str, names: Iterable[str]) -> list[TaskChoice]:
    """Read a list of some of the tasks `names`, in upper or lower case.

    Raises:
        UsageError: an entry cannot be read, or there is no such task; the message names `flag`.
    """
    known = {name.lower(): name for name in names}
    choices = []
    for word in text.replace(" ", "").split(","):
        match = _CHOICE.fullmatch(word)
        if match is None:
            raise UsageError(
                f"{flag}: {word!r} cannot be read: write a task's name, with :N for N of its "
                "examples and *N to count them N times, such as SpellingBee:5000*2"
            )
        name, size, times = match.groups()
        if name.lower() not in known:
            raise UsageError(
                f"{flag}: there is no task {name!r}: choose from {', '.join(known.values())}"
            )
        limit = None if size is None else int(size)
        choices.append(TaskChoice(known[name.lower()], limit, int(times or 1)))
    return choices


@dataclass(frozen=True)
class MixtureConfig:
    """Choose what to fine-tune on."""

    mixture: str = "reference"
    """`reference` downloads its data from the hub, `generated` needs no network, `none` leaves only
    your own --jsonl. Or a list such as GSM8K*4,identity*2,Arithmetic:20000."""
    jsonl: tuple[Path, ...] = ()
    """Files of your own conversations as JSON lines, or folders of them, added to the mixture. In a
    folder with files named train, those named validation (or test) are for validation."""
    val_jsonl: tuple[Path, ...] = ()
    """Files of conversations to validate on, instead of the tasks' tests."""
    skip_bad: bool = False
    """Leave out lines of --jsonl and --val-jsonl that are not conversations, and list the first."""
    identity: Path | None = None
    """JSON lines in which the assistant says who it is (from `archerchat data identity`).
    Defaults to the package's."""
    data_dir: Path | None = None
    """Folder of local files to use instead of the hub's."""
    mixture_seed: int = 42
    """Random seed for the order of the conversations."""


def build_mixtures(config: MixtureConfig, files: TaskFiles) -> tuple[TaskMixture, TaskMixture]:
    """Build what to train on, with the files of --jsonl last, and what to validate on.

    Raises:
        UsageError: the list cannot be read, names no known task, or names nothing at all.
        DataError: files are missing or broken; the message says which and where.
    """
    entries = parse_mixture(config.mixture)
    if not entries and not config.jsonl:
        raise UsageError("--mixture none leaves nothing to learn: give --jsonl too, or tasks")
    # The user's own files first: a broken line is reported before gigabytes are downloaded.
    skip, seed = config.skip_bad, config.mixture_seed
    own: list[Task] = [JsonlTask(path, "train", skip) for path in config.jsonl]
    judges: list[Task] = [JsonlTask(path, skip_bad=skip) for path in config.val_jsonl]
    if not judges:
        split = (path for path, task in zip(config.jsonl, own, strict=True) if task.split)
        judges = [JsonlTask(path, "validation", skip) for path in split]
    train = list[Task]()
    for entry in entries:
        train += [_build(entry, "train", config, files)] * entry.times
    if not config.val_jsonl:
        judges += [_build(entry, "test", config, files) for entry in entries]
    if not judges:
        shuffled = [task.shuffled(seed) for task in own]
        judges = [task[: max(1, len(task) // HELD_BACK)] for task in shuffled]
        own = [task[len(task) // HELD_BACK :] for task in shuffled]
    return TaskMixture([*train, *own], seed), TaskMixture(judges, seed)


def parse_mixture(text: str) -> list[TaskChoice]:
    """Read a preset's name or a list of tasks; raises as `parse_choices` does."""
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
