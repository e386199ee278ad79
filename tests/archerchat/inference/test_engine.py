"""The engine says what plain forward passes say, whatever the batch, the order, the neighbours."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from archerchat.errors import UsageError
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.inference.engine import Engine
from archerchat.inference.model_runner import forward_token
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Completion, Event, Request
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Regions, Transformer

IsPlain = Callable[[Transformer, Request, Completion], bool]
Prompt = Callable[[int], list[int]]
BOTH = pytest.mark.parametrize("overlap", [False, True])


def ask(prompt: Sequence[int], most: int, hook: Any = None, **more: Any) -> Request:
    return Request(prompt, SamplingParams(most, **more), hook)


def greedy(prompt: Sequence[int], most: int, hook: Any = None, **more: Any) -> Request:
    return ask(prompt, most, hook, temperature=0, **more)


def said(answers: list[list[Completion]]) -> list[list[int]]:
    """The first sample of each request."""
    return [samples[0].token_ids for samples in answers]


@BOTH
def test_greedy_answers_are_the_references(model_golden: Any, overlap: bool) -> None:
    """Both prompts at once, among others that come and go; past the context, as the reference."""
    cases = list(model_golden.facts["generation"].values())
    requests = [greedy(case["prompt"], len(case["naive_greedy"])) for case in cases]
    random = Random(0)
    others = [greedy([random.randrange(400) for _ in range(n)], 9 + n) for n in (3, 30, 7, 60)]
    engine = Engine(model_golden.build(), max_batch=3, max_length=300, overlap=overlap)
    answers = engine.generate([*others[:2], *requests, *others[2:]])[2:4]
    for case, (completion,) in zip(cases, answers, strict=True):
        assert completion.token_ids == case["naive_greedy"]
        assert completion.mask == [1] * len(completion.token_ids)


def test_stop_tokens_end_as_the_references_engine_does(model_golden: Any) -> None:
    ids = model_golden.facts["special_token_ids"]
    stops = [ids["<|bos|>"], ids["<|assistant_end|>"]]
    for case in model_golden.facts["generation"].values():
        request = greedy(case["prompt"], len(case["naive_greedy"]), stop_token_ids=tuple(stops))
        engine = Engine(model_golden.build(), max_length=300)
        assert said(engine.generate([request])) == [case["engine_greedy"]]


def test_a_trained_models_greedy_answers_are_the_references(oracle_dir: Path) -> None:
    cases = json.loads((oracle_dir / "core_goldens.json").read_text())["generation_greedy"]
    model = Transformer(ModelConfig(256, 4096, 4, 2, 2, 128), backend="matmul")
    weights = to_archerchat_names(load_file(oracle_dir / "train_final.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    requests = [greedy(case["prompt_ids"], 48) for case in cases]
    assert said(Engine(model).generate(requests)) == [case["greedy_48"] for case in cases]


def random_requests(random: Random, count: int, vocab_size: int, context: int) -> list[Request]:
    """Prompts of all lengths, some with a common beginning, some twice, with stop tokens."""

    def ids(length: int) -> list[int]:
        return [random.randrange(vocab_size) for _ in range(length)]

    beginnings = [ids(random.randint(16, context // 2)) for _ in range(2)]
    requests: list[Request] = []
    for _ in range(count):
        if requests and random.random() < 0.15:
            prompt = list(random.choice(requests).prompt)
        elif random.random() < 0.4:
            prompt = random.choice(beginnings) + ids(random.randint(1, context // 3))
        else:
            prompt = ids(random.choice([1, 2, random.randint(1, context - 1), context - 1]))
        requests.append(
            greedy(
                prompt,
                random.choice([1, 2, random.randint(1, context)]),
                stop_token_ids=tuple(ids(random.randint(0, 3))),
                num_samples=random.choice([1, 1, 1, 2]),
            )
        )
    return requests


SHAPES = [
    ModelConfig(160, 60, 3, 4, 2, 32, "SL"),
    ModelConfig(64, 60, 2, 2, 1, 32),
    ModelConfig(300, 60, 4, 3, 3, 48, "SSSL"),
]


@BOTH
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("max_batch", [1, 4, 64])
def test_greedy_answers_do_not_depend_on_the_batch(
    build: Any, is_plain: IsPlain, shape: int, max_batch: int, overlap: bool
) -> None:
    config = SHAPES[shape]
    model = build(config, seed=shape)
    context = config.sequence_length
    requests = random_requests(Random(10 * shape + max_batch), 12, 60, context)
    engine = Engine(model, max_batch, overlap=overlap)
    for request, samples in zip(requests, engine.generate(requests), strict=True):
        for completion in samples:
            said_ids, room = completion.token_ids, context - len(request.prompt)
            assert is_plain(model, request, completion)
            assert completion.mask == [1] * len(said_ids)
            by_tokens = len(said_ids) == request.params.max_new_tokens
            if completion.finish_reason == "stop":
                assert completion.stop_token in request.params.stop_token_ids
                assert len(said_ids) < min(room, request.params.max_new_tokens)
            else:
                assert completion.finish_reason == ("max_tokens" if by_tokens else "length")
                assert by_tokens or len(said_ids) == room
    assert not engine.busy


@BOTH
def test_a_mask_rules_its_own_rows_alone(
    model: Transformer, is_plain: IsPlain, prompt: Prompt, overlap: bool
) -> None:
    """Each sample walks up from its own start; its neighbour is greedy as ever."""

    def build_mask() -> Any:
        return lambda said: [said[-1] + 1, said[-1] + 2] if said else [10, 20]

    params = SamplingParams(8, temperature=2, logit_bias={11: -100}, num_samples=3)
    masked = Request(prompt(5), params, mask=build_mask)
    requests = [greedy(prompt(9), 12), masked, greedy(prompt(7), 3)]
    engine = Engine(model, max_batch=4, overlap=overlap)
    first, walks, last = engine.generate(requests)
    assert all(is_plain(model, r, c) for r, (c,) in [(requests[0], first), (requests[2], last)])
    for walk in walks:
        steps = [b - a for a, b in itertools.pairwise(walk.token_ids)]
        assert walk.token_ids[0] in (10, 20)
        assert len(steps) == 7
        assert set(steps) <= {1, 2}
        assert 11 not in walk.token_ids
    assert is_plain(model, requests[0], engine.generate([requests[0]])[0][0])


def test_draws_depend_on_a_rows_seed_alone(model: Transformer, prompt: Prompt) -> None:
    random = Random(3)
    requests = [
        ask(
            prompt(random.randint(1, 120)),
            random.randint(1, 20),
            temperature=random.choice([0, 0.8, 1.2]),
            top_k=random.choice([None, 5, 50]),
            top_p=random.choice([None, 0.9]),
            seed=n,
            num_samples=random.choice([1, 3]),
        )
        for n in range(14)
    ]
    wide = Engine(model, 64).generate(requests)
    assert Engine(model, 5, overlap=True).generate(requests) == wide
    assert [Engine(model, 1).generate([request])[0] for request in requests] == wide
    back = Engine(model, 7).generate(requests[::-1])[::-1]
    assert back == wide


def test_samples_and_seeds_differ_and_share_one_prefill(model: Transformer, prompt: Prompt) -> None:
    engine = Engine(model, 4)
    asked = ask(prompt(50), 30, seed=1, num_samples=10)
    (samples,) = engine.generate([asked])
    assert len({tuple(sample.token_ids) for sample in samples}) == 10
    assert engine._scheduler.prefilled_tokens == 50
    (other,) = engine.generate([ask(asked.prompt, 30, seed=2)])
    assert other[0] not in samples


def test_a_common_beginning_runs_once(model: Transformer, prompt: Prompt) -> None:
    """Also for requests that come in much later, one place at a time."""
    beginning, other = prompt(100), prompt(60)
    tails = [prompt(5) for _ in range(9)]
    requests = [greedy(beginning + tail, 3) for tail in tails[:6]] + [greedy(other, 3)]
    requests += [greedy(beginning + tail, 3) for tail in tails[6:]]
    engine = Engine(model, max_batch=2)
    together = said(engine.generate(requests))
    assert engine._scheduler.prefilled_tokens == 100 + 9 * 5 + 60
    assert together == [said(Engine(model).generate([request]))[0] for request in requests]


def test_first_tokens_come_before_the_step(model: Transformer, prompt: Prompt) -> None:
    engine, request = Engine(model), greedy(prompt(9), 4)
    engine.add(0, request)
    (first,) = engine.admit()
    assert engine.steps == 0
    rest = [event.token for _ in range(3) for event in engine.advance()]
    assert [[first.token, *rest]] == said(Engine(model).generate([request]))


def test_rows_that_end_make_room(model: Transformer, prompt: Prompt) -> None:
    """Eight answers of 10 tokens over two rows take 4 * 10 tokens; the first is the prompt's."""
    engine = Engine(model, max_batch=2)
    engine.generate([greedy(prompt(5), 10) for _ in range(8)])
    assert engine.steps == 4 * 9
    uneven = Engine(model, max_batch=2)
    uneven.generate([greedy(prompt(5), most) for most in (31, 10, 10, 10)])
    assert uneven.steps == 30


