"""The saved model that fine-tuning and reinforcement learning start from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.dial import DialConfig, LearningRates, build_hyperparameters
from archerchat.errors import CheckpointError
from archerchat.inference.loading import find_model_tokenizer, read_model_config
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import AdamGroup, Optimizer, build_groups
from archerchat.training.stage import Stage, StageConfig

DEVICE_BATCH_SIZE = 32
"""Rows per micro-batch if the base model's checkpoint does not record them."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(StageConfig):
    """Options of the stages that start from a saved model."""

    model_tag: str | None = None
    """Name of the model to start from. Defaults to the one that was saved last."""
    model_step: int | None = None
    """Step of its checkpoint. Defaults to the latest."""
    output_tag: str | None = None
    """Name of the new model. Defaults to the first model's name."""


def inherit(
    base: Checkpoint, model: ModelConfig, rate_scale: float, total_batch_tokens: int | None = None
) -> tuple[int, int, LearningRates]:
    """Take batch and rates from a base model's checkpoint, or from the dial if it has none.

    For another batch size the rates are scaled by the square root of the ratio, as in the dial.

    Returns:
        Rows per micro-batch, tokens per step, and the base model's rates, scaled.

    Raises:
        CheckpointError: the checkpoint's rates cannot be read.
    """
    identity = base.meta.get("identity")
    if identity is None:  # imported
        hp = build_hyperparameters(_dial_of(model, total_batch_tokens), model.vocab_size)
        rates, batch = hp.learning_rates, hp.total_batch_tokens
        rows = min(DEVICE_BATCH_SIZE, max(1, batch // model.sequence_length))
    else:
        try:
            rates = LearningRates(**identity["learning_rates"])
            batch, rows = int(identity["total_batch_size"]), int(identity["device_batch_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{base.path} does not say how it was trained ({error!r}): use a base model of "
                "`archerchat pretrain`"
            ) from error
    tokens = total_batch_tokens or batch
    scale = math.sqrt(tokens / batch)
    scaled = {name: rate * rate_scale * scale for name, rate in asdict(rates).items()}
    scaled["smear"] = rates.smear * rate_scale  # never scaled for the batch
    return rows, tokens, LearningRates(**scaled)


def _dial_of(model: ModelConfig, batch: int | None) -> DialConfig:
    """Return the dial's settings for a model of this shape."""
    return DialConfig(
        depth=model.num_layers,
        aspect_ratio=max(1, model.model_dim // model.num_layers),
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        max_seq_len=model.sequence_length,
        num_iterations=1,
        total_batch_size=batch,
    )


class Tuning(Stage):
    """A stage that starts from a saved model."""

    config: TuneConfig
    base: Checkpoint
    """The checkpoint to start from. Its weights stay on disk until they are trained."""
    rates: LearningRates

    def find_base(self, source: str) -> None:
        """Read the checkpoint of the chosen model of stage `source`, without its weights.

        Raises:
            UsageError: there is no such model or step.
            CheckpointError: the checkpoint is damaged.
            TokenizerError: its tokenizer is missing or was replaced.
        """
        config, home = self.config, self.home
        path = find_checkpoint(find_model(home, source, config.model_tag), config.model_step)
        self.base = load_checkpoint(path, sections=())
        self.model_config = read_model_config(self.base)
        self.tokenizer = find_model_tokenizer(home, self.base)
        self.sequence_length = self.model_config.sequence_length
        self.base_tag = path.parent.name
        self.tag = config.output_tag or self.base_tag

    def describe_base(self) -> dict[str, Any]:
        """Identify the base model."""
        sha256 = self.base.hashes.get("model", "")
        return {"tag": self.base_tag, "step": self.base.step, "sha256": sha256}

    def facts(self) -> dict[str, Any]:
        """Return what is the base model's."""
        return {name: self.base.meta[name] for name in ("model_config", "tokenizer")}

    def build_model(self, start: Checkpoint | None) -> None:
        """Build the model with the base model's weights, and an optimizer in which nothing decays.

        A resumed run has the weights in its own checkpoint, so the base model's are not read then.

        Raises:
            CheckpointError: the base model's weights are damaged.
        """
        base, runtime = self.base, self.runtime
        model = Transformer(self.model_config, runtime.compute_dtype, self.backend)
        if start is None:
            model.load_state_dict(load_checkpoint(base.path, sections=("model",)).state["model"])
        model.to(runtime.device).recomputes = self.recomputes
        groups = [
            replace(group, weight_decay=0.0) if isinstance(group, AdamGroup) else group
            for group in build_groups(model, self.rates)
        ]
        self.model = model
        self.optimizer = Optimizer(
            model, groups, runtime.compute_dtype, self.config.compile, self.ranks
        )

    def load_moments(self) -> None:
        """Load the moments of the base model's optimizer.

        Raises:
            CheckpointError: they do not fit the model.
        """
        saved = load_checkpoint(self.base.path, sections=("optimizer",))
        try:
            self.optimizer.load_state_dict(saved.state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"{self.base.path} does not fit its own model: {error}"
            ) from error
