"""From a model's name to the model and its tokenizer, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.home import Home
from archerchat.model.attention import choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model for inference with what belongs to it."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    """The checkpoint."""
    step: int
    meta: dict[str, Any]


def load_model(
    home: Home, runtime: Runtime, stage: str, tag: str | None, step: int | None = None
) -> LoadedModel:
    """Load model `tag` of a stage, or the one saved last, and the tokenizer that it names.

    Raises:
        UsageError: there is no such model or step.
        CheckpointError: the checkpoint is damaged.
        TokenizerError: the tokenizer is missing, or not the one that the model was trained with.
    """
    directory = find_model(home, stage, tag)
    checkpoint = load_checkpoint(find_checkpoint(directory, step), sections=("model",))
    config = read_model_config(checkpoint)
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    model = Transformer(config, runtime.compute_dtype, backend)
    try:
        model.load_state_dict(checkpoint.state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not hold a model: {error!r}") from error
    tokenizer = find_model_tokenizer(home, checkpoint)
    model.to(runtime.device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, checkpoint.path, checkpoint.step, checkpoint.meta)


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return the shape of a checkpoint's model.

    Raises:
        CheckpointError: the checkpoint does not say it.
    """
    try:
        return ModelConfig(**checkpoint.meta["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} does not hold a model: {error!r}") from error


def find_model_tokenizer(home: Home, checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer that a checkpoint's model was trained with.

    Raises:
        UsageError: the model was imported without one.
        TokenizerError: it is missing, or was replaced since.
    """
    named = checkpoint.meta.get("tokenizer")
    if named is None:
        raise UsageError(
            f"{checkpoint.path} was imported without its tokenizer: import it again with "
            "--tokenizer DIR"
        )
    tokenizer = Tokenizer.load(home.tokenizer_dir(named["name"]))
    if tokenizer.fingerprint != named["fingerprint"]:
        raise TokenizerError(
            f"tokenizer {named['name']!r} is not the one that {checkpoint.path} was trained with: "
            "it was replaced since; restore the old one, or train the model again"
        )
    return tokenizer
