"""Let a model write answers through the engine, and judge them while it writes the next ones.

A row's draws follow from the seed, the problem and the sample alone, so that an answer is the
same whatever the batch, the order and the number of ranks. Judging may take seconds (HumanEval
runs programs), so it happens in threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from archerchat.errors import UsageError
from archerchat.inference.answers import spoken_text
from archerchat.inference.calculator import evaluate as calculate
from archerchat.inference.draws import row_seed
from archerchat.inference.engine import Engine
from archerchat.inference.requests import Completion, Request
from archerchat.inference.tool_use import ToolUse
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_for_completion


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50
    num_samples: int = 1
    """Of each problem; pass@k is told for k up to it."""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_samples > 1 and self.temperature == 0:
            raise UsageError(
                f"{self.num_samples} samples at temperature 0 are all the same: give a "
                "temperature, such as 1, or a single sample"
            )


@dataclass(frozen=True)
class Answer:
    """One sample, judged."""

    problem: int
    """Index in the task."""
    sample: int
    completion: Completion
    text: str
    """What was judged: the words without expressions and results."""
    right: bool


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the tokens that end an answer (SPEC section 10)."""
    return tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id


def build_request(
    tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, problem: int
) -> Request:
    """Ask for a problem's samples, with the calculator at hand."""
    return Request(
        prompt,
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        seed=row_seed(sampling.seed, problem),
        stop_tokens=stop_tokens(tokenizer),
        num_samples=sampling.num_samples,
        hook=ToolUse(tokenizer, calculate),
    )


def render_question(
    tokenizer: Tokenizer, conversation: Conversation, max_length: int
) -> tuple[list[int], bool]:
    """Return a prompt that leaves room for an answer, and whether it had to be cut for that."""
    prompt = render_for_completion(tokenizer, conversation)
    if len(prompt) < max_length:
        return prompt, False
    return render_for_completion(tokenizer, conversation, max_length - 2), True


def answer_problems(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Generate and judge `sampling.num_samples` answers to each problem.

    Args:
        problems: indices in `task`.
        prompts: theirs, from `render_question`.
        on_progress: called with how many answers are judged.

    Returns:
        Answers in the order of `problems`, then of samples.

    Raises:
        UsageError: a number in `sampling` makes no sense.
        SandboxError: programs are to be run and there is no sandbox on this machine.
    """
    requests = [
        build_request(tokenizer, prompt, sampling, problem)
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    completions = [[Completion() for _ in range(sampling.num_samples)] for _ in requests]
    pending: deque[Future[Answer]] = deque()
    answers: list[Answer] = []

    def judge(number: int, sample: int) -> Answer:
        completion = completions[number][sample]
        text = spoken_text(tokenizer, completion.token_ids)
        problem = problems[number]
        return Answer(problem, sample, completion, text, task.evaluate(task[problem], text))

    def collect(*, wait: bool) -> None:
        """Take in what is judged; what went wrong comes up here, before more is generated."""
        while pending and (wait or pending[0].done()):
            answers.append(pending.popleft().result())
            on_progress(len(answers))

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for event in engine.stream(requests):
            completions[event.request][event.sample].add(event)
            if event.finish_reason is not None:
                pending.append(pool.submit(judge, event.request, event.sample))
                collect(wait=False)
        collect(wait=True)
    finally:
        pool.shutdown(cancel_futures=True)
    place = {problem: number for number, problem in enumerate(problems)}
    return sorted(answers, key=lambda answer: (place[answer.problem], answer.sample))
