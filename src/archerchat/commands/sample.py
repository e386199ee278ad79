"""`archerchat sample`: what a model says, with a prompt and without one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from archerchat.console import build_console
from archerchat.errors import UsageError, require_positive, require_seed
from archerchat.home import Home
from archerchat.inference.draws import row_seed
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.requests import Event, Request
from archerchat.runtime import build_runtime, prepare_process

PROMPTS = (
    "The capital of France is",
    "If yesterday was Friday, then tomorrow will be",
    "def __init__(self",
    "Return a list of",
)
MOST_ROWS = 16
"""Samples at a time."""

CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
"""A model says any byte; those that a terminal obeys are shown as unprintable instead."""


@dataclass(frozen=True)
class SampleConfig:
    """Print conditioned and unconditioned samples of a model."""

    source: Literal["base", "sft", "rl"] = "base"
    """Which stage of the model: pretrained, fine-tuned, or after reinforcement learning."""
    model_tag: str | None = None
    """The model's name; by default the one that was saved last."""
    step: int | None = None
    """Which of its checkpoints; by default the latest."""
    prompt: str | None = None
    """Continue this text only; by default a few prompts, then nothing but BOS."""
    num_samples: int = 3
    """Unconditioned samples, or samples of the prompt that is given."""
    max_tokens: int = 96
    """Tokens in a sample at most."""
    temperature: float = 0.7
    """0 takes the most likely token each time, larger values draw more freely."""
    top_k: int | None = 50
    """Draw from so many of the most likely tokens; None draws from all."""
    seed: int = 42
    """Of the draws."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to run; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""


def sample(config: SampleConfig, home: Home) -> None:
    """Load a model and print samples, each token as it comes.

    Raises:
        UsageError: there is no such model, or a number makes no sense.
        CheckpointError, TokenizerError: what is there is damaged.
    """
    _check(config)
    runtime = build_runtime(config.device, config.dtype)
    prepare_process(runtime)
    loaded = load_model(home, runtime, config.source, config.model_tag, config.step)
    console = build_console()
    console.print(f"{loaded.path}", style="dim")
    print_samples(loaded, config, console)


def print_samples(loaded: LoadedModel, config: SampleConfig, console: Console) -> None:
    """Print what `config` asks for."""
    prompts = [] if config.prompt is not None else list(PROMPTS)
    prompts += [config.prompt or ""] * config.num_samples
    tokenizer = loaded.tokenizer
    requests = [
        Request(
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            config.max_tokens,
            config.temperature,
            config.top_k,
            seed=row_seed(config.seed, number),
            stop_tokens=(tokenizer.bos_id,),
        )
        for number, prompt in enumerate(prompts)
    ]
    engine = Engine(loaded.model, max_batch=min(len(requests), MOST_ROWS))
    for prompt, tokens in zip(
        prompts, _in_turn(engine.stream(requests), len(requests)), strict=True
    ):
        console.rule("prompted" if prompt else "no prompt", align="left")
        console.print(prompt, end="", style="bold")
        ids: list[int] = []
        shown = ""
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # an unfinished character: wait for the rest
                console.print(text[len(shown) :].translate(CONTROLS), end="")
                shown = text
        console.print(tokenizer.decode(ids)[len(shown) :].translate(CONTROLS))


def _in_turn(events: Iterator[Event], count: int) -> Iterator[Iterator[int]]:
    """Yield each request's tokens in order, as they come; those of later ones wait.

    An iterator must be used up before the next one is taken.
    """
    waiting: list[deque[Event]] = [deque() for _ in range(count)]

    def tokens(number: int) -> Iterator[int]:
        while True:
            while not waiting[number]:
                event = next(events)
                waiting[event.request].append(event)
            event = waiting[number].popleft()
            if event.token is not None:
                yield event.token
            if event.finish_reason is not None:
                return

    for number in range(count):
        yield tokens(number)


def _check(config: SampleConfig) -> None:
    require_positive(config, "num_samples", "max_tokens", "top_k")
    if config.temperature != 0 and not 0.001 <= config.temperature <= 10:
        raise UsageError(
            f"--temperature is {config.temperature}; it must be 0, or from 0.001 to 10"
        )
    require_seed(config.seed)
