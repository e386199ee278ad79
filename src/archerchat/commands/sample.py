"""`archerchat sample`: print text that a model writes, with and without a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
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
    print_samples(loaded, config, build_console())


def print_samples(loaded: LoadedModel, config: SampleConfig, console: Console) -> None:
    """Print the samples that `config` asks for."""
    params, tokenizer = config.sampling, loaded.tokenizer
    prompts = list(PROMPTS) if config.prompt is None else []
    prompts += [config.prompt or ""] * params.num_samples
    params = replace(
        params, stop_token_ids=(tokenizer.bos_id, *params.stop_token_ids), num_samples=1
    )
    requests = [
        Request(
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            replace(params, seed=derive_seed(params.seed, number)),
            decode=tokenizer.decode,
        )
        for number, prompt in enumerate(prompts)
    ]
    events = Engine(loaded.model, max_batch=min(len(requests), MAX_ROWS)).stream(requests)
    waiting: list[list[Event]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        console.rule("prompted" if prompt else "no prompt", align="left")
        console.print(prompt, end="", style="bold")
        for event in _in_turn(events, waiting, number):
            console.print(event.text.translate(CONTROLS), end="")
        console.print()


def _in_turn(events: Iterator[Event], waiting: list[list[Event]], number: int) -> Iterator[Event]:
    """Yield the events of request `number`; those of later requests wait for their turn."""
    for event in chain(waiting[number], events):
        if event.request != number:
            waiting[event.request].append(event)
            continue
        yield event
        if event.finish_reason is not None:
            return
