"""What fine-tuning takes over from its base model: shape, batch, rates, optimizer moments."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from archerchat.checkpoint import load_checkpoint
from archerchat.data.conversation_loader import ConversationLoader, render_whole
from archerchat.dial import DialConfig, LearningRates, build_hyperparameters, grad_accum_steps
from archerchat.errors import CheckpointError, UsageError
from archerchat.files import sha256_file
from archerchat.inference.loading import LoadedModel
from archerchat.model.attention import Backend, choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import AdamGroup, MuonGroup, Optimizer, build_groups
from archerchat.runtime import Runtime
from archerchat.tasks.base import TaskMixture
from archerchat.tokenizer.bpe import Tokenizer

DEVICE_BATCH_SIZE = 32
"""Rows in a micro-batch where the base model does not say."""
ESTIMATE_FROM = 64
"""Conversations that are rendered to say how long a run will be."""


@dataclass(frozen=True)
class Inheritance:
    """How to train, as the base model and the overrides have it."""

    device_batch_size: int
    total_batch_tokens: int
    grad_accum_steps: int
    learning_rates: LearningRates
    """Scaled down for fine-tuning."""


def inherit(
    base: LoadedModel,
    runtime: Runtime,
    rate_scale: float,
    device_batch_size: int | None,
    total_batch_tokens: int | None,
) -> Inheritance:
    """Take batch and rates from the base checkpoint, or from the dial if it has none.

    Another batch than the base model's scales the rates by the square root of their ratio, as the
    dial does.

    Raises:
        UsageError: the batch is not a whole number of micro-batches.
        CheckpointError: what the checkpoint says of its rates cannot be read.
    """
    identity, model = base.meta.get("identity"), base.model.config
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


def choose_attention(
    runtime: Runtime, forced: str | None, document_masking: bool, compile: bool
) -> tuple[Backend, str]:
    """Pick the attention backend, one that can keep documents apart where that is asked for.

    Raises:
        UsageError: the forced one is unknown, cannot run here, or cannot do that.
    """
    try:
        backend, reason = choose_backend(runtime.device, runtime.compute_dtype, forced)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not document_masking or backend in ("sdpa", "matmul"):
        return backend, reason
    if backend == "flash" and forced is not None:
        raise UsageError(
            "--attention flash cannot keep the conversations of a row apart: leave --attention "
            "out, or --document-masking"
        )
    if compile:
        return "flex", "keeps the conversations of a row apart"
    return "sdpa", "keeps the conversations of a row apart; flex needs --compile"


def build_model(base: LoadedModel, runtime: Runtime, backend: Backend) -> Transformer:
    """Return the base model once more, to be trained."""
    model = Transformer(base.model.config, runtime.compute_dtype, backend)
    model.load_state_dict(base.model.state_dict())
    return model.to(runtime.device)


def build_optimizer(
    model: Transformer, rates: LearningRates, runtime: Runtime, compile: bool
) -> Optimizer:
    """Return an optimizer in which nothing decays."""
    groups: list[AdamGroup | MuonGroup] = [
        replace(group, weight_decay=0.0) if isinstance(group, AdamGroup) else group
        for group in build_groups(model, rates)
    ]
    return Optimizer(model, groups, runtime.compute_dtype, compile=compile)


def warm_start(optimizer: Optimizer, base: LoadedModel) -> str:
    """Take over the moments of the base model's training where its checkpoint has them.

    Returns:
        What was done, in words.

    Raises:
        CheckpointError: they do not fit the model.
    """
    if "optimizer_steps" not in base.meta:
        return "from zero: the base checkpoint has no optimizer state"
    saved = load_checkpoint(base.path, sections=("optimizer",))
    try:
        optimizer.load_state(saved.tensors["optimizer"], base.meta["optimizer_steps"])
    except ValueError as error:
        raise CheckpointError(f"{base.path} does not fit its own model: {error}") from error
    return f"from the base model's step {base.step}"


def describe_base(base: LoadedModel) -> dict[str, Any]:
    """Return what tells this base model from any other."""
    return {
        "tag": base.path.parent.name,
        "step": base.step,
        "sha256": sha256_file(base.path / "model.safetensors"),
    }


def open_loader(
    mixture: TaskMixture,
    tokenizer: Tokenizer,
    runtime: Runtime,
    rows: int,
    sequence_length: int,
    *,
    repeat: bool,
) -> ConversationLoader:
    """Open this rank's share of a mixture."""
    return ConversationLoader(
        mixture,
        tokenizer,
        batch_size=rows,
        sequence_length=sequence_length,
        rank=runtime.rank,
        world_size=runtime.world_size,
        repeat=repeat,
    )


def estimate_steps(
    mixture: TaskMixture, tokenizer: Tokenizer, sequence_length: int, batch_tokens: int
) -> int:
    """Return about how many steps a pass takes, from a few of its conversations."""
    size = len(mixture)
    indices = range(0, size, math.ceil(size / ESTIMATE_FROM))
    lengths = [min(len(render_whole(tokenizer, mixture, i)[0]), sequence_length) for i in indices]
    return max(1, math.ceil(sum(lengths) / len(lengths) * size / batch_tokens))
