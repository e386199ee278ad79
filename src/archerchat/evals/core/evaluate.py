"""Evaluate CORE: one task after another, on one rank or several, keeping finished tasks.

Each rank takes its share of every task's examples, and the ranks' counts are added up.

`core_<step>.json` has the results. While an evaluation runs, `core_<step>.partial.json` holds the
finished tasks and their `key`: the model, the bundle and the options that they belong to. An
evaluation with another key starts over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from archerchat.config import Config, Limit, PositiveInt, from_json
from archerchat.distributed import Ranks
from archerchat.evals.core.bundle import Bundle, CoreTask, read_examples
from archerchat.evals.core.layout import tokens_to_run
from archerchat.evals.core.prompts import Prompter, Tree, choose_examples
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.evals.statistics import Interval, TaskResult, mean_score
from archerchat.files import write_json
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer

PROBES = 4
"""Examples per task that an estimate looks at."""
NEAR_TIE = 1e-5
"""Mean losses, or logits, that differ by less may swap with any change of arithmetic."""
FULL_TASKS = 22
MOST_NAMED = 4
"""Most tasks that a note names one by one."""


@dataclass(frozen=True)
class CoreOptions(Config):
    """CORE options."""

    max_per_task: PositiveInt | None = None
    """Maximum examples per CORE task. Defaults to all."""
    max_length: Annotated[int, Limit(2)] | None = None
    """Maximum tokens per CORE prompt. Longer ones are cropped on the left. Defaults to no limit,
    as in the reference."""


@dataclass(frozen=True, kw_only=True)
class CoreTaskResult(TaskResult):
    """One task of CORE."""

    num_fewshot: int
    prompt_tokens: int
    """Tokens in all prompts."""
    tokens_run: int
    """Prompt tokens that had to be run; the rest were shared or out of every window's reach."""
    near_ties: tuple[int, ...] = ()
    """Examples whose outcome is within `NEAR_TIE` of another."""
    cropped: int = 0
    """Examples that lost tokens on the left to `--max-length`."""
    beyond_sequence: int = 0
    """Examples with a prompt longer than the model's sequence length, which its windows bound."""
    unscored: int = 0
    """Examples with an option that has nothing to score."""

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "accuracy": self.accuracy,
            "centred": self.centred,
            "examples_per_second": self.examples_per_second,
        }


@dataclass(frozen=True)
class CoreResult:
    """All tasks of an evaluation."""

    tasks: tuple[CoreTaskResult, ...]

    @property
    def core(self) -> float:
        """The mean centred accuracy."""
        return mean_score(self.tasks)[0]

    @property
    def interval(self) -> Interval:
        """CORE's 95 % interval: what drawing other examples of these tasks may change."""
        return mean_score(self.tasks)[1]

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        return {
            "core": self.core,
            "interval": list(self.interval),
            "num_tasks": len(self.tasks),
            "seconds": self.seconds,
            "tasks": [task.to_json() for task in self.tasks],
        }


class PartialResults:
    """The finished tasks of a running evaluation, kept in a file if a `path` is given.

    Args:
        key: JSON of everything that the figures depend on.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, json.loads(json.dumps(key))
        self.tasks: dict[str, CoreTaskResult] = {}  # by label
        # A missing, broken or foreign file is replaced.
        with suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads(path.read_bytes() if path else b"{}")
            if content["key"] == self._key:
                found = [from_json(CoreTaskResult, value) for value in content["tasks"]]
                self.tasks = {task.label: task for task in found}

    def add(self, result: CoreTaskResult) -> None:
        """Keep one more task."""
        self.tasks[result.label] = result
        if self._path is not None:
            tasks = [task.to_json() for task in self.tasks.values()]
            write_json(self._path, {"key": self._key, "tasks": tasks})

    def remove(self) -> None:
        """Delete the file: the results are complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Estimate:
    """How much work a task is."""

    examples: int
    """Examples over all ranks."""
    tokens: float
    """Prompt tokens that this rank has to run."""


Progress = Callable[[str, float], None]
"""Called with a task's label and the share of it that is done."""


