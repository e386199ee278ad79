"""How fast a card decodes and reads prompts, at depth 12, beside what its memory allows.

A decoding step has to read every matrix and the unembedding once, and each row's keys and values:
those bytes over the measured copy rate give the least time a step can take.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from archerchat.inference.engine import Engine
from archerchat.inference.model_runner import Prefill
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.attention import choose_backend
from archerchat.model.flops import count_parameters
from archerchat.model.transformer import Transformer
from archerchat.planning.memory import kv_cache_bytes
from archerchat.runtime import Runtime
from gpu_common import DRY_RUN, LENGTH, ceilings, model_config, open_rows, start
from measuring import timed

PROMPT, STEPS = (16, 8) if DRY_RUN else (512, 128)
BATCHES = (1, 2) if DRY_RUN else (1, 8, 64)
PREFILL_ROWS = (1, 2) if DRY_RUN else (1, 8)


def build_model(runtime: Runtime) -> Transformer:
    """Return depth 12 with random weights: what is generated does not matter here."""
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    with runtime.device:
        model = Transformer(model_config(12), runtime.compute_dtype, backend)
    return model.requires_grad_(False)


def time_decoding(engine: Engine, batch: int, runtime: Runtime, bandwidth: float) -> dict[str, Any]:
    """Time steps of `batch` rows once all of them run and their graphs are captured."""
    config = engine.model.config
    params = SamplingParams(4 * STEPS, temperature=0)
    prompts = torch.randint(config.vocab_size, (batch, PROMPT)).tolist()
    for number, prompt in enumerate(prompts):
        engine.add(number, Request(prompt, params))
    for _ in range(STEPS):  # past the length at which a larger graph takes over
        engine.step()
    seconds, _ = timed(runtime.synchronize, lambda: [engine.step() for _ in range(STEPS)])
    engine.reset()
    dtype = runtime.compute_dtype
    weights = count_parameters(config).scaling * dtype.itemsize
    kept = batch * kv_cache_bytes(config, dtype, PROMPT + STEPS + STEPS // 2)
    return {
        "tokens_per_second": round(batch * STEPS / seconds),
        "step_ms": 1000 * seconds / STEPS,
        "bytes_per_step": weights + kept,
        "bandwidth_share": (weights + kept) * STEPS / seconds / bandwidth,
    }


def time_prefill(model: Transformer, count: int, runtime: Runtime) -> dict[str, Any]:
    """Time prompts as long as a row."""
    rows = torch.randint(model.config.vocab_size, (count, LENGTH)).tolist()
    seconds = runtime.median_seconds(lambda: Prefill(model, rows).last_logits)
    return {"tokens_per_second": round(count * LENGTH / seconds)}


def main() -> None:
    rows, _ = open_rows()
    runtime = start()
    _, bandwidth = ceilings(rows)
    model = build_model(runtime)
    for batch, compile in product(BATCHES, (False, True)):
        rows.measure(
            f"decode {batch}{' compiled' * compile}",
            lambda batch=batch, compile=compile: time_decoding(  # type: ignore[misc]
                Engine(model, batch, compile=compile), batch, runtime, bandwidth
            ),
        )
    fast = Engine(model, 1).model
    for count in PREFILL_ROWS:
        rows.measure(
            f"prefill {count} x {LENGTH}",
            lambda count=count: time_prefill(fast, count, runtime),  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
