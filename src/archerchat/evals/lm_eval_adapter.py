"""Let EleutherAI's lm-evaluation-harness evaluate our checkpoints (extra `archerchat[lm-eval]`).

    python -m archerchat.evals.lm_eval_adapter run --model archerchat \\
        --model_args tag=d12,stage=base --tasks arc_easy,hellaswag

is the harness's own command with one more model; in a script `register()` adds it. Everything that
the harness asks for is in `HarnessModel`, which knows nothing of the harness and can be tested
without it. As in CORE every prompt starts with BOS and is not cut, and what the tokens of context
and continuation do not share with those of the context alone is scored.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from archerchat.console import build_console
from archerchat.errors import ArcherChatError, UsageError
from archerchat.evals.core.prompts import common_prefix
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request, SequenceHook
from archerchat.model.transformer import Transformer
from archerchat.runtime import build_runtime, prepare_process
from archerchat.tokenizer.bpe import Tokenizer

NAME = "archerchat"
"""Of the model in the harness."""
BATCH_TOKENS = 8192
"""Of one forward pass, padding included."""
LOGITS_ROWS = 512
"""Positions whose logits exist at a time."""
MAX_NEW_TOKENS = 256
"""Of an answer, where a task does not say."""


@dataclass(frozen=True)
class Span:
    """Token ids of which those from `start` on are scored; at least one stands before."""

    token_ids: list[int]
    start: int


@torch.no_grad()
def score_spans(
    model: Transformer, spans: Sequence[Span], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, float, bool]]:
    """Yield each span's index, its log probability, and whether all its tokens are the likeliest.

    Rows of similar length run together, padded on the right, where a causal model does not look.
    """
    by_length = sorted(range(len(spans)), key=lambda i: len(spans[i].token_ids), reverse=True)
    while by_length:
        width = max(1, len(spans[by_length[0]].token_ids) - 1)
        count = max(1, batch_tokens // width)
        batch, by_length = by_length[:count], by_length[count:]
        rows = torch.zeros(len(batch), width, dtype=torch.int64)
        sources, targets = [], []
        for row, index in enumerate(batch):
            span = spans[index]
            inputs = torch.tensor(span.token_ids[:-1])
            rows[row, : len(inputs)] = inputs
            sources += [row * width + i for i in range(span.start - 1, len(inputs))]
            targets += span.token_ids[span.start :]
        hidden = model.hidden(rows.to(model.device)).flatten(0, 1)
        chosen = torch.tensor(sources, device=model.device)
        wanted = torch.tensor(targets, device=model.device)
        log_probs, hits = [], []
        for first in range(0, len(chosen), LOGITS_ROWS):
            part = slice(first, first + LOGITS_ROWS)
            logits, labels = model.logits(hidden[chosen[part]]).float(), wanted[part]
            log_probs.append(logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0])
            hits.append(logits.argmax(dim=1) == labels)
        # Sums in float64: a text has thousands of tokens.
        sizes = [len(spans[i].token_ids) - spans[i].start for i in batch]
        ends = np.cumsum(sizes)[:-1]
        sums = np.split(torch.cat(log_probs).double().cpu().numpy(), ends)
        greedy = np.split(torch.cat(hits).cpu().numpy(), ends)
        for index, values, right in zip(batch, sums, greedy, strict=True):
            yield index, float(values.sum()), bool(right.all())


class HarnessModel:
    """Answer the harness's three kinds of requests, each an object with `args`.

    Args:
        home: where models are; by default from the environment.
        tag, stage, step: which checkpoint, as in `archerchat eval`.
        device, dtype: what to run on and in; by default the best there is. On the harness's command
            line the device has a flag of its own, `--device`.
        batch_tokens: of one forward pass.
        ignored: what the harness hands to every model.
    """

    def __init__(
        self,
        tag: str | None = None,
        stage: str = "base",
        step: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        home: str | Path | None = None,
        batch_tokens: int = BATCH_TOKENS,
        **ignored: Any,
    ) -> None:
        super().__init__()
        unknown = ignored.keys() - {"batch_size", "max_batch_size"}
        if unknown:
            raise UsageError(
                f"--model_args has {min(unknown)!r}; known are tag, stage, step, dtype, home and "
                "batch_tokens"
            )
        kind = device.partition(":")[0] if device else None
        if kind == "cuda" and not torch.cuda.is_available():
            kind = None  # the harness asks for it whether it is there or not
        runtime = build_runtime(kind, dtype)
        prepare_process(runtime)
        root = Home(Path(home)) if home else Home.from_environment()
        self._take(load_model(root, runtime, stage, tag, step), batch_tokens)

    def _take(self, loaded: LoadedModel, batch_tokens: int) -> None:
        self.model: Transformer = loaded.model
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.path = loaded.path
        self.batch_tokens = batch_tokens
        self._engine: Engine | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, batch_tokens: int = BATCH_TOKENS) -> HarnessModel:
        """Wrap a model that is loaded already."""
        self = cls.__new__(cls)
        super(HarnessModel, self).__init__()
        self._take(loaded, batch_tokens)
        return self

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log probability and whether it is greedy."""
        spans = [self.span(*request.args) for request in requests]
        return [(total, greedy) for total, greedy in self._score(spans)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return for each text its log probability, in stretches of the model's context."""
        pieces = [self.windows(request.args[0]) for request in requests]
        scores = iter(self._score([span for spans in pieces for span in spans]))
        return [sum(next(scores)[0] for _ in spans) for spans in pieces]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context until one of its stop texts, which is left out."""
        engine = self._engine = self._engine or Engine(self.model)
        asked, stops = [], []
        for request in requests:
            context, options = request.args
            stops.append(_stop_texts(options))
            asked.append(self._request(context, options, stops[-1], engine.max_length))
        answers = []
        for stop_texts, (completion, *_) in zip(stops, engine.generate(asked), strict=True):
            text = self.tokenizer.decode(completion.token_ids)
            ends = [place for stop in stop_texts if (place := text.find(stop)) >= 0]
            answers.append(text[: min(ends)] if ends else text)
        return answers

    def span(self, context: str, continuation: str) -> Span:
        """Tokenize context and continuation together; what the continuation changes is scored."""
        bos = [self.tokenizer.bos_id]
        before = bos + self.tokenizer.encode(context)
        whole = bos + self.tokenizer.encode(context + continuation)
        start = common_prefix([np.array(before), np.array(whole)])
        return Span(whole, start)

    def windows(self, text: str) -> list[Span]:
        """Cut a text so that each token is scored once, after as much text as there is room for."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        room, spans = self.model.config.sequence_length, []
        for first in range(1, len(ids), room):
            end = min(first + room, len(ids))
            begin = max(0, end - room - 1)
            spans.append(Span(ids[begin:end], first - begin))
        return spans

    def _score(self, spans: Sequence[Span]) -> list[tuple[float, bool]]:
        scores = [(0.0, True)] * len(spans)  # of an empty continuation
        filled = [i for i, span in enumerate(spans) if span.start < len(span.token_ids)]
        console = build_console(stderr=True)
        for index, total, greedy in track(
            score_spans(self.model, [spans[i] for i in filled], self.batch_tokens),
            "log likelihoods",
            total=len(filled),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            scores[filled[index]] = total, greedy
        return scores

    def _request(
        self, context: str, options: Mapping[str, Any], stop_texts: Sequence[str], length: int
    ) -> Request:
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
        new = min(new, length - 1)
        sampled = options.get("do_sample", False)
        temperature = float(options.get("temperature") or 0.0) if sampled else 0.0
        bos = self.tokenizer.bos_id
        prompt = [bos, *self.tokenizer.encode(context)]
        room = length - new
        if len(prompt) > room:  # the end of the context is what is asked
            prompt = prompt[-room:]

        def hook() -> SequenceHook:
            return _StopAtText(self.tokenizer, stop_texts, bos)

        return Request(prompt, SamplingParams(new, temperature, stop_token_ids=(bos,)), hook)


class _StopAtText:
    """End a row as soon as it has said one of the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str], end: int) -> None:
        self.tokenizer, self.stop_texts, self.end = tokenizer, stop_texts, end
        self.token_ids: list[int] = []

    def __call__(self, token: int) -> Sequence[int]:
        self.token_ids.append(token)
        text = self.tokenizer.decode(self.token_ids)
        return [self.end] if any(stop in text for stop in self.stop_texts) else []


def _stop_texts(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]


def register() -> type:
    """Make `--model archerchat` known to the harness and return its class.

    Raises:
        UsageError: the harness is not installed.
    """
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
    """Run the harness's own command."""
    try:
        register()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except ArcherChatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
