"""How fast the engine generates, against the plain path, with the same answers.

    python benchmarks/engine.py                                 # random weights of depth 6
    python benchmarks/engine.py --oracle ../shared/oracle       # the reference's trained model
    python benchmarks/engine.py --dtype bfloat16 --requests 8 --tokens 16

The plain path answers one request at a time, with a cache that grows by a token a step, each step
run as the model's own forward pass, each token taken in Python: no batch, no compiler, no weights
cast ahead. `batched_ratio` is its time for all the answers over the engine's; `single_stream_ratio`
its time for one answer over the engine's. Greedy, so answers can be compared: `same_answers` says
whether every token is equal, `same_share` how many answers are; in bfloat16 products of another
batch size round otherwise, and ties fall otherwise. A third figure, for information: the same
single answer with no cache at all. The last line is one JSON object; the exit status is 1 when
answers differ in float32. Run it alone: a second busy process slows two threads many times over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.inference.engine import Engine
from archerchat.inference.requests import Request
from archerchat.inference.sampling import iter_tokens
from archerchat.model.attention import attend, choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Before, Transformer, norm
from archerchat.nanochat_import import to_archerchat_names
from archerchat.runtime import Runtime, build_runtime, prepare_process

T = TypeVar("T")


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
def plain_answer(model: Transformer, request: Request) -> list[int]:
    """Answer greedily by a cached loop, one row, one token at a time."""
    layers = [GrowingLayer(model, window) for window in model.config.windows]
    answer: list[int] = []
    given, start = list(request.prompt), 0
    previous = torch.zeros(1, model.config.model_dim, dtype=model.compute_dtype)
    previous = previous.to(model.device)
    while len(answer) < request.max_new_tokens:
        ids = torch.tensor([given], device=model.device)
        positions = torch.arange(start, start + len(given), device=model.device)
        hidden = model.hidden(ids, before=Before(positions, previous, layers))
        token = int(model.logits(hidden[:, -1]).argmax())
        answer.append(token)
        start += len(given)
        last = model.token_embedding(ids[:, -1]).to(model.compute_dtype)
        previous, given = norm(last), [token]
    return answer


def build_model(options: argparse.Namespace, runtime: Runtime) -> Transformer:
    """Load the reference's trained model, or draw one whose next tokens differ clearly."""
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    if options.oracle:
        config = ModelConfig(256, 4096, 4, 2, 2, 128)
        model = Transformer(config, runtime.compute_dtype, backend)
        weights = to_archerchat_names(load_file(options.oracle / "train_final.safetensors"))
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    else:
        dial = DialConfig(
            depth=options.depth,
            head_dim=options.head_dim,
            max_seq_len=options.max_seq_len,
            num_iterations=1,
        )
        config = build_hyperparameters(dial, options.vocab_size).model
        model = Transformer(config, runtime.compute_dtype, backend)
        model.init_weights(0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype))
    return model.to(runtime.device).eval().requires_grad_(False)


def build_requests(options: argparse.Namespace, config: ModelConfig) -> list[Request]:
    """Return greedy requests with prompts of 8 to 64 tokens and answers from half the length."""
    random = Random(0)
    requests = []
    for _ in range(options.requests):
        prompt = [random.randrange(config.vocab_size) for _ in range(random.randint(8, 64))]
        most = random.randint(max(1, options.tokens // 2), options.tokens)
        requests.append(Request(prompt, most, temperature=0))
    return requests


def timed(runtime: Runtime, work: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds `work` took, and what it returned."""
    runtime.synchronize()
    start = time.perf_counter()
    result = work()
    runtime.synchronize()
    return time.perf_counter() - start, result


def compare(
    runtime: Runtime, plain: Callable[[], T], ours: Callable[[], T], rounds: int
) -> tuple[float, float, T, T]:
    """Time both in turn; return each one's median seconds and what they returned last."""
    pairs = [(timed(runtime, plain), timed(runtime, ours)) for _ in range(rounds)]
    seconds = [statistics.median(pair[i][0] for pair in pairs) for i in range(2)]
    return seconds[0], seconds[1], pairs[-1][0][1], pairs[-1][1][1]


def measure(options: argparse.Namespace, console: Console) -> dict[str, object]:
    """Run everything and return the figures."""
    runtime = build_runtime(options.device, options.dtype)
    prepare_process(runtime)
    model = build_model(options, runtime)
    requests = build_requests(options, model.config)
    engine = Engine(model, max_batch=options.requests, compile=options.compile)

    def answers(of: Sequence[Request]) -> list[list[int]]:
        return [samples[0].token_ids for samples in engine.generate(of)]

    def plain(of: Sequence[Request]) -> list[list[int]]:
        return [plain_answer(model, request) for request in of]

    single = [Request(requests[0].prompt, options.tokens, temperature=0)]
    console.print("warming up (compiles, where it does)")
    for of in (single, requests[: options.requests]):
        answers(of)
    plain(single)
    one_plain, one_ours, said_plain, said_ours = compare(
        runtime, lambda: plain(single), lambda: answers(single), options.rounds
    )
    many_plain, many_ours, all_plain, all_ours = compare(
        runtime, lambda: plain(requests), lambda: answers(requests), options.batch_rounds
    )
    request = single[0]
    uncached, _ = timed(
        runtime, lambda: list(iter_tokens(model, request.prompt, request.max_new_tokens, 0.0))
    )
    pairs = list(zip([*said_plain, *all_plain], [*said_ours, *all_ours], strict=True))
    tokens = sum(map(len, all_ours))
    return {
        "batched_ratio": round(many_plain / many_ours, 2),
        "single_stream_ratio": round(one_plain / one_ours, 2),
        "tokens_per_second": round(tokens / many_ours, 1),
        "same_answers": all(a == b for a, b in pairs),
        "same_share": round(sum(a == b for a, b in pairs) / len(pairs), 3),
        "single_stream_tokens_per_second": round(options.tokens / one_ours, 1),
        "plain_tokens_per_second": round(tokens / many_plain, 1),
        "plain_single_tokens_per_second": round(options.tokens / one_plain, 1),
        "uncached_tokens_per_second": round(options.tokens / uncached, 1),
        "requests": options.requests,
        "tokens": tokens,
        "layers": model.config.num_layers,
        "model_dim": model.config.model_dim,
        "dtype": str(runtime.compute_dtype).removeprefix("torch."),
        "device": runtime.device_name,
        "threads": torch.get_num_threads(),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--oracle", type=Path, help="folder of the goldens: its trained model")
    parser.add_argument("--depth", type=int, default=6, help="of a model with random weights")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="most in an answer")
    parser.add_argument("--rounds", type=int, default=5, help="of the single stream")
    parser.add_argument("--batch-rounds", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), default="float32",
        help="float32 by default, where answers must be equal",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    console = Console(stderr=True)
    figures = measure(options, console)
    for name, value in figures.items():
        console.print(f"{name:32} {value}")
    print(json.dumps(figures))
    return 1 if options.dtype == "float32" and not figures["same_answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
