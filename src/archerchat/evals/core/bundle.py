"""Find and read an evaluation bundle: its tasks, their examples, and what chance would score.

    core.yaml             the tasks: label, file, type, shots, delimiter
    eval_meta_data.csv    the random baseline of each label, a percentage
    eval_data/            the files that `core.yaml` names, one JSON object per line

A bundle is a folder, or a zip archive with the bundle at its top or in one folder. An archive is
downloaded once, checked, unpacked to a temporary folder, read as a bundle and renamed, so a folder
of that name is always complete. A task's own file is read just before the task is evaluated, and
every line is checked before any is scored.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped,unused-ignore]

from archerchat.downloads import Notify, download_file
from archerchat.errors import DataError, UsageError
from archerchat.files import exclusive, explained_writes, new_directory, sha256_file
from archerchat.text_files import iter_lines, iter_rows

TASK_LIST = "core.yaml"
BASELINES = "eval_meta_data.csv"
DATA = "eval_data"
DEFAULT_DELIMITER = " "
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The reference's archive."""
MAX_BYTES = 4 * 2**30
"""Largest unpacked bundle; the reference's is far smaller."""
OFFLINE_BUNDLE = Path(__file__).with_name("offline")

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
COLUMNS: dict[TaskType, tuple[str, str]] = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}
"""Columns of a line that hold its questions and its answers."""
OPTIONS = ("choices", "context_options")
"""Columns that hold a list of texts; the others hold one text."""


@dataclass(frozen=True)
class CoreTask:
    """One task of a bundle."""

    label: str
    path: Path
    task_type: TaskType
    num_fewshot: int
    """Solved examples before the question, k."""
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
        """Return a hexadecimal SHA-256 of everything that decides the outcomes."""
        names = ("label", "task_type", "num_fewshot", "delimiter", "random_baseline")
        settings = [[getattr(task, name) for name in names] for task in self.tasks]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for path in sorted({task.path for task in self.tasks}):
            digest.update(f"{path.relative_to(self.directory)} {sha256_file(path)}\n".encode())
        return digest.hexdigest()


def find_bundle(
    given: str | None, cache_dir: Path, *, notify: Notify = lambda message: None
) -> Path:
    """Return a bundle's folder.

    Args:
        given: a folder, the address of an archive, `offline` for the package's own tasks, or None
            for the reference's archive.
        cache_dir: folder for downloads.

    Raises:
        UsageError: there is no such folder.
        DataError: the archive cannot be downloaded, or is no bundle.
    """
    if given == "offline":
        return OFFLINE_BUNDLE
    if given is not None and not given.startswith(("http://", "https://")):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UsageError(
                f"--bundle {given}: there is no such folder; give one with {TASK_LIST}, or leave "
                "it out to download the bundle"
            )
        return folder
    url = given or BUNDLE_URL
    folder = cache_dir / "eval_bundles" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if not folder.is_dir():
        notify(f"fetching {url}")
        archive = folder.with_suffix(".zip")
        with explained_writes(folder.parent), exclusive(folder.parent):
            hint = "--bundle DIR names a folder with core.yaml, eval_meta_data.csv and eval_data"
            download_file(url, archive, check_archive, without_network=hint, notify=notify)
            try:
                with zipfile.ZipFile(archive) as source, new_directory(folder) as temporary:
                    source.extractall(temporary)  # never writes outside, whatever the names
                    load_bundle(_find_root(temporary))
            finally:  # not kept if it is no bundle, either: the server may replace it
                archive.unlink()
    return _find_root(folder)


def check_archive(path: Path) -> None:
    """Raise a DataError unless an archive is whole, and not too large."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise DataError(f"{path} would unpack to more than {MAX_BYTES / 2**30:.0f} GiB")
            if broken := archive.testzip():
                raise DataError(f"{path}: the checksum of {broken!r} is wrong")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is no usable zip archive: {error}") from error


def _find_root(folder: Path) -> Path:
    """Return where the bundle is in an unpacked archive: at the top, or in one folder."""
    lists = [*folder.glob(TASK_LIST), *folder.glob(f"*/{TASK_LIST}")]
    if len(lists) != 1:
        raise DataError(f"the archive holds {len(lists)} files {TASK_LIST}; a bundle has one")
    return lists[0].parent


def _refuse(problem: str) -> None:
    raise DataError(f"{problem}, or get the whole bundle again")


def load_bundle(directory: Path) -> Bundle:
    """Read the list of tasks and their baselines; a DataError names what is missing or broken."""
    listing = directory / TASK_LIST
    try:
        content = yaml.safe_load("".join(line for _, line in iter_lines(listing, _refuse)))
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
    if kind not in tuple(COLUMNS):  # a list cannot be looked up in a dict
        wrong = f"is of type {kind!r}, which is none of {', '.join(COLUMNS)}"
    elif not isinstance(uri, str) or not (root / uri).resolve().is_relative_to(root):
        wrong = f"names the file {uri!r}, which is not one under {DATA}"
    elif type(shots) is not int or shots < 0:
        wrong = f"has num_fewshot {shots!r}; it must be one number, 0 or more"
    elif not isinstance(delimiter, str):
        wrong = f"has the delimiter {delimiter!r}, which is no text"
    elif label not in baselines:
        wrong = f"has no line in {BASELINES}, which must give its random baseline"
    if wrong:
        raise DataError(f"{directory / TASK_LIST}: task {label!r} {wrong}")
    return CoreTask(label, directory / DATA / uri, kind, shots, delimiter, baselines[label])


def _read_baselines(path: Path) -> dict[str, float]:
    baselines = {}
    for where, row in iter_rows(path, _refuse):
        label, percent = row.get("Eval Task"), row.get("Random baseline")
        if label is None or percent is None:
            raise DataError(f"{path} must have the columns 'Eval Task' and 'Random baseline'")
        try:
            baselines[label] = float(percent) / 100
        except ValueError as error:
            raise DataError(f"{where}: {label} has the baseline {percent!r}, no number") from error
        if not 0 <= baselines[label] < 1:
            raise DataError(f"{where}: {label} has the baseline {percent} %; it must be under 100")
    return baselines


def read_examples(task: CoreTask) -> list[Example]:
    """Read a task; a DataError if the file cannot be read, a line is broken, or there is none."""
    examples = []
    for where, row in iter_rows(task.path, _refuse):
        try:
            examples.append(_parse_example(row, task.task_type))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{where} is no example of task {task.label} ({reason}): correct it or get the "
                "bundle again"
            ) from error
    if not examples:
        raise DataError(f"task {task.label}: {task.path} holds no example: get the bundle again")
    return examples


def _parse_example(row: Any, task_type: TaskType) -> Example:
    questions, answers = (_texts(row[name], name) for name in COLUMNS[task_type])
    options = max(len(questions), len(answers))
    gold = 0 if options == 1 else row["gold"]
    if type(gold) is not int or not 0 <= gold < options:
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