def test_one_token_needs_no_step(model: Transformer, prompt: Prompt) -> None:
    for overlap in (False, True):
        engine = Engine(model, overlap=overlap)
        engine.generate([greedy(prompt(5), 1) for _ in range(100)])
        assert engine.steps == 0


@BOTH
def test_tokens_come_as_they_are_drawn(model: Transformer, prompt: Prompt, overlap: bool) -> None:
    requests = [greedy(prompt(4), 8), greedy(prompt(4), 3)]
    engine = Engine(model, overlap=overlap)
    stream = engine.stream(requests)
    first = [next(stream), next(stream)]
    assert {(event.request, event.sample) for event in first} == {(0, 0), (1, 0)}
    assert engine.steps <= 1 + overlap
    events = [*first, *stream]
    assert [e.request for e in events[:6]] == [0, 1] * 3
    assert [e.finish_reason for e in events if e.request == 1] == [None, None, "max_tokens"]
    assert [e.token for e in events if e.request == 0] == said(engine.generate(requests))[0]


def test_a_stream_that_is_given_up_leaves_the_engine_usable(
    model: Transformer, prompt: Prompt
) -> None:
    engine = Engine(model, max_batch=2)
    requests = [greedy(prompt(n + 1), 20) for n in range(5)]
    stream = engine.stream(requests)
    next(stream)
    assert engine.busy
    stream.close()  # type: ignore[attr-defined]
    assert not engine.busy
    fresh = Engine(model, max_batch=2).generate(requests)
    assert engine.generate(requests) == fresh


