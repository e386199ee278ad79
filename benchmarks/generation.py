"""What the benchmarks of generation share: their model, the plain path, how they end.

The plain path answers one request at a time, by a cache that grows by a token a step, each step the
model's own forward pass, each token taken in Python: no batch, no compiler, no weights cast ahead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.inference.sequence import Request
from archerchat.model.attention import attend
from archerchat.model.transformer import Before, Transformer, norm
from archerchat.runtime import Runtime
from models import draw_model, load_golden_model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what `build_model` and `build_runtime` need."""
    parser.add_argument("--oracle", type=Path, help="folder of the goldens: its trained model")
    parser.add_argument("--depth", type=int, default=6, help="of a model with random weights")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="float32",
        help="float32 by default, where answers must be equal",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))


def build_model(
    options: argparse.Namespace,
    runtime: Runtime,
    vocab_size: int,
    head_dim: int = DialConfig.head_dim,
) -> Transformer:
    """Load the reference's trained model, or draw one."""
    if options.oracle:
        return load_golden_model(options.oracle, runtime)
    dial = DialConfig(
        options.depth, head_dim=head_dim, max_seq_len=options.max_seq_len, num_iterations=1
    )
    config = build_hyperparameters(dial, vocab_size).model
    return draw_model(config, runtime, seed=0, noise_seed=1)


class GrowingLayer:
    """The simplest cache of a layer: a tensor that grows by what it is given."""

    def __init__(self, model: Transformer, window: int) -> None:
        self.window, self.backend = window, model.backend
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keys is not None and self.values is not None:
            k, v = torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        self.keys, self.values = k[:, -self.window :], v[:, -self.window :]
        return attend(q, k, v, self.window, self.backend)


@torch.no_grad()
def plain_tokens(model: Transformer, request: Request) -> list[int]:
    """Answer greedily by a cached loop, one row, one token at a time, tools' answers included."""
    layers = [GrowingLayer(model, window) for window in model.config.windows]
    hook = request.hook() if request.hook else None
    answer: list[int] = []
    forced: list[int] = []
    given, start = list(request.prompt), 0
    last = torch.zeros(1, model.config.model_dim, dtype=model.compute_dtype, device=model.device)
    params = request.params
    most = min(params.max_new_tokens, model.config.sequence_length - len(request.prompt))
    while len(answer) < most:
        ids = torch.tensor([given], device=model.device)
        positions = torch.arange(start, start + len(given), device=model.device)
        embedded = norm(model.token_embedding(ids).to(model.compute_dtype))
        previous = torch.cat([last[:, None], embedded[:, :-1]], dim=1)
        hidden = model.hidden(ids, before=Before(positions, previous, layers))
        token = int(model.logits(hidden[:, -1]).argmax())
        if forced:
            token = forced.pop(0)
        elif token not in params.stop_token_ids and hook is not None:
            forced += hook(token)
        if token in params.stop_token_ids:
            break
        answer.append(token)
        start += len(given)
        last, given = embedded[:, -1], [token]
    return answer


@torch.no_grad()
def uncached_tokens(model: Transformer, request: Request) -> list[int]:
    """Answer greedily with no cache: the whole row again for each token."""
    ids = list(request.prompt)
    for _ in range(request.params.max_new_tokens):
        hidden = model.hidden(torch.tensor([ids], device=model.device))
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
    return ids[len(request.prompt) :]


def report(figures: dict[str, Any], options: argparse.Namespace, console: Console) -> int:
    """Print the figures, as JSON on the last line; return the exit status.

    It is 1 where answers differ in float32, in which both paths must say the same.
    """
    width = max(map(len, figures)) + 1
    for name, value in figures.items():
        console.print(f"{name:{width}} {value}")
    print(json.dumps(figures))
    return 1 if options.dtype == "float32" and not figures["same_answers"] else 0