class CoreEvaluation:
    """Evaluate models on one bundle.

    Args:
        keep_prompts: keep every task's prompts in memory for the next run, as in training.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        options: CoreOptions | None = None,
        ranks: Ranks | None = None,
        keep_prompts: bool = False,
    ) -> None:
        self.bundle, self.tokenizer = bundle, tokenizer
        self.options, self.ranks = options or CoreOptions(), ranks or Ranks()
        self._keeps = keep_prompts
        self._prepared: dict[str, tuple[list[int], list[Tree], int]] = {}

    def run(
        self,
        model: Transformer,
        kept: PartialResults | None = None,
        on_task: Callable[[CoreTaskResult], None] = lambda result: None,
        on_progress: Progress = lambda label, share: None,
    ) -> CoreResult:
        """Evaluate every task that is not kept already; raises as `prepare` does.

        Args:
            model: best in the form for inference (`build_inference_model`).
            kept: finished tasks; each that is done here is added. Rank 0's count.
            on_task: called with each result, kept ones included.
        """
        kept = kept or PartialResults(None, {})
        known, results = self.ranks.gather(list(kept.tasks))[0], []
        for task in self.bundle.tasks:
            if task.label not in known:
                kept.add(self._run_task(model, task, on_progress))
            if task.label in kept.tasks:  # rank 0 has all
                results.append(kept.tasks[task.label])
                on_task(results[-1])
        return CoreResult(tuple(self.ranks.gather(results)[0]))

    def _run_task(
        self, model: Transformer, task: CoreTask, on_progress: Progress
    ) -> CoreTaskResult:
        on_progress(task.label, 0.0)
        started = time.perf_counter()
        gold, trees, cropped = self.prepare(task)
        length = model.config.sequence_length
        outcomes = torch.zeros(len(gold), 2, dtype=torch.float64)  # right, near a tie
        done = 0
        for batch in iter_outcomes(model, trees, task.task_type):
            done += len(batch)
            for outcome in batch:
                outcomes[outcome.index, 0] = outcome.is_correct(gold[outcome.index])
                outcomes[outcome.index, 1] = outcome.margin < NEAR_TIE
            on_progress(task.label, done / len(trees))
        outcomes = self.ranks.sum(outcomes)
        counts = {
            "tokens_run": sum(tokens_to_run(tree, model.config.windows) for tree in trees),
            "prompt_tokens": sum(sum(tree.lengths) for tree in trees),
            "cropped": cropped,
            "beyond_sequence": sum(max(tree.lengths) > length for tree in trees),
            "unscored": sum(tree.has_unscored for tree in trees),
        }
        sums = self.ranks.sum(torch.tensor(list(counts.values()), dtype=torch.float64))
        return CoreTaskResult(
            label=task.label,
            task_type=task.task_type,
            num_fewshot=task.num_fewshot,
            examples=len(gold),
            correct=int(outcomes[:, 0].sum()),
            random_baseline=task.random_baseline,
            seconds=time.perf_counter() - started,
            near_ties=tuple(outcomes[:, 1].nonzero().flatten().tolist()),
            **dict(zip(counts, sums.long().tolist(), strict=True)),
        )

    def prepare(self, task: CoreTask) -> tuple[list[int], list[Tree], int]:
        """Return every example's right option, this rank's trees, and how many were cropped.

        Raises:
            DataError: the file is missing or broken, or holds too few examples.
        """
        if task.label in self._prepared:
            return self._prepared[task.label]
        prompter = self._prompter(task)
        gold = [example.gold for example in prompter.examples[: self.options.max_per_task]]
        trees = [prompter.tree(index) for index in self.ranks.share(len(gold))]
        prepared = gold, trees, prompter.cropped
        if self._keeps:
            self._prepared[task.label] = prepared
        return prepared

    def _prompter(self, task: CoreTask) -> Prompter:
        examples = choose_examples(read_examples(task), task, self.options.max_per_task)
        return Prompter(task, examples, self.tokenizer, self.options.max_length)

    def estimate(self, windows: Sequence[int], done: Collection[str] = ()) -> dict[str, Estimate]:
        """Estimate each task that is not done, by label, from a few examples; raises as `prepare`.

        Args:
            windows: the model's, per layer.
        """
        found = {}
        for task in [task for task in self.bundle.tasks if task.label not in done]:
            prompter = self._prompter(task)
            count = len(prompter.examples[: self.options.max_per_task])
            own = self.ranks.share(count)
            chosen = own[:: max(1, len(own) // PROBES)][:PROBES] or range(1)
            tokens = sum(tokens_to_run(prompter.tree(index), windows) for index in chosen)
            found[task.label] = Estimate(count, tokens * len(own) / len(chosen))
        return found


def is_offline(tasks: Sequence[CoreTask | CoreTaskResult]) -> bool:
    """Whether these are the package's own tasks, which are not CORE."""
    return all(task.label.startswith("offline_") for task in tasks)


def describe(result: CoreResult) -> list[str]:
    """Return notes that belong beside the figures."""
    notes, count = [], len(result.tasks)
    if is_offline(result.tasks):
        notes.append(
            "these tasks are not CORE: their score can be compared with nothing but itself"
        )
    elif count != FULL_TASKS:
        notes.append(f"the mean of {count} tasks is not the published CORE, which has {FULL_TASKS}")
    for what, name in (
        ("were cropped on the left", "cropped"),
        ("have a prompt beyond the model's sequence length", "beyond_sequence"),
        ("have an option with nothing to score, which wins only if it stands first", "unscored"),
    ):
        counts = {t.label: getattr(t, name) for t in result.tasks if getattr(t, name)}
        if counts:
            named = ", ".join(f"{label} {count}" for label, count in counts.items())
            where = f"in {len(counts)} tasks" if len(counts) > MOST_NAMED else named
            notes.append(f"{sum(counts.values())} examples {what}: {where}")
    ties = {t.label: ", ".join(map(str, t.near_ties)) for t in result.tasks if t.near_ties}
    if ties:
        named = "; ".join(f"{label} {examples}" for label, examples in ties.items())
        notes.append(f"near-ties (closer than {NEAR_TIE:g}), by example: {named}")
    return notes
