"""`archerchat plan --depth N [--gpu NAME]`: estimate what training takes, before it starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table

from archerchat.console import bytes_text, duration_text
from archerchat.data.hub import SOURCES
from archerchat.data.shards import data_directory, list_shards, split_shards
from archerchat.data.text_sample import TextSample, measure_text
from archerchat.home import Home
from archerchat.planning.memory import RESERVED_SHARE
from archerchat.planning.plan import Plan, PlanConfig, build_plan
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer


def plan(config: PlanConfig, home: Home) -> None:
    """Print the plan of a run."""
    text = None
    if config.data is not None:
        shards, _ = split_shards(list_shards(data_directory(config.data, home)))
        tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        text = measure_text(shards, tokenizer, config.dial.max_seq_len + 1)
    result = build_plan(config, home.cache_dir)
    packing = "best-fit" if config.data in SOURCES or text is None else text.packing
    if config.json:
        content = plan_as_json(result)
        if text is not None:
            passes = text.passes(result.hyperparameters.total_tokens, packing)
            content["text"] = dataclasses.asdict(text) | {"packing": packing, "passes": passes}
        print(json.dumps(content, allow_nan=False))
        return
    console = Console()
    for title, rows in _tables(config, result, text, packing):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", min_width=20)
        table.add_column(justify="right", min_width=14)
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("[bold]Commands[/bold]")
    for line in _commands(config, result):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _tables(
    config: PlanConfig, plan: Plan, text: TextSample | None, packing: str
) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield each table's title and rows, from the template `plan.txt` in this folder."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"bytes": bytes_text, "short": _short, "days": _days}
    template = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    hp, layers = plan.hyperparameters, range(plan.hyperparameters.model.num_layers)
    values = {
        "config": config,
        "plan": plan,
        "hp": hp,
        "model": hp.model,
        "counts": hp.parameters,
        "embedded": sum(map(hp.model.has_value_embedding, layers)),
        "machine": plan.machine,
        "memory": plan.memory,
        "estimate": plan.memory.estimate,
        "time": plan.time,
        "text": text,
        "packing": packing,
        "free": RESERVED_SHARE,
    }
    for part in environment.from_string(template).render(values).strip().split("\n\n"):
        title, *rows = part.split("\n")
        yield title, [[cell.rstrip() for cell in row.split(" | ")] for row in rows]


def _commands(config: PlanConfig, plan: Plan) -> list[str]:
    """Return the commands for this run, from text to a chat model."""
    dial = config.dial
    given = []
    for field in dataclasses.fields(dial):
        flag, value = field.name.replace("_", "-"), getattr(dial, field.name)
        if value is False:
            given.append(f"--no-{flag}")
        elif field.name == "depth" or value != field.default:
            given.append(f"--{flag} {value}")
    if config.activation_checkpointing:
        given.append("--activation-checkpointing")
    if config.optimizer_state != "float32":
        given.append(f"--optimizer-state {config.optimizer_state}")
    if plan.memory.device_batch_size is not None:
        given.append(f"--device-batch-size {plan.memory.device_batch_size}")
    tag = f"--model-tag d{dial.depth}"
    return [
        f"archerchat data download --num-shards {plan.data.train_shards}",
        f"archerchat tokenizer train --vocab-size {config.vocab_size}",
        f"archerchat pretrain {' '.join(given)}",
        f"archerchat eval base {tag}",
        f"archerchat sft {tag}",
        f"archerchat eval chat {tag}",
    ]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return every number of the plan, derived ones included, as JSON types."""
    content = dataclasses.asdict(plan)
    hp, model, counts = plan.hyperparameters, plan.hyperparameters.model, content["hyperparameters"]
    counts |= {name: getattr(hp, name) for name in ("total_tokens", "total_flops")}
    counts |= {n: getattr(model, n) for n in ("head_dim", "windows", "padded_vocab_size")}
    counts["parameters"] |= {n: getattr(hp.parameters, n) for n in ("total", "scaling")}
    content["memory"]["estimate"]["fixed"] = plan.memory.estimate.fixed
    return content


def _short(count: int) -> str:
    """Return 286261730 as 286.3M, and numbers below 10,000 in full."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= max(factor, 1e4):
            return f"{count / factor:.1f}{letter}"
    return str(count)


def _days(hours: float) -> str:
    return duration_text(3600 * hours) if hours < 72 else f"{hours / 24:.1f} days"
