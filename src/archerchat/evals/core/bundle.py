"""Read an evaluation bundle: which tasks there are, what they hold, what chance would score.

    core.yaml             the tasks: label, file, type, shots, delimiter
    eval_meta_data.csv    by label the random baseline, a percentage
    eval_data/            the files that `core.yaml` names, one JSON object a line

`load_bundle` reads the two lists and makes sure that every file is there; a task's own file is
read when its turn comes (`read_examples`), and every line of it is checked before any is scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
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


@dataclass(frozen=True)
class Task:
    """One task of a bundle."""

    label: str
    path: Path
    task_type: TaskType
    num_fewshot: int
    """Solved examples before the one that is asked, k."""
    delimiter: str
    """Between a question and its answer."""
    random_baseline: float
    """The accuracy of guessing, from 0 to 1."""

    def centred(self, accuracy: float) -> float:
        """Return the accuracy on a scale where guessing is 0 and perfection 1."""
        return (accuracy - self.random_baseline) / (1 - self.random_baseline)


@dataclass(frozen=True)
class Example:
    """One line of a task: what is asked, and the answers there are.

    Each of `questions` goes with each of `answers`; one of the two lists has a single entry, and
    the other the options (both have one in language modelling).
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int
    """The right option."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's tasks, in its order."""

    directory: Path
    tasks: tuple[Task, ...]

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
        DataError: a file is missing or broken, or a task is of a type nobody knows; the message
            names it.
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
    if absent := [task for task in tasks if not task.path.is_file()]:
        names = ", ".join(f"{task.label} ({task.path})" for task in absent)
        raise DataError(
            f"the bundle {directory} lacks the files of {names}: get them, or take these tasks "
            f"out of {TASK_LIST}"
        )
    return Bundle(directory, tasks)


def _parse_task(entry: Any, directory: Path, baselines: dict[str, float]) -> Task:
    listing = directory / TASK_LIST
    label = entry.get("label") if isinstance(entry, dict) else None
    if not isinstance(label, str):
        raise DataError(f"{listing} has a task without a `label`: {entry!r}")

    def wrong(what: str) -> DataError:
        return DataError(f"{listing}: task {label!r} {what}")

    uri, kind, shots = (entry.get(k) for k in ("dataset_uri", "icl_task_type", "num_fewshot"))
    delimiter = entry.get("continuation_delimiter", DEFAULT_DELIMITER)
    if kind not in TASK_TYPES:
        raise wrong(f"is of type {kind!r}, which is none of {', '.join(TASK_TYPES)}")
    root = (directory / DATA).resolve()
    if not isinstance(uri, str) or not (root / uri).resolve().is_relative_to(root):
        raise wrong(f"names the file {uri!r}, which is not one under {DATA}")
    if isinstance(shots, list) and len(shots) == 1:
        shots = shots[0]
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 0:
        raise wrong(f"has num_fewshot {shots!r}; it must be one number, 0 or more")
    if not isinstance(delimiter, str):
        raise wrong(f"has the delimiter {delimiter!r}, which is no text")
    if label not in baselines:
        raise wrong(f"has no line in {BASELINES}, which must give its random baseline")
    return Task(label, directory / DATA / uri, kind, shots, delimiter, baselines[label])


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


def read_examples(task: Task) -> list[Example]:
    """Read every line of a task.

    Raises:
        DataError: the file cannot be read, a line is broken, or there is none.
    """
    parse = _PARSERS[task.task_type]
    examples = []
    for number, line in enumerate(_read(task.path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"task {task.label}: line {number} of {task.path} is broken ({reason}): correct "
                "it or get the bundle anew"
            ) from error
    if not examples:
        raise DataError(f"task {task.label}: {task.path} holds no example: get the bundle anew")
    return examples


def _parse_multiple_choice(row: Any) -> Example:
    choices = _texts(row["choices"], "choices")
    return Example((_text(row["query"], "query"),), choices, _gold(row["gold"], len(choices)))


def _parse_schema(row: Any) -> Example:
    contexts = _texts(row["context_options"], "context_options")
    continuation = _text(row["continuation"], "continuation")
    return Example(contexts, (continuation,), _gold(row["gold"], len(contexts)))


def _parse_language_modeling(row: Any) -> Example:
    context, continuation = (_text(row[name], name) for name in ("context", "continuation"))
    return Example((context,), (continuation,), 0)


_PARSERS: dict[TaskType, Callable[[Any], Example]] = {
    "multiple_choice": _parse_multiple_choice,
    "schema": _parse_schema,
    "language_modeling": _parse_language_modeling,
}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, no text")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise TypeError(f"{name} is {value!r}, not a list of at least two")
    return tuple(_text(each, f"one of {name}") for each in value)


def _gold(value: Any, options: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < options:
        raise ValueError(f"gold is {value!r}; it must be from 0 to {options - 1}")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}: is this the whole evaluation bundle?") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
