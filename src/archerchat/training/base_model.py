"""What fine-tuning and RL share: the saved model that they start from, and its sample answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.dial import DialConfig, LearningRates, build_hyperparameters
from archerchat.evals.chat import render_question
from archerchat.inference.chat import build_answer_request
from archerchat.inference.engine import Engine
from archerchat.inference.loading import find_model_tokenizer, read_model_config
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import read_parts
from archerchat.model.config import ModelConfig
from archerchat.tasks.conversation import Conversation
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
    """
    if (identity := base.meta.get("identity")) is None:  # imported
        dial = DialConfig(
            depth=model.num_layers,
            aspect_ratio=max(1, model.model_dim // model.num_layers),
            head_dim=model.head_dim,
            num_kv_heads=model.num_kv_heads,
            max_seq_len=model.sequence_length,
            num_iterations=1,
            total_batch_size=total_batch_tokens,
        )
        hp = build_hyperparameters(dial, model.vocab_size)
        rates, batch = hp.learning_rates, hp.total_batch_tokens
        rows = min(DEVICE_BATCH_SIZE, max(1, batch // model.sequence_length))
    else:
        rates = LearningRates(**identity["learning_rates"])
        batch, rows = identity["total_batch_size"], identity["device_batch_size"]
    tokens = total_batch_tokens or batch
    scale = math.sqrt(tokens / batch)
    scaled = {name: rate * rate_scale * scale for name, rate in asdict(rates).items()}
    scaled["smear"] = rates.smear * rate_scale  # never scaled for the batch
    return rows, tokens, LearningRates(**scaled)


class Tuning(Stage):
    """A stage that starts from a saved model."""

    adam_decay = 0.0

    config: TuneConfig
    base: Checkpoint
    """The checkpoint to start from. Its weights stay on disk until they are trained."""

    def find_base(self, source: str) -> None:
        """Read the checkpoint of the chosen model of stage `source`, without its weights."""
        config, home = self.config, self.home
        path = find_checkpoint(find_model(home, source, config.model_tag), config.model_step)
        self.base = load_checkpoint(path, sections=())
        self.model_config = read_model_config(self.base)
        self.tokenizer = find_model_tokenizer(home, self.base)
        self.base_tag = path.parent.name
        self.tag = config.output_tag or self.base_tag

    def describe_base(self) -> dict[str, Any]:
        sha256 = self.base.hashes.get("model", "")
        return {"tag": self.base_tag, "step": self.base.step, "sha256": sha256}

    def describe(self) -> dict[str, Any]:
        kept = {name: self.base.meta[name] for name in ("model_config", "tokenizer")}
        return super().describe() | kept

    def set_weights(self, start: Checkpoint | None) -> None:
        if start is None:  # a resumed run has them in its own checkpoint
            saved = load_checkpoint(self.base.path, sections=("model",))
            self.model.load_state_dict(saved.state["model"])

    def answer_questions(
        self, engine: Engine, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> dict[str, str]:
        """Answer each conversation's question greedily, with the calculator; return the texts.

        The calculator's inputs and results are in brackets. Keys are the questions' beginnings.
        """
        tokenizer, params = self.tokenizer, SamplingParams(max_new_tokens, temperature=0)
        prompts = [render_question(tokenizer, c, engine.max_length)[0] for c in conversations]
        requests = [build_answer_request(tokenizer, prompt, params) for prompt in prompts]
        texts = {}
        for conversation, samples in zip(conversations, engine.generate(requests), strict=True):
            parts = read_parts(tokenizer, samples[0].token_ids)
            answer = "".join(
                part["text"] if part["type"] == "text" else f"[{part['text']}]" for part in parts
            )
            question = conversation["messages"][0]["content"]
            texts[question[:60]] = f"{question} → {answer}"
        return texts
