"""Evaluate CORE: one task after another, on one rank or several, keeping finished tasks.

Each rank takes its share of every task's examples, and the ranks' counts are added up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from archerchat.config import Config, Limit, PositiveInt
from archerchat.distributed import Ranks
from archerchat.evals.core.bundle import Bundle, CoreTask, read_examples
from archerchat.evals.core.layout import tokens_to_run
from archerchat.evals.core.prompts import Prompter, Tree, choose_examples
from archerchat.evals.core.results import NEAR_TIE, CoreResult, CoreTaskResult, PartialResults
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer

PROBES = 4
"""Examples per task that an estimate looks at."""


@dataclass(frozen=True)
class CoreOptions(Config):
    """CORE options."""

    max_per_task: PositiveInt | None = None
    """Maximum examples per CORE task. Defaults to all."""
    max_length: Annotated[int, Limit(2)] | None = None
    """Maximum tokens per CORE prompt. Longer ones are cropped on the left. Defaults to no limit,
    as in the reference."""


@dataclass(frozen=True)
class Estimate:
    """How much work a task is."""

    examples: int
    """Over all ranks."""
    tokens: float
    """Those of prompts that this rank has to run."""


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
        """Evaluate every task that is not kept already.

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
        """Estimate the work of each task that is not done, by label, from a few of its examples.

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
