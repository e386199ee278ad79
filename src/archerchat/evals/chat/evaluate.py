"""Evaluate a model on a task; each rank takes its share of the problems.

    result = evaluate_task(engine, tokenizer, task, SamplingParams(512, temperature=0))
    print(result.accuracy, result.interval)

A categorical task asks for a letter, and nothing is generated: the letter with the greatest logit
where the answer begins is the answer. Prompts of similar length run as one batch padded on the
right, and logits are formed for the last token of each alone. `generative` answers the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from archerchat.distributed import Ranks
from archerchat.errors import DataError
from archerchat.evals.chat.generative import Answer, answer_problems
from archerchat.evals.chat.results import TaskResult
from archerchat.inference.engine import Engine
from archerchat.inference.prefill import iter_batches, prefill
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
) -> TaskResult:
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
    samples = params.num_samples if task.kind == "generative" else 1
    # Right samples by problem, then the four other counts.
    counts = torch.zeros(len(task) + 4, dtype=torch.int64)
    share = list(ranks.share(len(task)))

    def report(done: int) -> None:
        on_progress(done, len(share) * samples)

    if task.kind == "categorical":
        prompts = [render_for_completion(tokenizer, task[index]) for index in share]
        letters = [task[index]["letters"] for index in share]
        chosen = choose_letters(engine.model, tokenizer, prompts, letters, report)
        for index, letter in zip(share, chosen, strict=True):
            counts[index] = task.evaluate(task[index], letter)
    else:
        for answer in answer_problems(engine, tokenizer, task, share, params, report):
            completion = answer.completion
            cut = completion.finish_reason in ("max_tokens", "length")
            prompt_cut = answer.prompt_cut and answer.sample == 0
            counts[answer.problem] += answer.right
            counts[-4:] += torch.tensor(
                [answer.lenient, prompt_cut, cut, len(completion.token_ids)]
            )
            on_answer(answer)
    *right, lenient, cut_prompts, cut_answers, tokens = ranks.sum(counts).tolist()
    return TaskResult(
        name=task.name,
        kind=task.kind,
        baseline=task.random_baseline,
        right=tuple(right),
        num_samples=samples,
        lenient=lenient if task.is_lenient else None,
        cut_prompts=cut_prompts,
        cut_answers=cut_answers,
        answer_tokens=tokens,
        seconds=time.perf_counter() - started,
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
