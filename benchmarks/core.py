"""How much faster CORE is than one example at a time in float32, and whether it finds the same.

    python benchmarks/core.py
    python benchmarks/core.py --per-task 4 --model d6 --sequence-length 2048

Both paths evaluate the same fixed sample of every task in the bundle: the first `--per-task`
examples after CORE's shuffle, with few-shot examples from all of the task. Tokenization counts on
both sides. The plain path runs an example's prompts as one batch through the whole model and forms
every logit, as the reference does. Models: `golden`, the oracle's of 3 million parameters, and
`d6`, 18 million in six layers of width 384 at the same vocabulary, with random weights.

A ratio is the plain path's time over ours, summed over the tasks; `ratio_full` weighs each task by
all of its examples instead. Loading and casting weights is left out on both sides. In float32
outcomes may differ only where two options are within 1e-5. Our default dtype moves losses
(`loss_moved_by_dtype`): outcomes that change are counted, with the widest margin among them.
`per_task` has beside the ratios what bounds them: `bound_float32`, the FLOPs of the plain path's
products over those of ours, and `seconds_at_matrix_rate`, ours at the measured rate of a product.

The last line is one JSON object, its ratios those of the slower model. Each path of each model runs
in a process of its own, so that `peak_memory_bytes` is ours. Exits with 1 when outcomes differ. Run
it alone: a second busy process slows two threads many times over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from archerchat.evals.core.bundle import Bundle, Task, load_bundle, read_examples
from archerchat.evals.core.forward import Scorer
from archerchat.evals.core.layout import needed_trunk
from archerchat.evals.core.plain import score_plainly
from archerchat.evals.core.prompts import Prompter, choose_examples
from archerchat.evals.core.results import NEAR_TIE
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.evals.core.trees import Tree, build_tree
from archerchat.inference.weights import InferenceModel
from archerchat.model.attention import choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.flops import count_parameters
from archerchat.model.transformer import Transformer
from archerchat.nanochat_import import to_archerchat_names
from archerchat.peak_flops import measure_peak
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.ranks import load_ranks

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 4096
REQUIRED, REQUIRED_FLOAT32 = 10.0, 5.0
MOST_MEMORY = 2 * 2**30
PATHS = ("plain", "float32", "default")
"""The plain path, ours in float32, ours as it is by default."""


def main() -> int:
    options = parse_options()
    if options.path is not None:
        print(json.dumps(run_path(options)))
        return 0
    console = Console(width=120)
    models = {name: compare(name, options, console) for name in options.model.split(",")}
    slowest = min(models.values(), key=lambda figures: figures["ratio"])
    figures = {
        "ratio": slowest["ratio"],
        "ratio_float32": min(each["ratio_float32"] for each in models.values()),
        "same_outcomes": all(each["same_outcomes"] for each in models.values()),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in models.values()),
        "required": {
            "ratio": REQUIRED,
            "ratio_float32": REQUIRED_FLOAT32,
            "peak_memory_bytes": MOST_MEMORY,
        },
        "threads": torch.get_num_threads(),
        "per_task": {name: each.pop("per_task") for name, each in models.items()},
        "models": models,
    }
    print(json.dumps(figures))
    return 0 if figures["same_outcomes"] else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=SHARED / "data" / "core")
    parser.add_argument("--oracle", type=Path, default=SHARED / "oracle")
    parser.add_argument("--model", default="golden,d6", help="golden, d6, or both")
    parser.add_argument("--sequence-length", type=int, default=512, help="of d6; golden has 256")
    parser.add_argument("--per-task", type=int, default=12)
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the three paths on one model, each in a process of its own, and compare them."""
    runs = {}
    for path in PATHS:
        console.print(f"{name}: {path} ...", style="dim")
        words = ["--bundle", options.bundle, "--oracle", options.oracle, "--model", name]
        words += ["--sequence-length", options.sequence_length, "--per-task", options.per_task]
        words += ["--tasks", options.tasks] if options.tasks else []
        done = subprocess.run(
            [sys.executable, __file__, *map(str, words), "--path", path],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        runs[path] = json.loads(done.stdout.splitlines()[-1])
    plain, exact, fast = (runs[path] for path in PATHS)
    rows, counts = {}, {"different_float32": 0, "different": 0, "near_ties": 0}
    widest = 0.0
    for label, task in plain["tasks"].items():
        ours, ours_fast = exact["tasks"][label], fast["tasks"][label]
        different = compare_outcomes(task, ours)
        near = [i for i in different if ours["margins"][i] < NEAR_TIE]
        changed = compare_outcomes(task, ours_fast)
        counts["different_float32"] += len(different) - len(near)
        counts["near_ties"] += len(near)
        counts["different"] += len(changed)
        widest = max([widest, *(ours["margins"][i] for i in changed)])
        rows[label] = {
            "ratio": task["seconds"] / ours_fast["seconds"],
            "ratio_float32": task["seconds"] / ours["seconds"],
            "bound_float32": task["flops"] / ours["flops"],
            "examples_per_second": ours_fast["examples"] / ours_fast["seconds"],
            "plain_examples_per_second": task["examples"] / task["seconds"],
            "seconds_at_matrix_rate": ours["flops"] / exact["matrix_flops_per_second"],
            "seconds_float32": ours["seconds"],
            "same_outcomes": len(different) == len(near),
            "changed_by_dtype": len(changed),
        }
    figures = {
        "ratio": total(plain, "seconds") / total(fast, "seconds"),
        "ratio_float32": total(plain, "seconds") / total(exact, "seconds"),
        "ratio_full": weighted(plain) / weighted(fast),
        "ratio_full_float32": weighted(plain) / weighted(exact),
        "bound_float32": total(plain, "flops") / total(exact, "flops"),
        "same_outcomes": counts["different_float32"] == 0,
        **counts,
        "widest_margin_changed": widest,
        "loss_moved_by_dtype": loss_moved(exact, fast),
        "dtype": fast["dtype"],
        "parameters": plain["parameters"],
        "sequence_length": plain["sequence_length"],
        "peak_memory_bytes": max(exact["peak_memory_bytes"], fast["peak_memory_bytes"]),
        "matrix_flops_per_second": exact["matrix_flops_per_second"],
        "per_task": rows,
    }
    print_table(name, figures, console)
    return figures


def compare_outcomes(one: dict[str, Any], other: dict[str, Any]) -> list[int]:
    """Return which examples came out differently."""
    pairs = zip(one["outcomes"], other["outcomes"], strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


def loss_moved(exact: dict[str, Any], fast: dict[str, Any]) -> float:
    """Return the largest change of an option's mean loss between two runs of ours."""
    moved: list[float] = [
        abs(a - b)
        for label, task in exact["tasks"].items()
        for ours, theirs in zip(task["losses"], fast["tasks"][label]["losses"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
        if a == a  # nothing to score
    ]
    return max(moved)


def total(run: dict[str, Any], name: str) -> float:
    return sum(float(task[name]) for task in run["tasks"].values())


def weighted(run: dict[str, Any]) -> float:
    """Return the seconds that all examples would take."""
    tasks = run["tasks"].values()
    return sum(float(t["seconds"] / t["examples"] * t["available"]) for t in tasks)


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Transformer
    tokenizer: Tokenizer
    scorer: Scorer
    """Of our paths."""


def run_path(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the sample along one path and return its times and outcomes."""
    runtime = build_runtime("cpu", None if options.path == "default" else "float32")
    prepare_process(runtime)
    rate = measure_peak(runtime).flops_per_second
    tokenizer = Tokenizer.from_ranks(
        load_ranks(options.oracle / "tokenizer" / "mergeable_ranks.tiktoken")
    )
    model = build_model(options, runtime)
    subject = Subject(model, tokenizer, Scorer(InferenceModel(model).model))
    evaluate = evaluate_plainly if options.path == "plain" else evaluate_task
    bundle = load_bundle(options.bundle)
    warm_up(subject, bundle, options)
    tasks = {
        task.label: evaluate(subject, task, options.per_task)
        for task in chosen_tasks(bundle, options)
    }
    return {
        "tasks": tasks,
        "dtype": dtype_name(runtime.compute_dtype),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "sequence_length": subject.model.config.sequence_length,
        "matrix_flops_per_second": rate,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }


def chosen_tasks(bundle: Bundle, options: argparse.Namespace) -> list[Task]:
    asked = options.tasks.split(",") if options.tasks else [task.label for task in bundle.tasks]
    return [task for task in bundle.tasks if task.label in asked]


def warm_up(subject: Subject, bundle: Bundle, options: argparse.Namespace) -> None:
    """Run what is not measured: kernels are chosen and memory is claimed at first use."""
    evaluate = evaluate_plainly if options.path == "plain" else evaluate_task
    for task in chosen_tasks(bundle, options)[:2]:
        evaluate(subject, task, 2)


def build_model(options: argparse.Namespace, runtime: Runtime) -> Transformer:
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    if options.model == "golden":
        config = ModelConfig(256, VOCABULARY, 4, 2, 2, 128)
        model = Transformer(config, runtime.compute_dtype, backend)
        stored = load_file(options.oracle / "train_final.safetensors")
        model.load_state_dict(to_archerchat_names({k: v.float() for k, v in stored.items()}))
    else:
        config = ModelConfig(options.sequence_length, VOCABULARY, 6, 6, 6, 384)
        model = Transformer(config, runtime.compute_dtype, backend)
        model.init_weights(1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the initial output projections are zero: give them something to do
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval().requires_grad_(False)


def evaluate_plainly(subject: Subject, task: Task, count: int) -> dict[str, Any]:
    """Run a task's sample one example at a time."""
    everything = choose_examples(read_examples(task), task, None)
    config = subject.model.config
    started = time.perf_counter()
    prompter = Prompter(task, everything, subject.tokenizer)
    outcomes: list[int] = []
    losses: list[list[float]] = []
    flops = 0
    sample = range(min(count, len(everything)))
    for index in sample:
        prompts = prompter.prompts(index)
        means, all_predicted = score_plainly(subject.model, prompts)
        is_text = task.task_type == "language_modeling"
        outcomes.append(int(all_predicted) if is_text else means.index(min(means)))
        losses.append(means)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        flops += plain_flops(config, lengths)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "examples": len(sample),
        "available": len(everything),
        "outcomes": outcomes,
        "losses": losses,
        "flops": flops,
    }


def evaluate_task(subject: Subject, task: Task, count: int) -> dict[str, Any]:
    """Run a task's sample as `archerchat eval base` does."""
    everything = choose_examples(read_examples(task), task, None)
    started = time.perf_counter()
    scorer = subject.scorer
    prompter = Prompter(task, everything, subject.tokenizer)
    sample = range(min(count, len(everything)))
    trees = [build_tree(index, prompter.prompts(index)) for index in sample]
    found = [o for batch, _ in iter_outcomes(scorer, trees, task.task_type) for o in batch]
    found.sort(key=lambda outcome: outcome.index)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "examples": len(sample),
        "available": len(everything),
        "outcomes": [int(o.all_predicted) if o.predicted is None else o.predicted for o in found],
        "losses": [outcome.losses for outcome in found],
        "margins": [outcome.margin for outcome in found],
        "flops": sum(tree_flops(subject.model.config, tree) for tree in trees),
    }


def plain_flops(config: ModelConfig, lengths: list[int]) -> int:
    """Count the products of whole prompts, padded to one length, with every logit."""
    tokens, longest = max(lengths) * len(lengths), max(lengths)
    seen = sum(sum(min(window + 1, t + 1) for t in range(longest)) for window in config.windows)
    return 2 * count_parameters(config).scaling * tokens + 4 * config.model_dim * seen * len(
        lengths
    )


def tree_flops(config: ModelConfig, tree: Tree) -> int:
    """Count the products of what is run of a tree."""
    dim, kv = config.model_dim, config.kv_dim
    needed, branches = needed_trunk(tree, config.windows), sum(map(len, tree.branches))
    total = 0
    for i, window in enumerate(config.windows):
        incoming, outgoing = needed[i] + branches, needed[i + 1] + branches
        total += 2 * (2 * dim * kv * incoming + 10 * dim * dim * outgoing)
        first = len(tree.trunk) - needed[i + 1]
        seen = sum(min(window + 1, t + 1) for t in range(first, len(tree.trunk)))
        for branch in tree.branches:
            end = len(tree.trunk) + len(branch)
            seen += sum(min(window + 1, t + 1) for t in range(len(tree.trunk), end))
        total += 4 * dim * seen
    places = set(zip(tree.branch.tolist(), tree.offset.tolist(), strict=True))
    return total + 2 * dim * config.padded_vocab_size * len(places)


def print_table(name: str, figures: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{name}: {figures['parameters'] / 1e6:.1f}M parameters, sequence length "
        f"{figures['sequence_length']}, {figures['dtype']} by default"
    )
    table.add_column("task")
    for column in (
        "ratio",
        "ratio float32",
        "FLOPs bound",
        "of matrix rate",
        "examples/s",
        "plain",
        "same",
        "changed by dtype",
    ):
        table.add_column(column, justify="right")
    for label, row in figures["per_task"].items():
        table.add_row(
            label,
            f"{row['ratio']:.1f}",
            f"{row['ratio_float32']:.1f}",
            f"{row['bound_float32']:.1f}",
            f"{row['seconds_at_matrix_rate'] / row['seconds_float32']:.0%}",
            f"{row['examples_per_second']:.1f}",
            f"{row['plain_examples_per_second']:.1f}",
            "yes" if row["same_outcomes"] else "NO",
            str(row["changed_by_dtype"]),
        )
    table.add_row(
        "all",
        f"{figures['ratio']:.1f}",
        f"{figures['ratio_float32']:.1f}",
        f"{figures['bound_float32']:.1f}",
        "",
        "",
        "",
        "yes" if figures["same_outcomes"] else "NO",
        str(figures["different"]),
    )
    console.print(table)
    console.print(
        f"weighed by all examples: {figures['ratio_full']:.1f}, float32 "
        f"{figures['ratio_full_float32']:.1f}; outcomes that {figures['dtype']} changes have up to "
        f"{figures['widest_margin_changed']:.1e} between them, losses move by up to "
        f"{figures['loss_moved_by_dtype']:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
