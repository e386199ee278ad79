"""`archerchat sample`: print text that a model writes, with and without a prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console

from archerchat.console import build_console
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, ModelOptions
from archerchat.inference.sampling_params import SamplingParams, derive_seed
from archerchat.inference.sequence import Event, Request

SAMPLING = SamplingParams(max_new_tokens=96, temperature=0.7, top_k=50, num_samples=3)
PROMPTS = (
    "The capital of France is",
    "If yesterday was Friday, then tomorrow will be",
    "def __init__(self",
    "Return a list of",
)
MAX_ROWS = 16
"""Most samples to generate at a time."""

CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
"""A model may write any byte; bytes that control a terminal are replaced."""


@dataclass(frozen=True)
class SampleConfig(ModelOptions):
    """Print samples of a model, with and without prompts."""

    source: Literal["base", "sft", "rl"] = "base"
    """Stage to load: base, sft or rl."""
    prompt: str | None = None
    """Text to continue. By default, a few built-in prompts, then samples without a prompt."""
    sampling: SamplingParams = SAMPLING


def sample(config: SampleConfig, home: Home) -> None:
    """Load a model and print samples, token by token."""
    config.sampling.refuse_changes("logprobs")
    loaded, _ = config.load(home, config.source)
    console = build_console()
    print_samples(loaded, config, console)


def print_samples(loaded: LoadedModel, config: SampleConfig, console: Console) -> None:
    """Print the samples that `config` asks for."""
    params, tokenizer = config.sampling, loaded.tokenizer
    prompts = [] if config.prompt is not None else list(PROMPTS)
    prompts += [config.prompt or ""] * params.num_samples
    stop_token_ids = (tokenizer.bos_id, *params.stop_token_ids)
    requests = [
        Request(
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            replace(
                params,
                stop_token_ids=stop_token_ids,
                seed=derive_seed(params.seed, number),
                num_samples=1,
            ),
            decode=tokenizer.decode,
        )
        for number, prompt in enumerate(prompts)
    ]
    engine = Engine(loaded.model, max_batch=min(len(requests), MAX_ROWS))
    texts = _in_turn(engine.stream(requests), len(requests))
    for prompt, pieces in zip(prompts, texts, strict=True):
        console.rule("prompted" if prompt else "no prompt", align="left")
        console.print(prompt, end="", style="bold")
        for piece in pieces:
            console.print(piece.translate(CONTROLS), end="")
        console.print()


def _in_turn(events: Iterator[Event], count: int) -> Iterator[Iterator[str]]:
    """Yield each request's text in order, piece by piece; later requests' pieces wait.

    An iterator must be exhausted before the next one is taken.
    """
    waiting: list[deque[Event]] = [deque() for _ in range(count)]

    def pieces(number: int) -> Iterator[str]:
        while True:
            while not waiting[number]:
                event = next(events)
                waiting[event.request].append(event)
            event = waiting[number].popleft()
            yield event.text
            if event.finish_reason is not None:
                return

    return map(pieces, range(count))
