"""`archerchat sample`: what a base model says, with a prompt and without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from archerchat.artifacts import Home
from archerchat.errors import UsageError
from archerchat.inference.loading import LoadedModel, load_model, sampling_generator
from archerchat.inference.sampling import iter_tokens
from archerchat.runtime import build_runtime, prepare_process

PROMPTS = (
    "The capital of France is",
    "If yesterday was Friday, then tomorrow will be",
    "def __init__(self",
    "Return a list of",
)


CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
"""A model says any byte; those that a terminal obeys are shown as unprintable instead."""


@dataclass(frozen=True)
class SampleConfig:
    """Print conditioned and unconditioned samples of a base model."""

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
    loaded = load_model(home, runtime, "base", config.model_tag, config.step)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"{loaded.path}", style="dim")
    print_samples(loaded, config, console)


def print_samples(loaded: LoadedModel, config: SampleConfig, console: Console) -> None:
    """Print what `config` asks for."""
    generator = sampling_generator(config.seed)
    prompts = [] if config.prompt is not None else list(PROMPTS)
    prompts += [config.prompt or ""] * config.num_samples
    tokenizer, model = loaded.tokenizer, loaded.model
    for prompt in prompts:
        console.rule("prompted" if prompt else "no prompt", align="left")
        console.print(prompt, end="", style="bold")
        ids: list[int] = []
        shown = ""
        for token in iter_tokens(
            model,
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            config.max_tokens,
            config.temperature,
            config.top_k,
            generator,
            stop_ids=(tokenizer.bos_id,),
        ):
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # an unfinished character: wait for the rest
                console.print(text[len(shown) :].translate(CONTROLS), end="")
                shown = text
        console.print(tokenizer.decode(ids)[len(shown) :].translate(CONTROLS))


def _check(config: SampleConfig) -> None:
    for name in ("num_samples", "max_tokens", "top_k"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if config.temperature != 0 and not 0.001 <= config.temperature <= 10:
        raise UsageError(
            f"--temperature is {config.temperature}; it must be 0, or from 0.001 to 10"
        )
    if not 0 <= config.seed < 2**63:
        raise UsageError(f"--seed is {config.seed}; it must be from 0 to 2**63 - 1")
