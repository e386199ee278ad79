"""Use a model from Python: `from archerchat import load`.

    model = load("d12", stage="sft")
    (text,) = model.generate("The capital of France is", max_new_tokens=32, temperature=0.7)
    paris, rome = model.score("The capital of France is", " Paris", " Rome")
    for piece in model.chat(temperature=0.6).answer("What is 6 times 7?"):
        print(piece.text, end="")

Options of sampling are the fields of `SamplingParams`, as on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from archerchat.config import DeviceName, DtypeName
from archerchat.home import Home
from archerchat.inference.chat import CHAT_SAMPLING, ChatSession, generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.prefill import score_prompts
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.scheduler import common_length
from archerchat.runtime import build_runtime, prepare_process


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer and the engine that runs it."""

    loaded: LoadedModel
    engine: Engine

    def generate(self, *prompts: str, **sampling: Any) -> list[str]:
        """Return texts that continue each prompt in turn: `num_samples` of them, 1 by default.

        Raises:
            UsageError: a prompt is longer than the context, or an option is out of range.
        """
        tokenizer, params = self.loaded.tokenizer, SamplingParams(**sampling)
        params = replace(params, stop_token_ids=(tokenizer.bos_id, *params.stop_token_ids))
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        return generate_texts(self.engine, tokenizer, ids, params)

    def score(self, prompt: str, *continuations: str) -> list[float]:
        """Return the log probability of each continuation of the prompt, in nats.

        Scored are the tokens from the first one that the prompt alone does not have.
        """
        tokenizer = self.loaded.tokenizer
        texts = [prompt, *(prompt + each for each in continuations)]
        alone, *rows = ([tokenizer.bos_id, *tokenizer.encode(text)] for text in texts)
        found = score_prompts(self.engine.model, rows, top=0) if rows else []
        return [
            sum(each.logprob for each in scores[common_length(alone, row) :] if each is not None)
            for row, scores in zip(rows, found, strict=True)
        ]

    def chat(self, system: str | None = None, **sampling: Any) -> ChatSession:
        """Start a conversation, best with a model of stage sft or rl."""
        params = replace(CHAT_SAMPLING, **sampling)
        return ChatSession(self.engine, self.loaded.tokenizer, params, system)


def load(
    tag: str | None = None,
    stage: str = "base",
    step: int | None = None,
    device: DeviceName | None = None,
    dtype: DtypeName | None = None,
    home: str | Path | None = None,
) -> Model:
    """Load a model: by default the latest step of the base model saved last, on the best device.

    Args:
        stage: base, sft or rl.
        home: folder of the models; by default `ARCHERCHAT_HOME`.

    Raises:
        UsageError: there is no such model, step or device.
        CheckpointError, TokenizerError: the model or its tokenizer is damaged.
    """
    runtime = build_runtime(device, dtype)
    prepare_process(runtime)
    root = Home(Path(home)) if home else Home.from_environment()
    loaded = load_model(root, runtime, stage, tag, step)
    return Model(loaded, Engine(loaded.model))
