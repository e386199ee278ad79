"""Evaluate a chat model on tasks in which it writes answers or chooses letters.

    result = evaluate_task(engine, tokenizer, task, SamplingParams(512, temperature=0))
    print(result.accuracy, result.interval)

Each rank does its share. In a generative task, an answer depends only on the seed, the problem and
the sample, not on the batch, the order or the number of ranks. Judging may take seconds (HumanEval
runs programs), so it happens in threads while the next answers are generated. A categorical task
generates nothing: the answer is the letter with the highest logit where the answer begins. Its
prompts run in batches of similar length, padded on the right. ChatCORE is the mean over tasks
(SPEC section 9).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from archerchat.distributed import Ranks
from archerchat.errors import DataError
from archerchat.evals.statistics import Interval, TaskResult, mean_score, pass_at_k, pass_sizes
from archerchat.inference.chat import build_answer_request
from archerchat.inference.engine import Engine
from archerchat.inference.model_runner import Prefill, iter_batches
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
"""Maximum tokens per answer in ChatCORE."""
LIMIT_SEED = 1337
"""Seed for the shuffle before a limit: data sets are sorted by subject."""


@dataclass(frozen=True, kw_only=True)
class ChatTaskResult(TaskResult):
    """One task of a chat model."""

    pass_at: Mapping[int, float]
    """pass@k by k, up to the number of samples."""
    lenient: int | None = None
    """Number of samples that are right by the task's lenient rule; None for a task without one."""
    cut_prompts: int = 0
    """Number of prompts that were truncated to the context."""
    cut_answers: int = 0
    """Number of answers that ended at the token limit or at the end of the context."""
    answer_tokens: int = 0

    @property
    def lenient_accuracy(self) -> float | None:
        return None if self.lenient is None else self.lenient / (self.examples * self.num_samples)

    def to_json(self) -> dict[str, Any]:
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
    """The answer without calculator expressions and results, as it was judged."""
    right: bool
    """Whether the answer is right by the reference's rule."""
    lenient: bool
    """Whether the answer is right by the reference's rule or by the task's lenient rule."""
    prompt_cut: bool

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What an answer adds to a task's lenient samples, cut prompts, cut answers and tokens."""
        cut = self.completion.finish_reason in ("max_tokens", "length")
        prompt_cut = self.prompt_cut and self.sample == 0
        return self.lenient, prompt_cut, cut, len(self.completion.token_ids)


def build_request(
    tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams, problem: int
) -> Request:
    """Build the request for a problem's samples, with the calculator and the problem's own seed."""
    params = replace(params, seed=derive_seed(params.seed, problem))
    return build_answer_request(tokenizer, prompt, params)


def render_question(
    tokenizer: Tokenizer, conversation: Conversation, max_length: int
) -> tuple[list[int], bool]:
    """Return a prompt that leaves room for an answer, and whether it was truncated."""
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
    """Generate and judge `params.num_samples` answers to each problem; return them in order.

    Args:
        problems: indices in `task`.
        on_progress: called with the number of judged answers.
    """
    rendered = [render_question(tokenizer, task[index], engine.max_length) for index in problems]
    requests = [
        build_request(tokenizer, prompt, params, problem)
        for problem, (prompt, _) in zip(problems, rendered, strict=True)
    ]
    completions = defaultdict[tuple[int, int], Completion](Completion)
    pending: deque[Future[Answer]] = deque()
    answers: list[Answer] = []

    def judge(number: int, sample: int, completion: Completion) -> Answer:
        conversation = task[problems[number]]
        text = spoken_text(tokenizer, completion.token_ids, params.stop)
        right = task.evaluate(conversation, text)
        lenient = right or (task.is_lenient and task.evaluate_leniently(conversation, text))
        is_cut = rendered[number][1]
        return Answer(problems[number], sample, completion, text, right, lenient, is_cut)

    def collect(*, wait: bool) -> None:
        # Raises a judge's error before more is generated.
        while pending and (wait or pending[0].done()):
            answers.append(pending.popleft().result())
            on_progress(len(answers))

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for event in engine.stream(requests):
            completion = completions[event.request, event.sample]
            completion.add(event)
            if event.finish_reason is not None:
                pending.append(pool.submit(judge, event.request, event.sample, completion))
                collect(wait=False)
        collect(wait=True)
    finally:
        pool.shutdown(cancel_futures=True)
    place = {problem: number for number, problem in enumerate(problems)}
    return sorted(answers, key=lambda answer: (place[answer.problem], answer.sample))


def limited(task: Task, limit: int | None) -> Task:
    """Return `limit` examples drawn from the whole task, or the task itself for None."""
    return task if limit is None or limit >= len(task) else task.shuffled(LIMIT_SEED)[:limit]


def evaluate_task(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    ranks: Ranks | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> ChatTaskResult:
    """Measure what the engine's model gets right, over all ranks.

    Args:
        params: sampling of the answers to a generative task.
        on_progress: called with the number of questions that this rank has finished, and its total.
        on_answer: called with every answer that this rank generated.

    Raises:
        DataError: the task is empty, its files are broken, or a letter takes several tokens.
        UsageError: the task is for training only.
        SandboxError: the task runs programs and there is no sandbox on this machine.
    """
    if not len(task):
        raise DataError(f"{task.name} has no problem to ask")
    started, ranks = time.perf_counter(), ranks or Ranks()
    share, generates = list(ranks.share(len(task))), task.kind == "generative"
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
        questions = [task[index] for index in share]
        chosen = choose_letters(engine.model, tokenizer, questions, report)
        for index, is_right in zip(share, map(task.evaluate, questions, chosen), strict=True):
            counts[index] = is_right
    totals = ranks.sum(counts).tolist()
    return _summarize(task, samples, totals, time.perf_counter() - started)


def _summarize(task: Task, samples: int, counts: Sequence[int], seconds: float) -> ChatTaskResult:
    *right, lenient, cut_prompts, cut_answers, tokens = counts
    return ChatTaskResult(
        label=task.name,
        task_type=task.kind,
        examples=len(right),
        correct=sum(right),
        random_baseline=task.random_baseline,
        seconds=seconds,
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
    questions: Sequence[Conversation],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the letter that the model prefers in answer to each question; the first of equals."""
    prompts = [render_for_completion(tokenizer, question) for question in questions]
    chosen, done = [""] * len(prompts), 0
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        logits = Prefill(model, [prompts[i] for i in batch]).last_logits.cpu()
        for row, index in zip(logits, batch, strict=True):
            letters = questions[index]["letters"]
            tokens = [letter_token(tokenizer, letter) for letter in letters]
            chosen[index] = letters[int(row[tokens].argmax())]
        done += len(batch)
        on_progress(done)
    return chosen


def letter_token(tokenizer: Tokenizer, letter: str) -> int:
    """Return the token of a letter; a DataError if it takes several."""
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise DataError(
            f"the letter {letter!r} takes {len(ids)} tokens, so its logit cannot be compared: "
            "label the choices with single letters or digits"
        )
    return ids[0]
