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
import statistics
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

import torch
from rich.console import Console

from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.config import ModelConfig
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from generation import add_model_options, build_model, plain_tokens, report, uncached_tokens
from measuring import timed

T = TypeVar("T")


def build_requests(options: argparse.Namespace, config: ModelConfig) -> list[Request]:
    """Return greedy requests with prompts of 8 to 64 tokens and answers from half the length."""
    random = Random(0)
    requests = []
    for _ in range(options.requests):
        prompt = [random.randrange(config.vocab_size) for _ in range(random.randint(8, 64))]
        most = random.randint(max(1, options.tokens // 2), options.tokens)
        requests.append(Request(prompt, SamplingParams(most, temperature=0)))
    return requests


def compare(
    runtime: Runtime, plain: Callable[[], T], ours: Callable[[], T], rounds: int
) -> tuple[float, float, T, T]:
    """Time both in turn; return each one's median seconds and what they returned last."""
    pairs = [
        (timed(runtime.synchronize, plain), timed(runtime.synchronize, ours)) for _ in range(rounds)
    ]
    seconds = [statistics.median(pair[i][0] for pair in pairs) for i in range(2)]
    return seconds[0], seconds[1], pairs[-1][0][1], pairs[-1][1][1]


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything and return the figures."""
    runtime = build_runtime(options.device, options.dtype)
    prepare_process(runtime)
    model = build_model(options, runtime, options.vocab_size, options.head_dim)
    requests = build_requests(options, model.config)
    engine = Engine(model, max_batch=options.requests, compile=options.compile)

    def answers(of: Sequence[Request]) -> list[list[int]]:
        return [samples[0].token_ids for samples in engine.generate(of)]

    def plain(of: Sequence[Request]) -> list[list[int]]:
        return [plain_tokens(model, request) for request in of]

    single = [Request(requests[0].prompt, SamplingParams(options.tokens, temperature=0))]
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
    uncached, _ = timed(runtime.synchronize, lambda: uncached_tokens(model, single[0]))
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
        "dtype": dtype_name(runtime.compute_dtype),
        "device": runtime.device_name,
        "threads": torch.get_num_threads(),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_options(parser)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="most in an answer")
    parser.add_argument("--rounds", type=int, default=5, help="of the single stream")
    parser.add_argument("--batch-rounds", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    console = Console(stderr=True)
    return report(measure(options, console), options, console)


if __name__ == "__main__":
    sys.exit(main())