@BOTH
def test_requests_can_come_and_be_taken_back(
    model: Transformer, is_plain: IsPlain, prompt: Prompt, overlap: bool
) -> None:
    engine = Engine(model, max_batch=2, overlap=overlap)
    requests = {n: greedy(prompt(6), 12) for n in range(5)}
    requests[7] = greedy(prompt(6), 12, num_samples=2)
    events: list[Event] = []
    engine.add(0, requests[0])
    engine.add(1, requests[1])
    for _ in range(4):
        events += engine.step()
    engine.add(2, requests[2])
    engine.add(7, requests[7])
    engine.add(3, requests[3])
    engine.cancel(0)
    engine.cancel(7)
    engine.cancel(99)
    while engine.busy:
        events += engine.step()
    heard: dict[tuple[int, int], Completion] = {}
    for event in events:
        heard.setdefault((event.request, event.sample), Completion()).add(event)
    for n in (1, 2, 3):
        assert len(heard[n, 0].token_ids) == 12
        assert is_plain(model, requests[n], heard[n, 0])
    assert heard[0, 0].finish_reason == "cancelled"
    assert is_plain(model, requests[0], heard[0, 0])
    assert 2 <= len(heard[0, 0].token_ids) < 12
    assert heard[7, 0] == heard[7, 1] == Completion(finish_reason="cancelled")


def test_nothing_runs_when_one_request_cannot_be_served(model: Transformer, prompt: Prompt) -> None:
    engine = Engine(model)
    good = greedy(prompt(5), 5)
    with pytest.raises(UsageError, match="the prompt has 256 tokens and the context 256"):
        engine.generate([good, greedy(prompt(256), 5)])
    with pytest.raises(UsageError, match="the prompt has token 100"):
        engine.stream([good, greedy([100], 5)])  # by the call, not by the first event
    for prompt_ids in ([-1], prompt(256)):
        with pytest.raises(UsageError):
            engine.add(0, greedy(prompt_ids, 5))
    assert not engine.busy
    assert engine._scheduler.prefilled_tokens == 0
    short = Engine(model, max_length=20)
    with pytest.raises(UsageError, match="the context 20: cut it to 19"):
        short.generate([greedy(prompt(20), 5)])
    (completion,) = short.generate([greedy(prompt(15), 50)])[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 8), "the prompt has 8 tokens and the context 8: cut it to 7 or fewer"),
        (Request([1] * 100), "the prompt has 100 tokens"),
        (Request([1, -1]), "the prompt has token -1; the model knows 0 to 99"),
        (Request([1, 100]), "the prompt has token 100; the model knows 0 to 99"),
        (
            Request([1], SamplingParams(logit_bias={3: 1.0, 100: -1.0})),
            "--logit-bias has token 100; the model knows 0 to 99",
        ),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(
    model: Transformer, request_: Request, message: str
) -> None:
    engine = Engine(model, max_length=8)
    engine.check(Request([0, 99] * 3 + [7]))
    with pytest.raises(UsageError, match=message):
        engine.check(request_)


