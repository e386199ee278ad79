"""What the scripts of this folder print as tables: plans before a run, results after it.

    python runs/figures.py plan FILE [--rehearsal] [FLAGS] <MODELS
    python runs/figures.py compare HOME TAG NAME=VALUE...

MODELS has one model per line: its tag, and the flags of `archerchat plan` that describe it. FLAGS
apply to all of them. FILE receives the plans; runs/stages.sh reads there how much data to get.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from archerchat.files import write_json


def plan(file: Path, flags: list[str], lines: list[str]) -> None:
    """Print every model's size, tokens, hours and cost, and what is left of them."""
    rehearsal = "--rehearsal" in flags
    common = [flag for flag in flags if flag != "--rehearsal"]
    models = [line.split() for line in lines]
    plans = {tag: make_plan([*words, *common]) for tag, *words in models}
    if len(plans) == 1:
        print(next(iter(plans.values()))["text"])
    write_json(file, plans)
    rows, totals, prices = [], [0.0, 0.0], []
    for tag, each in plans.items():
        done = 0 if rehearsal else last_step(tag)
        left = each["hours"] * max(0.0, 1 - done / each["steps"])
        totals = [totals[0] + each["hours"], totals[1] + left]
        prices.append(each["cost"])
        progress = f"{done:,} of {each['steps']:,}"
        rows.append(
            [tag, *each["size"], progress, *time_and_cost(each["hours"], [each["cost"]], left)]
        )
    if len(plans) > 1:
        rows.append(["all", *[""] * 4, *time_and_cost(totals[0], prices, totals[1])])
    print_table(["model", "size", "tokens", "rows", "steps", "time", "cost", "left"], rows)
    print("Time and cost are of pretraining; CORE, fine-tuning and chat evaluation are extra.")
    if rehearsal:
        print("That is the real run. This dry run trains toy models instead, in about two minutes.")


def time_and_cost(hours: float, prices: list[float | None], left: float) -> list[str]:
    """Return the last three columns; a price that is not known makes the sum unknown."""
    known = [price for price in prices if price is not None]
    cost = f"${sum(known):,.2f}" if len(known) == len(prices) else "?"
    return [f"{hours:.1f} h", cost, f"{left:.1f} h"]


def make_plan(words: list[str]) -> dict[str, Any]:
    """Return what `archerchat plan` says about one model."""
    from archerchat.cli import main

    texts = []
    for extra in (["--json"], []):
        with redirect_stdout(StringIO()) as said:
            if code := main(["plan", *words, *extra]):
                sys.exit(code)
        texts.append(said.getvalue())
    content = json.loads(texts[0])
    sizes, memory = content["hyperparameters"], content["memory"]
    return {
        "text": texts[1].split("Commands\n")[0],
        "train_shards": content["data"]["train_shards"],
        "steps": sizes["num_iterations"],
        "hours": content["time"]["hours"],
        "cost": content["time"]["cost"],
        "size": [
            f"{sizes['parameters']['total'] / 1e6:,.0f}M",
            f"{sizes['total_tokens'] / 1e9:.2f}B",
            str(memory["device_batch_size"] or "does not fit"),
        ],
    }


def last_step(tag: str) -> int:
    """Return the step of a base model's newest checkpoint; 0 without one."""
    folder = Path(os.environ["ARCHERCHAT_HOME"]) / "checkpoints" / "base" / tag
    return max((int(path.name[5:]) for path in folder.glob("step_*[0-9]")), default=0)


def compare(home: Path, tag: str, references: list[str]) -> None:
    """Print a model's figures beside those of another run."""
    ours = gather(home, tag)
    rows = []
    for reference in references:
        name, _, value = reference.partition("=")
        mine = ours.get(name)
        rows.append([name, value, "" if mine is None else f"{mine:,.4g}"])
    print_table([tag, "reference", "ours"], rows)


def gather(home: Path, tag: str) -> dict[str, float]:
    """Return what a model's runs and its last evaluations measured, by name."""
    figures: dict[str, float] = {}
    for prefix, run in (("", tag), ("sft_", f"{tag}-sft")):
        summary = read(home / "runs" / run / "summary.json")
        for name in ("val_bpb", "tokens_per_second", "mfu"):
            if name in summary:
                figures[prefix + name] = summary[name]
        if summary:
            figures[prefix + "minutes"] = summary["training_seconds"] / 60
            figures[prefix + "peak_gib"] = summary["peak_memory_bytes"] / 2**30
    evaluations = home / "evals"
    if cores := newest(evaluations / "base" / tag, "core_*.json"):
        figures["core"] = read(cores[-1])["core"]
    for path in newest(evaluations / "sft" / tag, "chat_step_*.json"):
        content = read(path)
        figures |= {name: task["accuracy"] for name, task in content["tasks"].items()}
        if "chatcore" in content:
            figures["chatcore"] = content["chatcore"]
    return figures


def newest(folder: Path, pattern: str) -> list[Path]:
    """Return the files of complete evaluations, the newest last."""
    found = [path for path in folder.glob(pattern) if ".partial" not in path.name]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print rows in columns; the first is flush left, the others are flush right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        print("  ".join(cells).rstrip())


def main(words: list[str]) -> None:
    match words:
        case ["plan", file, *flags]:
            plan(Path(file), flags, list(filter(str.strip, sys.stdin)))
        case ["compare", home, tag, *references]:
            compare(Path(home), tag, references)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
