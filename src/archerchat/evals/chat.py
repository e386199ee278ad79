"""Evaluate a chat model on tasks: it writes answers, or chooses letters; each rank does its share.

    result = evaluate_task(engine, tokenizer, task, SamplingParams(512, temperature=0))
    print(result.accuracy, result.interval)

A generative task's answers follow from the seed, the problem and the sample alone, so they are the
same whatever the batch, the order and the number of ranks. Judging may take seconds (HumanEval runs
programs), so it happens in threads while the next answers are generated. A categorical task asks
for a letter, and nothing is generated: the answer is the letter with the greatest logit where the
answer begins. Its prompts run in batches of similar length, padded on the right. ChatCORE is the
mean over tasks (SPEC section 9).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from archerchat.distributed import Ranks
from archerchat.errors import DataError
from archerchat.evals.statistics import (
    Interval,
    TaskResult,
    mean_score,
    pass_at_k,
    pass_sizes,
)
from archerchat.inference.chat import build_answer_request
from archerchat.inference.engine import Engine
from archerchat.inference.prefill import iter_batches, prefill
from archerchat.inference.sampling_params import SamplingParams, derive_seed
from archerchat.inference.sequence import Completion, Request
from archerchat.inference.tools import spoken_text
from archerchat.model.transformer import Transformer
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.registry import CHATCORE
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_for_completion

ANSWER_TOKENS = 512
"""Most tokens of an answer in ChatCORE."""


@dataclass(frozen=True, kw_only=True)
class ChatTaskResult(TaskResult):
    """One task of a chat model."""

    pass_at: Mapping[int, float]
    """pass@k by k, up to the number of samples."""
    lenient: int | None = None
    """Samples that are right by the task's lenient rule; None for a task without one."""
    cut_prompts: int = 0
    """Prompts that were truncated to the context."""
    cut_answers: int = 0
    """Answers that ended by the limit of tokens or at the context's end."""
    answer_tokens: int = 0

    @property
    def lenient_accuracy(self) -> float | None:
        """The share of answers that are right by the lenient rule; None without one."""
        total = self.examples * self.num_samples
        return None if self.lenient is None else self.lenient / total

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        figures: dict[str, Any] = {
            "kind": self.task_type,
            "problems": self.examples,
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "lenient_accuracy": self.lenient_accuracy,
            "random_baseline": self.random_baseline,
            "centred": self.centred,
            "cut_prompts": self.cut_prompts,
            "seconds": round(self.seconds, 3),
        }
        if self.task_type == "generative":
            figures |= {
                "num_samples": self.num_samples,
                "pass_at": {str(k): value for k, value in self.pass_at.items()},
                "cut_answers": self.cut_answers,
                "answer_tokens": self.answer_tokens,
            }
        return figures


def chatcore(results: Sequence[TaskResult]) -> tuple[float, Interval] | None:
    """Return ChatCORE and its 95 % interval, or None unless all of its tasks are there."""
    found = {result.label: result for result in results}
    missing = set(CHATCORE) - found.keys()
    return None if missing else mean_score([found[name] for name in CHATCORE])


@dataclass(frozen=True)
class Answer:
    """One sample, judged."""

    problem: int
    """Index in the task."""
    sample: int
    completion: Completion
    text: str
    """What was judged: the answer without expressions and results."""
    right: bool
    """Whether it is right by the reference's rule."""
    lenient: bool
    """Whether it is right by that rule or by the task's lenient one."""
    prompt_cut: bool
    """Whether its prompt was truncated to leave room for it."""

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What it adds to a task's lenient samples, cut prompts, cut answers and tokens."""
        cut = self.completion.finish_reason in ("max_tokens", "length")
        prompt_cut = self.prompt_cut and self.sample == 0
        return self.lenient, prompt_cut, cut, len(self.completion.token_ids)


def build_request(
    tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams, problem: int
) -> Request:
    """Ask for a problem's samples, with the calculator; each problem has a seed of its own."""
    params = replace(params, seed=derive_seed(params.seed, problem))
    return build_answer_request(tokenizer, prompt, params)


def render_question(
    tokenizer: Tokenizer, conversation: Conversation, max_length: int
) -> tuple[list[int], bool]:
    """Return a prompt that leaves room for an answer, and whether it was truncated for that."""
    prompt = render_for_completion(tokenizer, conversation)
    if len(prompt) < max_length:
        return prompt, False
    return render_for_completion(tokenizer, conversation, max_length - 2), True


