"""Evaluate CORE: task after task, on one rank or many, keeping what is done.

Rank r of W takes examples r, r + W, ... of each task; what they found is added up. Prompts are
made once: a `CoreEvaluation` that is run again, as in training, has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from archerchat.distributed import Ranks
from archerchat.errors import UsageError
from archerchat.evals.core.bundle import Bundle, Task, read_examples
from archerchat.evals.core.forward import Scorer
from archerchat.evals.core.prompts import Prompter, choose_examples
from archerchat.evals.core.results import NEAR_TIE, CoreResult, PartialResults, TaskResult
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.evals.core.trees import Tree, build_tree
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class CoreOptions:
    """What decides the figures, and how much is run at a time."""

    max_per_task: int | None = None
    """Examples of each task at most, but never fewer than its few-shot examples and one."""
    max_length: int | None = None
    """Tokens of a prompt at most; longer ones are cropped on the left. None keeps them whole."""
    batch_tokens: int | None = None
    """Tokens at a time; by default what fills the device."""


@dataclass(frozen=True)
class PreparedTask:
    """A rank's examples of one task, tokenized."""

    task: Task
    examples: int
    """Of all ranks."""
    gold: Sequence[int]
    """By example, of all ranks."""
    trees: Sequence[Tree]
    """This rank's."""
    prompt_tokens: int
    cropped: int
    beyond_sequence: int
    unscored: int
    seconds: float
    """That it took."""


Progress = Callable[[str, float], None]
"""Learns a task's label and the share of it that is done."""


def prepare_task(
    task: Task, tokenizer: Tokenizer, options: CoreOptions, ranks: Ranks, sequence_length: int
) -> PreparedTask:
    """Read, choose, render and tokenize a task's examples.

    Raises:
        DataError: the file is missing or broken, or holds too few examples.
    """
    started = time.perf_counter()
    examples = choose_examples(read_examples(task), task, options.max_per_task)
    prompter = Prompter(task, examples, tokenizer, options.max_length)
    trees, tokens, beyond, unscored = [], 0, 0, 0
    for index in ranks.share(len(examples)):
        prompts = prompter.prompts(index)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        tokens += sum(lengths)
        beyond += max(lengths) > sequence_length
        unscored += any(p.start == n for p, n in zip(prompts, lengths, strict=True))
        trees.append(build_tree(index, prompts))
    return PreparedTask(
        task,
        len(examples),
        [example.gold for example in examples],
        trees,
        tokens,
        prompter.cropped,
        beyond,
        unscored,
        time.perf_counter() - started,
    )


class CoreEvaluation:
    """Evaluate models on one bundle.

    Args:
        keep_prompts: keep every task's prompts for the next run; a task's are dropped otherwise.
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
        self._prepared: dict[str, PreparedTask] = {}
        for name, least in (("max_per_task", 1), ("max_length", 2), ("batch_tokens", 1)):
            value = getattr(self.options, name)
            if value is not None and value < least:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {value}; it must be at least {least}")

    def run(
        self,
        model: Transformer,
        kept: PartialResults | None = None,
        on_task: Callable[[TaskResult], None] = lambda result: None,
        on_progress: Progress = lambda label, share: None,
    ) -> CoreResult:
        """Evaluate every task that is not kept already.

        Args:
            model: best in the form for inference (`InferenceModel`).
            kept: finished tasks, which grow by each that is done here; rank 0's count.
            on_task: learns each result, kept ones too.

        Raises:
            DataError: a task's file is missing or broken.
        """
        kept = kept or PartialResults(None, {})
        tasks = self.bundle.tasks
        flags = [self.ranks.rank == 0 and task.label in kept.tasks for task in tasks]
        known = self.ranks.sum(torch.tensor(flags, dtype=torch.float64))
        scorer, results = Scorer(model), []
        for task, is_known in zip(tasks, known.tolist(), strict=True):
            if not is_known:
                result = self._run_task(scorer, task, on_progress)
                if self.ranks.rank == 0:
                    kept.add(result)
                else:
                    kept.tasks[task.label] = result
            if task.label in kept.tasks:  # rank 0 has all
                results.append(kept.tasks[task.label])
                on_task(results[-1])
        return CoreResult(tuple(results))

    def _run_task(self, scorer: Scorer, task: Task, on_progress: Progress) -> TaskResult:
        on_progress(task.label, 0.0)
        prepared = self._prepare(task, scorer.model.config.sequence_length)
        started = time.perf_counter()
        outcomes = torch.zeros(prepared.examples, 2, dtype=torch.float64)  # right, near a tie
        tokens, done = 0, 0
        batch_tokens = self.options.batch_tokens
        for batch, count in iter_outcomes(scorer, prepared.trees, task.task_type, batch_tokens):
            tokens, done = tokens + count, done + len(batch)
            for outcome in batch:
                outcomes[outcome.index, 0] = outcome.is_correct(prepared.gold[outcome.index])
                outcomes[outcome.index, 1] = outcome.margin < NEAR_TIE
            on_progress(task.label, done / len(prepared.trees))
        outcomes = self.ranks.sum(outcomes)
        counts = [tokens, prepared.prompt_tokens, prepared.cropped]
        counts += [prepared.beyond_sequence, prepared.unscored]
        sums = self.ranks.sum(torch.tensor(counts, dtype=torch.float64)).long().tolist()
        return TaskResult(
            label=task.label,
            task_type=task.task_type,
            num_fewshot=task.num_fewshot,
            examples=prepared.examples,
            correct=int(outcomes[:, 0].sum()),
            random_baseline=task.random_baseline,
            seconds=time.perf_counter() - started + prepared.seconds,
            tokens_run=sums[0],
            prompt_tokens=sums[1],
            near_ties=tuple(outcomes[:, 1].nonzero().flatten().tolist()),
            cropped=sums[2],
            beyond_sequence=sums[3],
            unscored=sums[4],
        )

    def _prepare(self, task: Task, sequence_length: int) -> PreparedTask:
        if task.label in self._prepared:
            return self._prepared[task.label]
        prepared = prepare_task(task, self.tokenizer, self.options, self.ranks, sequence_length)
        if self._keeps:
            self._prepared[task.label] = replace(prepared, seconds=0.0)
        return prepared