def test_a_context_may_be_longer_than_in_training(
    model: Transformer, is_plain: IsPlain, prompt: Prompt
) -> None:
    """Every layer slides then, as in the plain forward pass (SPEC section 2)."""
    request = greedy(prompt(250), 40)
    (completion,) = Engine(model, max_length=400).generate([request])[0]
    assert len(completion.token_ids) == 40
    assert is_plain(model, request, completion)


class ForceAfter:
    """After each token of a kind, force three others."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.seen: list[int] = []

    def __call__(self, token: int) -> list[int]:
        self.seen.append(token)
        return [97, 98, 99] if token % 10 == self.kind else []


@BOTH
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_forced_tokens_are_said_masked_and_continued_from(
    model: Transformer, prompt: Prompt, overlap: bool, max_batch: int
) -> None:
    """Expected tokens by plain forward passes that a hook interrupts."""
    hooks: list[ForceAfter] = []

    def hook() -> ForceAfter:
        hooks.append(ForceAfter(3))
        return hooks[-1]

    prompts = [prompt(n) for n in (1, 30, 140, 8, 9)]
    requests = [greedy(p, 40, hook=hook, num_samples=2) for p in prompts]
    requests.append(greedy(prompts[0], 40))
    answers = Engine(model, max_batch, overlap=overlap).generate(requests)
    forced_somewhere = False
    for start, samples in zip(prompts, answers[:-1], strict=True):
        follow, ids, mask = ForceAfter(3), list(start), []
        with torch.no_grad():
            while len(mask) < 40:
                token = int(model(torch.tensor([ids]))[0, -1].argmax())
                forced = follow(token)
                ids += [token, *forced]
                mask += [1, *[0] * len(forced)]
        for sample in samples:
            assert sample.token_ids == ids[len(start) :][:40]
            assert sample.mask == mask[:40]
        forced_somewhere |= 0 in mask
    assert forced_somewhere
    assert 0 not in answers[-1][0].mask
    assert len(hooks) == 10
    assert all(hook.seen for hook in hooks)


@BOTH
def test_a_forced_stop_token_ends_a_row(model: Transformer, prompt: Prompt, overlap: bool) -> None:
    request = greedy(prompt(5), 50, hook=lambda: lambda token: [7, 8], stop_token_ids=(8,))
    (completion,) = Engine(model, overlap=overlap).generate([request])[0]
    assert completion.token_ids[1:] == [7]
    assert (completion.mask, completion.finish_reason) == ([1, 0], "stop")
    assert completion.stop_token == 8


@BOTH
def test_penalties_count_what_was_said_and_bias_adds(
    model: Transformer, prompt: Prompt, overlap: bool
) -> None:
    """Expected tokens by plain forward passes; forced tokens count as said."""
    changes = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    changes["logit_bias"] = {7: 3.0, 9: -100.0}  # type: ignore[assignment]
    prompts = [prompt(n) for n in (4, 25, 9, 130)]
    requests = [greedy(p, 24, hook=lambda: ForceAfter(3), **changes) for p in prompts]
    others = [greedy(prompt(6), 15), ask(prompt(3), 24, seed=5, num_samples=2)]
    engine = Engine(model, max_batch=3, overlap=overlap)
    answers = engine.generate([requests[0], *others, *requests[1:]])
    assert answers[1:3] == Engine(model).generate(others)
    for start, samples in zip(prompts, [answers[0], *answers[3:]], strict=True):
        follow, answer = ForceAfter(3), []
        while len(answer) < 24:
            logits = model(torch.tensor([[*start, *answer]]))[0, -1]
            for token in {*start, *answer}:
                logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
            for token in set(answer):
                logits[token] -= 0.5 + 0.25 * answer.count(token)
            logits[7] += 3
            logits[9] -= 100
            token = int(logits.argmax())
            answer += [token, *follow(token)]
        assert samples[0].token_ids == answer[:24]


@BOTH
def test_log_probabilities_are_those_of_plain_forward_passes(
    model: Transformer, prompt: Prompt, overlap: bool
) -> None:
    requests = [
        ask(prompt(5), 12, temperature=2.0, top_k=9, logprobs=4, hook=lambda: ForceAfter(3)),
        ask(prompt(8), 20, seed=1),
        greedy(prompt(30), 12, logprobs=0, num_samples=2),
    ]
    answers = Engine(model, max_batch=2, overlap=overlap).generate(requests)
    assert answers[1][0].logprobs == []
    for request, samples in zip(requests[::2], answers[::2], strict=True):
        for sample in samples:
            ids = torch.tensor([[*request.prompt, *sample.token_ids]])
            plain = model(ids)[0, len(request.prompt) - 1 : -1].double().log_softmax(dim=-1)
            assert len(sample.logprobs) == 12
            for row, token, mask, found in zip(
                plain, sample.token_ids, sample.mask, sample.logprobs, strict=True
            ):
                assert (found is None) == (mask == 0)
                if found is not None:
                    assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
                    best = row.topk(request.params.logprobs or 0)
                    assert [token for token, _ in found.top] == best.indices.tolist()
                    values = [value for _, value in found.top]
                    assert values == pytest.approx(best.values.tolist(), abs=1e-4)


@BOTH
def test_a_stop_string_ends_a_row(model: Transformer, prompt: Prompt, overlap: bool) -> None:
    """Also across tokens, and though later tokens were sampled already."""

    def decode(ids: list[int]) -> str:
        return "".join(f"{token:02d}" for token in ids)

    start = prompt(12)
    (whole,) = Engine(model).generate([ask(start, 20)])[0]
    text = decode(whole.token_ids)
    stop = text[9:14]  # from within the fifth token to the end of the seventh
    assert text.find(stop) == 9
    request = Request(start, SamplingParams(20, stop=("never", stop)), decode=decode)
    engine = Engine(model, overlap=overlap)
    events = list(engine.stream([request, ask(prompt(5), 20)]))
    completion = Completion()
    for event in events:
        if event.request == 0:
            completion.add(event)
    assert completion.text == text[:9]
    assert completion.token_ids == whole.token_ids[:7]
    assert (completion.finish_reason, completion.stop_token) == ("stop", None)
    assert sum(event.token is not None for event in events if event.request == 1) == 20


def test_new_weights_are_taken_over(build: Any, prompt: Prompt) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, other = build(seed=0, dtype=dtype), build(seed=5, dtype=dtype)
        requests = [greedy(prompt(9), 12) for _ in range(3)]
        engine = Engine(model)
        old = engine.generate(requests)
        model.load_state_dict(other.state_dict())
        engine.refresh_weights()
        new = engine.generate(requests)
        assert new == Engine(other).generate(requests) != old


def test_weights_do_not_change_under_a_waiting_request(model: Transformer, prompt: Prompt) -> None:
    engine = Engine(model, kept_tokens=300)
    engine.add(0, greedy(prompt(9), 12))
    with pytest.raises(AssertionError, match="the old weights"):
        engine.refresh_weights()


def test_a_prompt_that_is_kept_while_a_request_waits_is_found(
    model: Transformer, prompt: Prompt
) -> None:
    engine = Engine(model, max_batch=1, kept_tokens=300)
    first = prompt(40)
    requests = [greedy(first, 3), greedy([*first, *prompt(5)], 3)]
    assert [event.cached for event in engine.stream(requests) if event.first] == [0, 40]
    assert engine._scheduler.prefilled_tokens == 40 + 5


def test_a_prompt_that_is_dropped_while_a_request_waits_runs_again(
    model: Transformer, prompt: Prompt
) -> None:
    """A request that waits holds nothing until its turn, when what it continues may be gone."""
    engine = Engine(model, max_batch=1, kept_tokens=50)
    first = prompt(40)
    engine.generate([greedy(first, 3)])
    engine.add(0, greedy(prompt(30), 3))  # takes the place of the first
    engine.add(1, greedy([*first, *prompt(5)], 3))
    while engine.busy:
        engine.step()
    assert engine._scheduler.prefilled_tokens == 40 + 30 + 45


def test_16_bits_say_nearly_the_same(build: Any, prompt: Prompt) -> None:
    """Ties fall otherwise; the logits behind each token are those of the plain pass within 0.3."""
    model = build(dtype=torch.bfloat16)
    requests = [greedy(prompt(n), 30) for n in (3, 60, 150)]
    for request, samples in zip(requests, Engine(model).generate(requests), strict=True):
        ids = samples[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *ids]]))[0, len(request.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (logits.amax(dim=1) - chosen).max() < 0.3


@pytest.mark.slow
def test_a_compiled_single_stream_says_the_same(model: Transformer, prompt: Prompt) -> None:
    requests = [greedy(prompt(n), 30) for n in (3, 120)]
    expected = Engine(model, 2).generate(requests)
    assert Engine(model, 1, compile=True).generate(requests) == expected
    assert Engine(model, 2, compile=True).generate(requests) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("error::archerchat.model.compiling.CompileWarning")
def test_layers_compiled_for_all_sizes_say_the_same(build: Any, is_plain: IsPlain) -> None:
    """As CUDA runs them, here without graphs: batches of one to four rows."""
    config = SHAPES[0]
    model = build(config)
    engine = Engine(model, max_batch=4)
    regions = Regions.compiled(dynamic=True)
    engine._runner._forward = partial(forward_token, regions=regions)
    requests = random_requests(Random(1), 6, 30, config.sequence_length)
    for request, samples in zip(requests, engine.generate(requests), strict=True):
        assert all(is_plain(model, request, completion) for completion in samples)


@pytest.mark.gpu
@pytest.mark.parametrize(("captures", "compile"), [(True, False), (False, False), (True, True)])
def test_graphs_and_plain_steps_say_the_same_on_cuda(
    build: Any,
    is_plain: IsPlain,
    captures: bool,
    compile: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 with TF32 off; among the rows are some that draw and some forced."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    config = SHAPES[0]
    model = build(config)
    requests = random_requests(Random(1), 20, 60, config.sequence_length)
    engine = Engine(build(config).cuda(), max_batch=6, compile=compile)
    engine._runner._captures = captures
    assert engine.overlap
    for request, samples in zip(requests, engine.generate(requests), strict=True):
        assert all(is_plain(model, request, completion) for completion in samples)
    if compile:
        return  # rounds otherwise, and a draw may then fall on the other side
    drawn = [
        ask(r.prompt, r.params.max_new_tokens, top_k=5, top_p=0.9, seed=n)
        for n, r in enumerate(requests)
    ]
    assert engine.generate(drawn) == Engine(build(config).cuda(), max_batch=3).generate(drawn)


@pytest.mark.gpu
def test_decoding_on_cuda_never_waits_for_a_value(build: Any, prompt: Prompt) -> None:
    engine = Engine(build().cuda(), max_batch=4)
    requests = [ask(prompt(5), 40, seed=n) for n in range(4)]
    engine.generate(requests)  # captures
    for number, request in enumerate(requests):
        engine.add(number, request)
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            assert len(engine.step()) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.reset()


@pytest.mark.gpu
def test_all_parameters_on_cuda_say_what_they_say_on_a_cpu(build: Any, prompt: Prompt) -> None:
    """In captured steps; float32, greedy, where both say the same."""
    changes = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logprobs": 2}
    changes["logit_bias"] = {7: 3.0}  # type: ignore[assignment]
    requests = [greedy(prompt(n), 30, **(changes if n % 2 else {})) for n in range(3, 12)]
    expected = Engine(build(), max_batch=4).generate(requests)
    for ours, plain in zip(
        Engine(build().cuda(), max_batch=4).generate(requests), expected, strict=True
    ):
        assert ours[0].token_ids == plain[0].token_ids
        assert len(ours[0].logprobs) == len(plain[0].logprobs)


def test_a_later_prompt_runs_only_what_follows_a_kept_one(
    model: Transformer, prompt: Prompt, is_plain: IsPlain
) -> None:
    """A second turn, the same prompt again, and another conversation that pushes the second out."""
    engine = Engine(model, max_batch=2, kept_tokens=350)
    first = prompt(140)  # longer than a short window
    second = [*first, *prompt(30)]
    turns = [first, second, first, prompt(100), second]
    cached = []
    for turn in turns:
        request, completion = greedy(turn, 5), Completion()
        for event in engine.stream([request]):
            completion.add(event)
            cached.append(event.cached)
        assert is_plain(model, request, completion)
    assert cached[::5] == [0, 140, 140, 0, 140]
    assert engine._scheduler.prefilled_tokens == 140 + 30 + 100 + 30
