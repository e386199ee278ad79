"""How fast a training step is, and whether it computes what the reference computes.

    python benchmarks/pretrain.py --oracle ../shared/oracle
    python benchmarks/pretrain.py --depth 8 --dtype bfloat16 --device cuda --backend flex

With `--oracle` it runs the golden configurations of train_curve.json: the 30-step restart step by
step in float32, the 200-step run in float32 and in bfloat16, and `d4_dim256` with our defaults
for speed, beside the same in plain float32. The 200 steps are chaotic in their first fifty: the
float32 run that is judged rounds as the reference does (uncompiled, `sdpa`), and the compiled one
is shown beside it. Each runs in a process of its own. Without `--oracle`, the script measures one
configuration on random tokens. The last line is one JSON object (`val_bpb` and its reference are
those of the dtype that is further off); the exit status is 1 when a tolerance of the goldens is
missed. Run it alone: a second busy process slows two threads many times over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.model.attention import choose_backend
from archerchat.model.loss import LossKernels, weighted_loss
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.planning.peak_flops import measure_peak
from archerchat.runtime import Runtime, build_runtime, prepare_process
from golden_runs import RUNS, compare, load_curves, print_table, run_golden
from measuring import run_in_child, timed


def run_all(oracle: Path) -> tuple[dict[str, Any], bool]:
    """Run every golden configuration in a process of its own and compare."""
    results = {name: run_in_child(__file__, ["--oracle", oracle, "--only", name]) for name in RUNS}
    curves = load_curves(oracle)
    print_table(results, curves)
    return compare(results, curves)


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Time steps of one configuration on random tokens."""
    runtime = build_runtime(options.device, options.dtype)
    prepare_process(runtime)
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype, options.backend)
    dial = DialConfig(
        options.depth,
        aspect_ratio=options.aspect_ratio,
        head_dim=options.head_dim,
        max_seq_len=options.max_seq_len,
        num_iterations=1000,
    )
    hp = build_hyperparameters(dial, options.vocab_size)
    model = Transformer(hp.model, runtime.compute_dtype, backend)
    model.init_weights(0)
    model.to(runtime.device)
    groups = build_groups(model, hp.learning_rates)
    optimizer = Optimizer(model, groups, runtime.compute_dtype, options.compile)
    step = build_step(model, optimizer, options)
    times = time_steps(step, runtime, options.steps)
    count = options.device_batch_size * dial.max_seq_len * options.accum
    rate = count / statistics.median(times)
    peak = measure_peak(runtime).flops_per_second
    result = {
        "tokens_per_second": rate,
        "tokens_per_second_best": count / min(times),
        "mfu": rate * hp.flops_per_token / peak,
        "measured_peak_tflops": peak / 1e12,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }
    table = Table("figure", "value", title=f"depth {dial.depth}, {backend}, {runtime.device_name}")
    for name, value in result.items():
        table.add_row(name, f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    Console().print(table)
    return result


def build_step(
    model: Transformer, optimizer: Optimizer, options: argparse.Namespace
) -> Callable[[], None]:
    """Return what takes one training step, each on the same random tokens."""
    regions = Regions.compiled() if options.compile else Regions()
    kernels = LossKernels.compiled() if options.compile else LossKernels()
    shape = options.device_batch_size, options.max_seq_len + 1
    tokens = torch.randint(0, options.vocab_size, shape).to(model.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        for _ in range(options.accum):
            hidden = model.hidden(inputs, regions)
            weight = model.unembedding.weight
            loss = weighted_loss(hidden, weight, targets, options.vocab_size, kernels=kernels)
            (loss / options.accum).backward()
        optimizer.step(0.01, 0.95, 0.1)
        optimizer.zero_grad()

    return step


def time_steps(step: Callable[[], None], runtime: Runtime, count: int) -> list[float]:
    """Return the seconds of each of `count` steps, after three that compile and warm up."""
    for _ in range(3):
        step()
    runtime.synchronize()
    runtime.reset_peak_memory()
    return [timed(runtime.synchronize, step)[0] for _ in range(count)]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--oracle", type=Path, help="folder of the goldens: runs them")
    parser.add_argument("--only", choices=RUNS, help="one golden run, printed as JSON")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--aspect-ratio", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--device-batch-size", type=int, default=8)
    parser.add_argument("--accum", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--backend", choices=("sdpa", "matmul", "flex", "flash"))
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.oracle is None:
        print(json.dumps(run_one(options)))
        return 0
    if not (options.oracle / "train_curve.json").is_file():
        print(f"error: no train_curve.json in {options.oracle}", file=sys.stderr)
        return 2
    if options.only:
        print(json.dumps(run_golden(options.only, options.oracle)))
        return 0
    result, passed = run_all(options.oracle)
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
