"""Captured steps without a GPU: a stand-in for CUDA graphs records a step's operations and replays
them on the same tensors, so that a value or an address that a capture must not keep shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer


def storages(values: Any) -> set[int]:
    tensors = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Graph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            if operation._schema.is_mutable:
                operation(*args, **kwargs)
            elif not storages(result) <= storages((args, kwargs)):  # no view
                again = tree_leaves(operation(*args, **kwargs))
                for tensor, value in zip(tree_leaves(result), again, strict=True):
                    tensor.copy_(value)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], Engine]:
    """Let an engine's steps be captured; recording changes nothing, as on CUDA."""

    def prepare(engine: Engine) -> Engine:
        runner = engine._runner

        @contextmanager
        def record(graph: Graph, pool: Any) -> Iterator[None]:
            tables = list(runner.sampler._tables.values())
            changed = [runner.tokens, runner.sampler.records, *tables]
            changed += runner.cache.state(runner.max_rows)
            saved = [tensor.clone() for tensor in changed]
            with graph:
                yield
            assert len(tables) == len(runner.sampler._tables), "a graph's pool would hold a table"
            for tensor, before in zip(changed, saved, strict=True):
                tensor.copy_(before)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        runner._captures = True
        return engine

    return prepare


def drive(engine: Engine, requests: list[Request]) -> list[tuple[Any, ...]]:
    """Serve requests that come and go, one of them cancelled between the halves of a step."""
    events = []
    for step in range(200):
        if step % 4 == 0 and requests[step // 4 :]:
            engine.add(step // 4, requests[step // 4])
        events += engine.admit()
        if step == 14:
            engine.cancel(2)
        events += engine.advance()
    assert not engine.busy
    return [(e.request, e.sample, e.token, e.forced, e.finish_reason, e.cached) for e in events]


def test_captured_steps_say_what_plain_ones_say(
    model: Transformer,
    prompt: Callable[[int], list[int]],
    captures: Callable[[Engine], Engine],
) -> None:
    """Plans change, rows finish and move, prompts are kept and evicted, and tables are made late.

    The last request repeats the first's prompt.
    """
    kinds: list[dict[str, Any]] = [
        {"max_new_tokens": 60, "temperature": 0},
        {"max_new_tokens": 9, "top_k": 5, "num_samples": 3},
        {"max_new_tokens": 90, "top_p": 0.9},
        {"max_new_tokens": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"max_new_tokens": 40, "logit_bias": {3: 50.0}},
        {"max_new_tokens": 30, "presence_penalty": 1.0, "logprobs": 3, "temperature": 0},
        {"max_new_tokens": 1},
        {"max_new_tokens": 30, "logit_bias": {9: 50.0}},
        {"max_new_tokens": 25, "min_p": 0.05, "stop_token_ids": tuple(range(0, 100, 9))},
    ]
    prompts = [prompt(n) for n in (20, 130, 60, 3, 40, 200, 7, 30)]
    requests = [
        Request(
            ids,
            SamplingParams(seed=n, **kind),
            (lambda: lambda token: [token, 1] if token % 4 == 0 else []) if n % 2 else None,
        )
        for n, (ids, kind) in enumerate(zip([*prompts, prompts[0]], kinds, strict=True))
    ]
    options: dict[str, Any] = {"max_batch": 4, "kept_tokens": 250, "overlap": True}
    plain, captured = Engine(model, **options), captures(Engine(model, **options))
    assert drive(captured, requests) == drive(plain, requests)
    assert len(captured._runner._graphs) > 5
    # What was captured is replayed, with other rows.
    assert drive(captured, requests[::-1]) == drive(plain, requests[::-1])
