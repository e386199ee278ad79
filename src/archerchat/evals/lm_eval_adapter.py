"""Evaluate checkpoints with EleutherAI's lm-evaluation-harness (extra `archerchat[lm-eval]`).

    python -m archerchat.evals.lm_eval_adapter run --model archerchat \\
        --model_args tag=d12,stage=base --tasks arc_easy,hellaswag

This is the harness's own command with one more model; in a script, `register()` adds it. Everything
that the harness asks for is in `HarnessModel`, which does not import the harness and can be tested
without it. As in CORE, every prompt starts with BOS and is not truncated. Context and continuation
are tokenized together, and the tokens that differ from those of the context alone are scored.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archerchat.console import LiveLine, build_console
from archerchat.errors import ArcherChatError, UsageError
from archerchat.evals.core.prompts import Prompt, build_tree, common_prefix
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer
from archerchat.runtime import build_runtime, prepare_process

NAME = "archerchat"
MAX_NEW_TOKENS = 256
"""Length of an answer, unless the task says another."""


def score_prompts(
    model: Transformer, prompts: Sequence[Prompt], batch_tokens: int | None = None
) -> list[tuple[float, bool]]:
    """Return each prompt's log probability, and whether all its tokens are the likeliest."""
    trees = [build_tree(index, [prompt]) for index, prompt in enumerate(prompts)]
    scores, done = [(0.0, True)] * len(prompts), 0
    with LiveLine(build_console(stderr=True), "log likelihoods", len(prompts)) as line:
        for outcomes in iter_outcomes(model, trees, "language_modeling", batch_tokens):
            for outcome in outcomes:
                scored = len(trees[outcome.index].targets)
                total = -outcome.losses[0] * scored if scored else 0.0
                scores[outcome.index] = total, outcome.all_predicted
            done += len(outcomes)
            line.show(f"log likelihoods | {done} of {len(prompts)}", done)
    return scores


class HarnessModel:
    """Answer the harness's three kinds of requests, each an object with `args`.

    Args:
        tag, stage, step: the checkpoint, as in `archerchat eval`.
        device, dtype: by default the best ones of this machine. On the harness's command line the
            device has a flag of its own, `--device`.
        home: folder of the models; by default from the environment.
        batch_tokens: tokens in a forward pass; by default as many as CORE takes.
        loaded: a model in memory, instead of all of the above.
        ignored: what the harness passes to every model.
    """

    def __init__(
        self,
        tag: str | None = None,
        stage: str = "base",
        step: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        home: str | Path | None = None,
        batch_tokens: int | None = None,
        loaded: LoadedModel | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()  # the harness's own class, if there is one
        if unknown := ignored.keys() - {"batch_size", "max_batch_size"}:
            raise UsageError(
                f"--model_args has {min(unknown)!r}; known are tag, stage, step, dtype, home and "
                "batch_tokens"
            )
        if loaded is None:
            kind = device.partition(":")[0] if device else None
            if kind == "cuda" and not torch.cuda.is_available():
                kind = None  # the harness asks for CUDA even where there is none
            runtime = build_runtime(kind, dtype)
            prepare_process(runtime)
            root = Home(Path(home)) if home else Home.from_environment()
            loaded = load_model(root, runtime, stage, tag, step)
            print(f"model: {loaded.path}", file=sys.stderr)
        self.model, self.tokenizer, self.path = loaded.model, loaded.tokenizer, loaded.path
        self.batch_tokens = batch_tokens
        self._engine: Engine | None = None

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log probability and whether it is greedy."""
        prompts = [self.prompt(*request.args) for request in requests]
        return score_prompts(self.model, prompts, self.batch_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return each text's log probability, computed in pieces of the model's context length."""
        pieces = [self.windows(request.args[0]) for request in requests]
        scores = iter(score_prompts(self.model, list(chain(*pieces)), self.batch_tokens))
        return [sum(next(scores)[0] for _ in prompts) for prompts in pieces]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context up to one of its stop strings, which is not returned."""
        engine = self._engine = self._engine or Engine(self.model)
        pairs = [request.args for request in requests]
        asked = [self._request(context, options, engine.max_length) for context, options in pairs]
        return [completion.text for (completion,) in engine.generate(asked)]

    def prompt(self, context: str, continuation: str) -> Prompt:
        """Tokenize context and continuation together; score the tokens that it adds or changes."""
        before, whole = self._encode(context), self._encode(context + continuation)
        return Prompt(whole, common_prefix([before, whole]))

    def windows(self, text: str) -> list[Prompt]:
        """Cut a text so that each token is scored once, after as much context as fits."""
        ids = self._encode(text)
        room, prompts = self.model.config.sequence_length, []
        for first in range(1, len(ids), room):
            end = min(first + room, len(ids))
            begin = max(0, end - room - 1)
            prompts.append(Prompt(ids[begin:end], first - begin))
        return prompts

    def _encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array([self.tokenizer.bos_id, *self.tokenizer.encode(text)], dtype=np.int32)

    def _request(self, context: str, options: Mapping[str, Any], length: int) -> Request:
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
        new = min(new, length - 1)
        sampled = options.get("do_sample", False)
        temperature = float(options.get("temperature") or 0.0) if sampled else 0.0
        until = options.get("until") or []
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        bos = self.tokenizer.bos_id
        # The question is at the end of the context: cut its beginning.
        prompt = [bos, *self.tokenizer.encode(context)][new - length :]
        params = SamplingParams(new, temperature, stop=stop, stop_token_ids=(bos,))
        return Request(prompt, params, decode=self.tokenizer.decode)


def register() -> type:
    """Make `--model archerchat` known to the harness; a UsageError if that is not there."""
    try:
        model = importlib.import_module("lm_eval.api.model")
        registry = importlib.import_module("lm_eval.api.registry")
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'archerchat[lm-eval]'"
        ) from error
    made: type = type("ArcherChatLM", (HarnessModel, model.LM), {})
    if NAME not in registry.model_registry:
        registry.register_model(NAME)(made)
    return made


def main() -> None:
    try:
        register()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except ArcherChatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