def answer_problems(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[int],
    params: SamplingParams,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Generate and judge `params.num_samples` answers to each problem.

    Args:
        problems: indices in `task`.
        on_progress: called with how many answers are judged.

    Returns:
        Answers in the order of `problems`, then of samples.

    Raises:
        SandboxError: the task runs programs and there is no sandbox on this machine.
    """
    rendered = [render_question(tokenizer, task[index], engine.max_length) for index in problems]
    requests = [
        build_request(tokenizer, prompt, params, problem)
        for problem, (prompt, _) in zip(problems, rendered, strict=True)
    ]
    completions = [[Completion() for _ in range(params.num_samples)] for _ in requests]
    pending: deque[Future[Answer]] = deque()
    answers: list[Answer] = []

    def collect(*, wait: bool) -> None:
        # Raises what a judge raised, before more is generated.
        while pending and (wait or pending[0].done()):
            answers.append(pending.popleft().result())
            on_progress(len(answers))

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for event in engine.stream(requests):
            number, completion = event.request, completions[event.request][event.sample]
            completion.add(event)
            if event.finish_reason is not None:
                ended = problems[number], event.sample, completion, rendered[number][1]
                pending.append(pool.submit(_judge, task, tokenizer, params.stop, *ended))
                collect(wait=False)
        collect(wait=True)
    finally:
        pool.shutdown(cancel_futures=True)
    place = {problem: number for number, problem in enumerate(problems)}
    return sorted(answers, key=lambda answer: (place[answer.problem], answer.sample))


def _judge(
    task: Task,
    tokenizer: Tokenizer,
    stop: Sequence[str],
    problem: int,
    sample: int,
    completion: Completion,
    prompt_cut: bool,
) -> Answer:
    text = spoken_text(tokenizer, completion.token_ids, stop)
    right = task.evaluate(task[problem], text)
    lenient = right or (task.is_lenient and task.evaluate_leniently(task[problem], text))
    return Answer(problem, sample, completion, text, right, lenient, prompt_cut)


LIMIT_SEED = 1337
"""Seed for the shuffle before a limit: data sets are sorted by subject."""

OnProgress = Callable[[int, int], None]
"""Called with the number of answers that this rank has, and that it will have."""


def limited(task: Task, limit: int | None) -> Task:
    """Return `limit` examples of a task, drawn over all of it; the whole task for None."""
    return task if limit is None or limit >= len(task) else task.shuffled(LIMIT_SEED)[:limit]


def evaluate_task(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    ranks: Ranks | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> ChatTaskResult:
    """Return what the engine's model gets right, over all ranks.

    Args:
        params: how answers are sampled, if the task is generative.
        ranks: the processes that share the work; by default this one alone.
        on_answer: given every answer that this rank generated.

    Raises:
        DataError: the task is empty, or its files are broken.
        UsageError: the task is for training only.
        SandboxError: the task runs programs and there is no sandbox on this machine.
    """
    if not len(task):
        raise DataError(f"{task.name} has no problem to ask")
    started, ranks = time.perf_counter(), ranks or Ranks()
    generates, share = task.kind == "generative", list(ranks.share(len(task)))
    samples = params.num_samples if generates else 1
    # Right samples by problem, then the sums of `Answer.counts`.
    counts = torch.zeros(len(task) + 4, dtype=torch.int64)

    def report(done: int) -> None:
        on_progress(done, len(share) * samples)

    if generates:
        for answer in answer_problems(engine, tokenizer, task, share, params, report):
            counts[answer.problem] += answer.right
            counts[-4:] += torch.tensor(answer.counts)
            on_answer(answer)
    else:
        prompts = [render_for_completion(tokenizer, task[index]) for index in share]
        letters = [task[index]["letters"] for index in share]
        chosen = choose_letters(engine.model, tokenizer, prompts, letters, report)
        for index, letter in zip(share, chosen, strict=True):
            counts[index] = task.evaluate(task[index], letter)
    *right, lenient, cut_prompts, cut_answers, tokens = ranks.sum(counts).tolist()
    return ChatTaskResult(
        label=task.name,
        task_type=task.kind,
        examples=len(right),
        correct=sum(right),
        random_baseline=task.random_baseline,
        seconds=time.perf_counter() - started,
        num_samples=samples,
        pass_at={k: pass_at_k(right, samples, k) for k in pass_sizes(samples)},
        lenient=lenient if task.is_lenient else None,
        cut_prompts=cut_prompts,
        cut_answers=cut_answers,
        answer_tokens=tokens,
    )


def choose_letters(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    letters: Sequence[Sequence[str]],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the letter that the model prefers after each prompt; the first on ties.

    Args:
        prompts: token ids up to where the assistant is to speak.
        letters: each prompt's choices.
        on_progress: called after each batch with how many prompts are done.
    """
    chosen = [""] * len(prompts)
    done = 0
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        logits = prefill(model, [prompts[i] for i in batch]).last_logits().cpu()
        for row, index in zip(logits, batch, strict=True):
            choices = letters[index]
            tokens = [letter_token(tokenizer, letter) for letter in choices]
            chosen[index] = choices[int(row[tokens].argmax())]
        done += len(batch)
        on_progress(done)
    return chosen


def letter_token(tokenizer: Tokenizer, letter: str) -> int:
    """Return the one token that an answer of this letter is.

    Raises:
        DataError: it takes several.
    """
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise DataError(
            f"the letter {letter!r} takes {len(ids)} tokens, so its logit is not to be compared: "
            "give the choices single letters or digits"
        )
    return ids[0]
