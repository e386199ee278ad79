"""Read an evaluation bundle: its tasks, their examples, and what chance would score.

    core.yaml             the tasks: label, file, type, shots, delimiter
    eval_meta_data.csv    the random baseline of each label, a percentage
    eval_data/            the files that `core.yaml` names, one JSON object per line

`load_bundle` reads the two lists and makes sure that every file is there. A task's own file is
read when its turn comes (`read_examples`), and every line is checked before any is scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped,unused-ignore]

from archerchat.errors import DataError
from archerchat.files import sha256_file

TASK_LIST = "core.yaml"
BASELINES = "eval_meta_data.csv"
DATA = "eval_data"
DEFAULT_DELIMITER = " "

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)
COLUMNS: dict[TaskType, tuple[str, str]] = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}
"""Where a line has its questions and its answers."""
OPTIONS = ("choices", "context_options")
"""Columns that hold a list of texts; the others hold one text."""


@dataclass(frozen=True)
class CoreTask:
    """One task of a bundle."""

    label: str
    path: Path
    task_type: TaskType
    num_fewshot: int
    """Solved examples before the one that is asked, k."""
    delimiter: str
    """Text between a question and its answer."""
    random_baseline: float
    """Accuracy of guessing, from 0 to 1."""


@dataclass(frozen=True)
class Example:
    """One line of a task: a question with its options.

    Each of `questions` goes with each of `answers`; one of the two lists has a single entry, and
    the other the options (both have one in language modelling).
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int
    """Index of the right option."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's tasks, in its order."""

    directory: Path
    tasks: tuple[CoreTask, ...]

    def fingerprint(self) -> str:
        """Return a hexadecimal SHA-256 over everything that decides the outcomes."""
        settings = [
            [t.label, t.task_type, t.num_fewshot, t.delimiter, t.random_baseline]
            for t in self.tasks
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for path in sorted({task.path for task in self.tasks}):
            digest.update(f"{path.relative_to(self.directory)} {sha256_file(path)}\n".encode())
        return digest.hexdigest()


def load_bundle(directory: Path) -> Bundle:
    """Read the list of tasks and their baselines.

    Raises:
        DataError: a file is missing or broken, or a task's type is unknown; the message names it.
    """
    listing = directory / TASK_LIST
    try:
        content = yaml.safe_load(_read(listing))
    except yaml.YAMLError as error:
        raise DataError(f"{listing} is not YAML: {' '.join(str(error).split())}") from error
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{listing} has no list `icl_tasks`: is this an evaluation bundle?")
    baselines = _read_baselines(directory / BASELINES)
    tasks = tuple(_parse_task(entry, directory, baselines) for entry in entries)
    labels = [task.label for task in tasks]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise DataError(f"{listing} has two tasks {twice[0]!r}: rename or remove one")
    if absent := [f"{task.label} ({task.path})" for task in tasks if not task.path.is_file()]:
        raise DataError(
            f"the bundle {directory} lacks the files of {', '.join(absent)}: get them, or take "
            f"these tasks out of {TASK_LIST}"
        )
    return Bundle(directory, tasks)


def _parse_task(entry: Any, directory: Path, baselines: dict[str, float]) -> CoreTask:
    label = entry.get("label") if isinstance(entry, dict) else None
    if not isinstance(label, str):
        raise DataError(f"{directory / TASK_LIST} has a task without a `label`: {entry!r}")
    uri, kind, shots = (entry.get(k) for k in ("dataset_uri", "icl_task_type", "num_fewshot"))
    delimiter = entry.get("continuation_delimiter", DEFAULT_DELIMITER)
    if isinstance(shots, list) and len(shots) == 1:
        shots = shots[0]
    root = (directory / DATA).resolve()
    wrong = None
    if kind not in TASK_TYPES:
        wrong = f"is of type {kind!r}, which is none of {', '.join(TASK_TYPES)}"
    elif not isinstance(uri, str) or not (root / uri).resolve().is_relative_to(root):
        wrong = f"names the file {uri!r}, which is not one under {DATA}"
    elif not _is_integer(shots) or shots < 0:
        wrong = f"has num_fewshot {shots!r}; it must be one number, 0 or more"
    elif not isinstance(delimiter, str):
        wrong = f"has the delimiter {delimiter!r}, which is no text"
    elif label not in baselines:
        wrong = f"has no line in {BASELINES}, which must give its random baseline"
    if wrong:
        raise DataError(f"{directory / TASK_LIST}: task {label!r} {wrong}")
    return CoreTask(label, directory / DATA / uri, kind, shots, delimiter, baselines[label])


def _read_baselines(path: Path) -> dict[str, float]:
    """Return the accuracy of guessing by label."""
    baselines = {}
    for row in csv.DictReader(io.StringIO(_read(path))):
        label, percent = row.get("Eval Task"), row.get("Random baseline")
        if label is None or percent is None:
            raise DataError(f"{path} must have the columns 'Eval Task' and 'Random baseline'")
        try:
            baselines[label] = float(percent) / 100
        except ValueError as error:
            raise DataError(f"{path}: {label} has the baseline {percent!r}, no number") from error
        if not 0 <= baselines[label] < 1:
            raise DataError(f"{path}: {label} has the baseline {percent} %; it must be under 100")
    return baselines


def read_examples(task: CoreTask) -> list[Example]:
    """Read every line of a task.

    Raises:
        DataError: the file cannot be read, a line is broken, or there is none.
    """
    examples = []
    for number, line in enumerate(_read(task.path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(_parse_example(json.loads(line), task.task_type))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"task {task.label}: line {number} of {task.path} is broken ({reason}): correct "
                "it or get the bundle again"
            ) from error
    if not examples:
        raise DataError(f"task {task.label}: {task.path} holds no example: get the bundle again")
    return examples


def _parse_example(row: Any, task_type: TaskType) -> Example:
    questions, answers = (_texts(row[name], name) for name in COLUMNS[task_type])
    options = max(len(questions), len(answers))
    gold = 0 if options == 1 else row["gold"]
    if not _is_integer(gold) or not 0 <= gold < options:
        raise ValueError(f"gold is {gold!r}; it must be from 0 to {options - 1}")
    return Example(questions, answers, gold)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Return the texts of a column; those of `OPTIONS` have a list of at least two."""
    if name in OPTIONS and not (isinstance(value, list) and len(value) > 1):
        raise TypeError(f"{name} is {value!r}, not a list of at least two")
    texts = value if name in OPTIONS else [value]
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} has {strange[0]!r}, which is no text")
    return tuple(texts)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}: is this the whole evaluation bundle?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
