"""What fine-tuning and reinforcement share: the saved model that they start from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.dial import DialConfig, LearningRates, build_hyperparameters
from archerchat.errors import CheckpointError
from archerchat.home import Home
from archerchat.inference.loading import find_model_tokenizer, read_model_config
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import AdamGroup, Optimizer, build_groups
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.training.stage import Stage, StageConfig

DEVICE_BATCH_SIZE = 32
"""Rows per micro-batch where the base model does not say."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(StageConfig):
    """Options of the stages that start from a saved model."""

    model_tag: str | None = None
    """Name of the model to start from. Defaults to the one that was saved last."""
    model_step: int | None = None
    """Step of its checkpoint. Defaults to the latest."""
    output_tag: str | None = None
    """Name of the new model. Defaults to the first model's name."""


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

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's state was saved with it."""
        return (self.path / "optimizer.safetensors").exists()

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
    """How to train, as the base model has it."""

    device_batch_size: int
    total_batch_tokens: int
    learning_rates: LearningRates
    """The base model's rates, scaled."""


def inherit(
    base: BaseModel, rate_scale: float, total_batch_tokens: int | None = None
) -> Inheritance:
    """Take batch and rates from the base checkpoint, or from the dial if it has none.

    A batch that differs from the base model's scales the rates by the square root of their ratio,
    as the dial does.

    Raises:
        CheckpointError: what the checkpoint says of its rates cannot be read.
    """
    identity, model = base.meta.get("identity"), base.config
    if identity is None:  # imported
        rates, batch = _rates_of_the_dial(model, total_batch_tokens)
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
    return Inheritance(rows, tokens, LearningRates(**scaled))


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


class Tuning(Stage):
    """A stage that starts from a saved model.

    Args:
        source: that model's stage.
    """

    config: TuneConfig
    rates: LearningRates

    def __init__(
        self,
        config: TuneConfig,
        home: Home,
        console: Console | None,
        most_rows: int | None,
        source: str,
    ) -> None:
        super().__init__(config, home, console, most_rows)
        self.base = find_base_model(home, source, config.model_tag, config.model_step)
        self.tokenizer, self.sequence_length = self.base.tokenizer, self.base.config.sequence_length
        self.tag = config.output_tag or self.base.tag

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
        model = Transformer(base.config, runtime.compute_dtype, self.backend)
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
        """Continue with the moments of the base model's optimizer.

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
