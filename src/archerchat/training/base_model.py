"""The model that fine-tuning and reinforcement start from, and what they take over from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.dial import DialConfig, LearningRates, build_hyperparameters, grad_accum_steps
from archerchat.distributed import Ranks
from archerchat.errors import CheckpointError
from archerchat.home import Home
from archerchat.inference.loading import find_model_tokenizer, read_model_config
from archerchat.model.attention import Backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import AdamGroup, MuonGroup, Optimizer, build_groups
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer

DEVICE_BATCH_SIZE = 32
"""Rows per micro-batch where the base model does not say."""


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint to start from. Its weights stay on disk until they are trained."""

    path: Path
    step: int
    meta: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer
    sha256: str
    """Hash of the weights' file, as it was saved."""

    @property
    def tag(self) -> str:
        """Name of the model."""
        return self.path.parent.name

    def describe(self) -> dict[str, Any]:
        """Return what tells this base model from any other."""
        return {"tag": self.tag, "step": self.step, "sha256": self.sha256}


def find_base_model(home: Home, stage: str, tag: str | None, step: int | None) -> BaseModel:
    """Find model `tag` of a stage, or the one saved last, without reading its weights.

    Raises:
        UsageError: there is no such model or step.
        CheckpointError: the checkpoint is damaged.
        TokenizerError: its tokenizer is missing, or is another one by now.
    """
    found = load_checkpoint(find_checkpoint(find_model(home, stage, tag), step), sections=())
    config, tokenizer = read_model_config(found), find_model_tokenizer(home, found)
    return BaseModel(
        found.path, found.step, found.meta, config, tokenizer, found.hashes.get("model", "")
    )


@dataclass(frozen=True)
class Inheritance:
    """How to train, as the base model and the overrides have it."""

    device_batch_size: int
    total_batch_tokens: int
    grad_accum_steps: int
    learning_rates: LearningRates
    """The base model's rates, scaled down."""


def inherit(
    base: BaseModel,
    runtime: Runtime,
    rate_scale: float,
    device_batch_size: int | None = None,
    total_batch_tokens: int | None = None,
) -> Inheritance:
    """Take batch and rates from the base checkpoint, or from the dial if it has none.

    A batch that differs from the base model's scales the rates by the square root of their ratio,
    as the dial does.

    Raises:
        UsageError: the batch is not a whole number of micro-batches.
        CheckpointError: what the checkpoint says of its rates cannot be read.
    """
    identity, model = base.meta.get("identity"), base.config
    if identity is None:  # imported
        rates, batch = _rates_of_the_dial(model, total_batch_tokens)
        rows = device_batch_size or DEVICE_BATCH_SIZE
        rows = min(rows, max(1, batch // model.sequence_length))
    else:
        try:
            rates = LearningRates(**identity["learning_rates"])
            batch = int(identity["total_batch_size"])
            rows = device_batch_size or int(identity["device_batch_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{base.path} does not say how it was trained ({error!r}): use a base model of "
                "`archerchat pretrain`"
            ) from error
    tokens = total_batch_tokens or batch
    scale = math.sqrt(tokens / batch)
    scaled = {name: rate * rate_scale * scale for name, rate in asdict(rates).items()}
    scaled["smear"] = rates.smear * rate_scale  # never scaled for the batch
    accum = grad_accum_steps(tokens, rows, model.sequence_length, runtime.world_size)
    return Inheritance(rows, tokens, accum, LearningRates(**scaled))


def _rates_of_the_dial(model: ModelConfig, batch: int | None) -> tuple[LearningRates, int]:
    """Return the default rates of a model of this shape, and their batch."""
    dial = DialConfig(
        depth=model.num_layers,
        aspect_ratio=max(1, model.model_dim // model.num_layers),
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        max_seq_len=model.sequence_length,
        num_iterations=1,
        total_batch_size=batch,
    )
    hp = build_hyperparameters(dial, model.vocab_size)
    return hp.learning_rates, hp.total_batch_tokens


def build_model(
    base: BaseModel, start: Checkpoint | None, runtime: Runtime, backend: Backend
) -> Transformer:
    """Return the model to be trained, with the base model's weights.

    A resumed run has the weights in its own checkpoint, so the base model's are not read then.

    Raises:
        CheckpointError: the base model's weights are damaged.
    """
    model = Transformer(base.config, runtime.compute_dtype, backend)
    if start is None:
        model.load_state_dict(load_checkpoint(base.path, sections=("model",)).state["model"])
    return model.to(runtime.device)


def build_optimizer(
    model: Transformer,
    rates: LearningRates,
    runtime: Runtime,
    compile: bool,
    ranks: Ranks | None = None,
) -> Optimizer:
    """Return an optimizer in which nothing decays."""
    groups: list[AdamGroup | MuonGroup] = [
        replace(group, weight_decay=0.0) if isinstance(group, AdamGroup) else group
        for group in build_groups(model, rates)
    ]
    return Optimizer(model, groups, runtime.compute_dtype, compile=compile, ranks=ranks)


def describe_moments(base: BaseModel, warm_start: bool) -> str:
    """Say where the optimizer's moments start from."""
    if not warm_start:
        return "from zero"
    if not _has_moments(base):
        return "from zero: the base checkpoint has no optimizer state"
    return f"from the base model's step {base.step}"


def load_moments(optimizer: Optimizer, base: BaseModel) -> None:
    """Take over the moments of the base model's training where its checkpoint has them.

    Raises:
        CheckpointError: they do not fit the model.
    """
    if not _has_moments(base):
        return
    saved = load_checkpoint(base.path, sections=("optimizer",))
    try:
        optimizer.load_state_dict(saved.state["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{base.path} does not fit its own model: {error}") from error


def _has_moments(base: BaseModel) -> bool:
    return (base.path / "optimizer.safetensors").exists()
