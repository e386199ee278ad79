"""Evaluate a model on tasks; each rank takes its share of every task.

evaluator = ChatEvaluator(model, tokenizer, SamplingParams(512, temperature=0))
result = evaluator.evaluate(build_task("GSM8K", "test", files), limit=200)
print(result.accuracy, result.interval)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from archerchat.distributed import Ranks
from archerchat.errors import DataError, UsageError
from archerchat.evals.chat.categorical import choose_letters
from archerchat.evals.chat.generative import Answer, answer_problems, render_question
from archerchat.evals.chat.results import TaskResult
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.model.transformer import Transformer
from archerchat.tasks.base import Task
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_for_completion

LIMIT_SEED = 1337
"""Seed for the shuffle before a limit: data sets are sorted by subject."""

OnProgress = Callable[[int, int], None]
"""Called with the number of answers that this rank has, and that it will have."""


def limited(task: Task, limit: int | None) -> Task:
    """Return `limit` examples of a task, drawn over all of it; the whole task for None.

    Raises:
        UsageError: the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} problems of {task.name} cannot be asked: give at least 1")
    return task if limit is None or limit >= len(task) else task.shuffled(LIMIT_SEED)[:limit]


class ChatEvaluator:
    """Evaluate one model.

    Args:
        params: for generative tasks.
        max_batch: most answers to generate at a time.
        ranks: the processes that share the work.
        engine: the model's engine, if there is one already.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        params: SamplingParams,
        max_batch: int = 64,
        ranks: Ranks | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.tokenizer, self.params, self._ranks = tokenizer, params, ranks or Ranks()
        self._engine = engine or Engine(model, max_batch)

    def evaluate(
        self,
        task: Task,
        limit: int | None = None,
        on_progress: OnProgress = lambda done, total: None,
        on_answer: Callable[[Answer], None] = lambda answer: None,
    ) -> TaskResult:
        """Return what the model gets right, over all ranks.

        Args:
            limit: number of problems; by default all.
            on_answer: given every answer that this rank generated.

        Raises:
            DataError: the task is empty, or its files are broken.
            UsageError: the limit is not positive, or the task is for training only.
            SandboxError: the task runs programs and there is no sandbox on this machine.
        """
        task = limited(task, limit)
        if not len(task):
            raise DataError(f"{task.name} has no problem to ask")
        started = time.perf_counter()
        samples = self.params.num_samples if task.kind == "generative" else 1
        # Right samples by problem, then the three other counts.
        counts = torch.zeros(len(task) + 3, dtype=torch.int64)
        share = list(self._ranks.share(len(task)))
        if share and task.kind == "categorical":
            self._categorical(task, share, counts, on_progress)
        elif share:
            self._generative(task, share, counts, on_progress, on_answer)
        *right, cut_prompts, cut_answers, tokens = self._ranks.sum(counts).tolist()
        seconds = time.perf_counter() - started
        return TaskResult(
            name=task.name,
            kind=task.kind,
            baseline=task.random_baseline,
            right=tuple(right),
            num_samples=samples,
            cut_prompts=cut_prompts,
            cut_answers=cut_answers,
            answer_tokens=tokens,
            seconds=seconds,
        )

    def _categorical(
        self, task: Task, share: list[int], counts: torch.Tensor, on_progress: OnProgress
    ) -> None:
        conversations = [task[index] for index in share]
        prompts = [render_for_completion(self.tokenizer, each) for each in conversations]
        letters = [each["letters"] for each in conversations]
        chosen = choose_letters(
            self._engine.model,
            self.tokenizer,
            prompts,
            letters,
            lambda done: on_progress(done, len(share)),
        )
        for index, conversation, letter in zip(share, conversations, chosen, strict=True):
            counts[index] = task.evaluate(conversation, letter)

    def _generative(
        self,
        task: Task,
        share: list[int],
        counts: torch.Tensor,
        on_progress: OnProgress,
        on_answer: Callable[[Answer], None],
    ) -> None:
        engine = self._engine
        rendered = [
            render_question(self.tokenizer, task[index], engine.max_length) for index in share
        ]
        total = len(share) * self.params.num_samples
        answers = answer_problems(
            engine,
            self.tokenizer,
            task,
            share,
            [prompt for prompt, _ in rendered],
            self.params,
            lambda done: on_progress(done, total),
        )
        counts[-3] = sum(cut for _, cut in rendered)
        for answer in answers:
            counts[answer.problem] += answer.right
            counts[-2] += answer.completion.finish_reason in ("max_tokens", "length")
            counts[-1] += len(answer.completion.token_ids)
            on_answer(answer)
