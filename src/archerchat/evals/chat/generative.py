"""Let a model write answers through the engine, and judge them while it writes the next ones.

An answer follows from the seed, the problem and the sample alone, so it is the same whatever the
batch, the order and the number of ranks. Judging may take seconds (HumanEval runs programs), so it
happens in threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from archerchat.inference.chat import build_answer_request
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams, derive_seed
from archerchat.inference.sequence import Completion, Request
from archerchat.inference.tools import spoken_text
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_for_completion


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

    def judge(number: int, sample: int) -> Answer:
        completion, problem = completions[number][sample], problems[number]
        text = spoken_text(tokenizer, completion.token_ids, params.stop)
        right = task.evaluate(task[problem], text)
        lenient = right or (task.is_lenient and task.evaluate_leniently(task[problem], text))
        return Answer(problem, sample, completion, text, right, lenient, rendered[number][1])

    def collect(*, wait: bool) -> None:
        """Collect judged answers; raises what a judge raised, before more is generated."""
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
