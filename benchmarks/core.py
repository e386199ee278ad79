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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from archerchat.evals.core.evaluate import NEAR_TIE
from core_paths import PATHS, run_path
from measuring import run_in_child

SHARED = Path(__file__).resolve().parents[2] / "shared"
REQUIRED, REQUIRED_FLOAT32 = 10.0, 5.0
MOST_MEMORY = 2 * 2**30


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
        runs[path] = run_in_child(__file__, [*words, "--path", path])
    figures = summarize(*(runs[path] for path in PATHS))
    print_table(name, figures, console)
    return figures


def summarize(plain: dict[str, Any], exact: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """Return one model's figures from its runs along the three paths."""
    rows: dict[str, dict[str, Any]] = {}
    differences = []
    for label, task in plain["tasks"].items():
        ours, ours_fast = exact["tasks"][label], fast["tasks"][label]
        found = find_differences(task, ours, ours_fast)
        differences.append(found)
        rows[label] = {
            "ratio": task["seconds"] / ours_fast["seconds"],
            "ratio_float32": task["seconds"] / ours["seconds"],
            "bound_float32": task["flops"] / ours["flops"],
            "examples_per_second": ours_fast["examples"] / ours_fast["seconds"],
            "plain_examples_per_second": task["examples"] / task["seconds"],
            "seconds_at_matrix_rate": ours["flops"] / exact["matrix_flops_per_second"],
            "seconds_float32": ours["seconds"],
            "same_outcomes": found.in_float32 == 0,
            "changed_by_dtype": found.by_default,
        }
    different = sum(found.in_float32 for found in differences)
    return {
        "ratio": total(plain, "seconds") / total(fast, "seconds"),
        "ratio_float32": total(plain, "seconds") / total(exact, "seconds"),
        "ratio_full": weighted(plain) / weighted(fast),
        "ratio_full_float32": weighted(plain) / weighted(exact),
        "bound_float32": total(plain, "flops") / total(exact, "flops"),
        "same_outcomes": different == 0,
        "different_float32": different,
        "different": sum(found.by_default for found in differences),
        "near_ties": sum(found.near_ties for found in differences),
        "widest_margin_changed": max(found.widest_margin for found in differences),
        "loss_moved_by_dtype": loss_moved(exact, fast),
        "dtype": fast["dtype"],
        "parameters": plain["parameters"],
        "sequence_length": plain["sequence_length"],
        "peak_memory_bytes": max(exact["peak_memory_bytes"], fast["peak_memory_bytes"]),
        "matrix_flops_per_second": exact["matrix_flops_per_second"],
        "per_task": rows,
    }


@dataclass(frozen=True)
class Differences:
    """How many outcomes of a task are not the plain path's."""

    in_float32: int
    """Without near ties, which may fall either way."""
    near_ties: int
    by_default: int
    """In our default dtype."""
    widest_margin: float
    """Between the options, in float32, where our default dtype chose another."""


def find_differences(
    plain: dict[str, Any], exact: dict[str, Any], fast: dict[str, Any]
) -> Differences:
    margins = exact["margins"]
    different, changed = compare_outcomes(plain, exact), compare_outcomes(plain, fast)
    near = sum(margins[i] < NEAR_TIE for i in different)
    widest = max((margins[i] for i in changed), default=0.0)
    return Differences(len(different) - near, near, len(changed), widest)


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
