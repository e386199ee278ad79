"""An evaluation bundle that needs no download: tasks in CORE's three formats, generated here.

    archerchat eval base --eval core --bundle offline

They are not CORE, and their score can be compared with nothing but itself: they exist so that the
whole path of an evaluation can be tried, and seen to rise in training, on a machine without a
network. They ask what a small model that has read Python and its documentation may learn: to
repeat what stood before, to close the bracket that is open, to count on. The examples are the
same on every machine and with every Python.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.evals.core.bundle import BASELINES, DATA, TASK_LIST, TaskType
from archerchat.files import new_directory
from archerchat.tasks.generated import load_words

NAME = "offline"
"""What `--bundle` calls them."""
PREFIX = "offline_"
"""Begins every label."""
EXAMPLES = 48
"""Examples per task."""
BRACKETS = {"(": ")", "[": "]", "{": "}"}

Row = dict[str, Any]


def _words(rng: random.Random, count: int) -> list[str]:
    """Draw different words, none longer than a few tokens."""
    return rng.sample([word for word in load_words("train") if 4 <= len(word) <= 8], count)


def _quoted_word(rng: random.Random) -> Row:
    """Which word stood in quotes?"""
    words = _words(rng, 4)
    gold = rng.randrange(4)
    query = f'The name of this module is "{words[gold]}". To use it, import'
    return {"query": query, "choices": words, "gold": gold}


def _closing_bracket(rng: random.Random) -> Row:
    """Which bracket is still open?"""
    name, first, second = _words(rng, 3)
    opening = rng.choice(list(BRACKETS))
    choices = list(BRACKETS.values())
    query = f"    {name} = {opening}{first}, {second}"
    return {"query": query, "choices": choices, "gold": choices.index(BRACKETS[opening])}


def _known_name(rng: random.Random, context: str, continuation: str) -> Row:
    """After which of two contexts is a name known?"""
    place, name, other = _words(rng, 3)
    gold = rng.randrange(2)
    names = [name, other] if gold == 0 else [other, name]
    contexts = [context.format(place=place, name=each) for each in names]
    return {"context_options": contexts, "continuation": name + continuation, "gold": gold}


def _imported_name(rng: random.Random) -> Row:
    return _known_name(rng, "from {place} import {name}\n\nresult =", "()")


def _defined_argument(rng: random.Random) -> Row:
    return _known_name(rng, "def {place}({name}):\n    return", "")


def _repeated_list(rng: random.Random) -> Row:
    """How does a list end that stood before?"""
    first, second, third = _words(rng, 3)
    context = f"{first}, {second}, {third}.\n{first}, {second},"
    return {"context": context, "continuation": third}


def _next_number(rng: random.Random) -> Row:
    """What number comes next?"""
    start = rng.randrange(1, 90)
    context = ", ".join(str(start + i) for i in range(4)) + ","
    return {"context": context, "continuation": str(start + 4)}


@dataclass(frozen=True)
class OfflineTask:
    """How one of the tasks is made."""

    label: str
    task_type: TaskType
    make: Callable[[random.Random], Row]
    num_fewshot: int
    baseline_percent: float
    """What guessing scores."""
    delimiter: str = " "


OFFLINE_TASKS = (
    OfflineTask("offline_quoted_word", "multiple_choice", _quoted_word, 0, 25),
    OfflineTask("offline_closing_bracket", "multiple_choice", _closing_bracket, 4, 100 / 3, ""),
    OfflineTask("offline_imported_name", "schema", _imported_name, 0, 50),
    OfflineTask("offline_defined_argument", "schema", _defined_argument, 3, 50),
    OfflineTask("offline_repeated_list", "language_modeling", _repeated_list, 0, 0),
    OfflineTask("offline_next_number", "language_modeling", _next_number, 5, 0),
)


def iter_examples(task: OfflineTask) -> Iterator[Row]:
    """Yield the task's examples, no two alike."""
    rng = random.Random(f"archerchat {task.label}")
    seen: set[str] = set()
    while len(seen) < EXAMPLES:
        row = task.make(rng)
        line = json.dumps(row, sort_keys=True)
        if line not in seen:
            seen.add(line)
            yield row


def offline_bundle(cache_dir: Path) -> Path:
    """Return the bundle's directory in the cache, written if it is not there yet.

    Raises:
        OSError: it cannot be written.
    """
    files, entries, baselines = {}, [], ["Eval Task,Random baseline\n"]
    for task in OFFLINE_TASKS:
        uri = f"{task.label}.jsonl"
        files[f"{DATA}/{uri}"] = "".join(json.dumps(row) + "\n" for row in iter_examples(task))
        baselines.append(f"{task.label},{task.baseline_percent}\n")
        entries.append(
            {
                "label": task.label,
                "dataset_uri": uri,
                "num_fewshot": [task.num_fewshot],
                "icl_task_type": task.task_type,
                "continuation_delimiter": task.delimiter,
            }
        )
    files[TASK_LIST] = json.dumps({"icl_tasks": entries}, indent=2) + "\n"  # which is YAML
    files[BASELINES] = "".join(baselines)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    directory = cache_dir / f"{NAME}-tasks-{digest}"
    if not directory.is_dir():
        with new_directory(directory) as new:
            for name, content in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(content, encoding="utf-8", newline="\n")
    return directory
