"""Answers through the engine: the plain loop's, with the calculator, judged as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch

from archerchat.errors import UsageError
from archerchat.evals.chat import (
    Answer,
    answer_problems,
    build_request,
    evaluate_task,
    render_question,
)
from archerchat.inference import chat
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tasks.generated import ArithmeticTask

SCRIPT = (
    "<|assistant_start|>",
    *("<|python_start|>", "6*7", "<|python_end|>"),
    *("<|output_end|>", "####", " 42", "<|assistant_end|>"),
)
"""What the model says; it never writes the start of an output, nor the output."""


class Products(Task):
    """Questions whose answers are given."""

    name = "Products"

    def __init__(self, answers: Sequence[str]) -> None:
        self.rows = list(enumerate(answers))

    def render(self, row: tuple[int, str]) -> Conversation:
        return {"messages": [user(f"Question {row[0]}?"), assistant(row[1])]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return bool(conversation["messages"][-1]["content"] == completion)


def plain_answer(model: Transformer, request: Request, max_length: int) -> list[int]:
    """Answer greedily by whole forward passes, one token at a time, tools included."""
    assert request.hook is not None
    ids, hook, forced = list(request.prompt), request.hook(), []
    while len(ids) - len(request.prompt) < request.params.max_new_tokens and len(ids) < max_length:
        was_forced = bool(forced)
        token = forced.pop(0) if forced else int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in request.params.stop_token_ids:
            break
        ids.append(token)
        if not was_forced:
            forced += hook(token)
    return ids[len(request.prompt) :]


def ask(scripted: Any, task: Task, params: SamplingParams, **engine: Any) -> list[Answer]:
    problems = range(len(task))
    machine = Engine(scripted.model, **{"max_batch": 4} | engine)
    return answer_problems(machine, scripted.tokenizer, task, problems, params)


def test_the_calculators_results_are_forced_and_the_words_are_judged(
    scripted: Callable[[Sequence[str]], Any],
) -> None:
    model = scripted(SCRIPT)
    answers = ask(model, Products(["#### 42", "#### 43"]), SamplingParams(64, temperature=0))
    assert [answer.right for answer in answers] == [True, False]
    said = model.ids(
        [
            *("<|python_start|>", "6*7", "<|python_end|>"),
            *("<|output_start|>", "42", "<|output_end|>"),
            *("####", " 42"),
        ]
    )
    for answer in answers:
        assert answer.text == "#### 42"
        assert answer.completion.token_ids == said
        assert answer.completion.mask == [1] * 5 + [0] * 4 + [1] * 4
        assert answer.completion.finish_reason == "stop"


def test_the_lenient_rule_is_asked_after_the_reference_s(
    scripted: Callable[[Sequence[str]], Any],
) -> None:
    class Kinder(Products):
        is_lenient = True

        def evaluate_leniently(self, conversation: Conversation, completion: str) -> bool:
            asked.append(conversation["messages"][-1]["content"])
            return completion.startswith(asked[-1])

    asked: list[str] = []
    model, task = scripted(SCRIPT), Kinder(["#### 42", "####", "x"])
    answers = ask(model, task, SamplingParams(64, temperature=0))
    assert [answer.right for answer in answers] == [True, False, False]
    assert [answer.lenient for answer in answers] == [True, True, False]
    assert sorted(asked) == ["####", "x"]
    params = SamplingParams(64, temperature=0)
    result = evaluate_task(Engine(model.model), model.tokenizer, task, params)
    assert (result.correct, result.lenient) == (1, 2)
    assert (result.accuracy, result.lenient_accuracy) == (1 / 3, 2 / 3)
    strict = Products(["#### 42"])
    assert evaluate_task(Engine(model.model), model.tokenizer, strict, params).lenient is None


def test_batches_say_what_the_plain_loop_says(
    scripted: Callable[[Sequence[str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model's expressions have no value; here all have.
    monkeypatch.setattr(chat, "calculate", lambda expression: str(len(expression)))
    speaker = scripted(SCRIPT)
    config = ModelConfig(128, speaker.tokenizer.vocab_size, 3, 2, 1, 32)
    model = Transformer(config, backend="matmul")
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.manual_seed(6)))
        # Make tool use likely, so that its forced tokens are in play.
        model.unembedding.weight[speaker.tokenizer.special_id("<|python_end|>")] *= 3
        model.unembedding.weight[speaker.tokenizer.special_id("<|python_start|>")] *= 3
    task, random = ArithmeticTask("test", 12), Random(0)
    problems = list(range(12))
    random.shuffle(problems)
    params = SamplingParams(48, temperature=0)
    prompts = [render_question(speaker.tokenizer, task[i], 128)[0] for i in problems]
    requests = [
        build_request(speaker.tokenizer, prompt, params, problem)
        for prompt, problem in zip(prompts, problems, strict=True)
    ]
    answers = answer_problems(Engine(model, max_batch=5), speaker.tokenizer, task, problems, params)
    assert [answer.problem for answer in answers] == problems
    for answer, request in zip(answers, requests, strict=True):
        assert answer.completion.token_ids == plain_answer(model, request, 128)
    forced = [answer.completion.mask.count(0) for answer in answers]
    assert max(forced) > 4
    assert min(forced) == 0


def test_samples_depend_on_the_problem_and_not_on_its_company(
    scripted: Callable[[Sequence[str]], Any],
) -> None:
    model = scripted(SCRIPT)
    with torch.no_grad():
        model.model.unembedding.weight.mul_(0.3)  # nothing is certain any more
    task = Products(["x"] * 3)
    params = SamplingParams(12, num_samples=3, seed=5)
    together = ask(model, task, params, max_batch=2)
    assert [(a.problem, a.sample) for a in together] == [(p, s) for p in range(3) for s in range(3)]
    assert len({tuple(a.completion.token_ids) for a in together}) == 9
    alone = answer_problems(Engine(model.model), model.tokenizer, task, [2], params)
    assert [a.completion for a in alone] == [a.completion for a in together if a.problem == 2]


def test_progress_counts_judged_answers(scripted: Callable[[Sequence[str]], Any]) -> None:
    model, steps = scripted(SCRIPT), []
    task = Products(["a"] * 5)
    engine = Engine(model.model, max_batch=2)
    answer_problems(
        engine,
        model.tokenizer,
        task,
        range(5),
        SamplingParams(8),
        lambda n: steps.append(n),
    )
    assert steps == [1, 2, 3, 4, 5]


def test_what_judging_raises_comes_up(scripted: Callable[[Sequence[str]], Any]) -> None:
    class Unjudged(Products):
        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return Task.evaluate(self, conversation, completion)

    with pytest.raises(UsageError, match="Products has no answers to check"):
        ask(scripted(SCRIPT), Unjudged(["a"]), SamplingParams(8))


def test_prompts_are_cut_to_leave_room(scripted: Callable[[Sequence[str]], Any]) -> None:
    tokenizer = scripted(SCRIPT).tokenizer
    conversation = {"messages": [user("x" * 100), assistant("y")]}
    whole, cut = render_question(tokenizer, conversation, 200)
    assert not cut
    assert render_question(tokenizer, conversation, len(whole) + 1) == (whole, False)
    shorter, cut = render_question(tokenizer, conversation, len(whole))
    assert cut
    assert len(shorter) == len(whole) - 1
    assert shorter[-1] == tokenizer.special_id("<|assistant_start|>")
    assert shorter[:-1] == whole[: len(shorter) - 1]
