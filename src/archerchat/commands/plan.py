"""`archerchat plan --depth N [--gpu NAME]`: estimate what training takes, before it starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table

from archerchat.console import duration_text
from archerchat.data.hub import SOURCES
from archerchat.data.shards import data_directory, list_shards, list_sources, split_shards
from archerchat.data.text_sample import measure_text
from archerchat.home import Home
from archerchat.planning.memory import CPU_TOKENS, RESERVED_SHARE
from archerchat.planning.plan import PlanConfig, build_plan
from archerchat.report.document import build_environment
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer


def plan(config: PlanConfig, home: Home) -> None:
    """Print the plan of a run."""
    text, packing = None, "best-fit"
    if config.data is not None:
        shards, _ = split_shards(list_shards(data_directory(config.data, home)))
        tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        text = measure_text(shards, tokenizer, config.dial.max_seq_len + 1)
        packing = "best-fit" if config.data in SOURCES else text.packing
    content = build_plan(config, home.cache_dir)
    if config.json:
        if text is not None:
            passes = text.passes(content["hyperparameters"]["total_tokens"], packing)
            content["text"] = dataclasses.asdict(text) | {"packing": packing, "passes": passes}
        print(json.dumps(content, allow_nan=False))
        return
    # A plan for another machine does not use the text that is on this one, unless --data names it.
    here = [] if config.gpu else [source.name for source in list_sources(home)]
    own = config.data or ("" if "climbmix" in here or not here else here[0])
    environment = build_environment(Path(__file__).parent)
    environment.filters["days"] = lambda hours: (
        duration_text(3600 * hours) if hours < 72 else f"{hours / 24:.1f} days"
    )
    tables = environment.get_template("plan.txt").render(
        content,
        config=config,
        text=text,
        packing=packing,
        own=own,
        free=RESERVED_SHARE,
        cpu_tokens=CPU_TOKENS,
    )
    console = Console(markup=False, emoji=False, highlight=False)
    for part in tables.strip().split("\n\n"):
        title, *rows = part.split("\n")
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", min_width=20)
        table.add_column(justify="right", min_width=14)
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*(cell.rstrip() for cell in row.split(" | ")))
        console.print(table)
    console.print("Commands", style="bold")
    for line in _commands(config, content, own):
        console.print(line, soft_wrap=True)


def _commands(config: PlanConfig, content: dict[str, Any], own: str) -> list[str]:
    """Return the commands for this run, from text to a chat model; `own` names text to use."""
    dial, size = config.dial, content["memory"]["device_batch_size"]
    data = f" --data {quote(own)}" if own else ""
    tag, given = f"--model-tag d{dial.depth}", []
    if config.tokenizer != "default":
        given.append(f"--tokenizer {quote(config.tokenizer)}")
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
    if size is not None:
        given.append(f"--device-batch-size {size}")
    commands = [
        f"pretrain{data} {' '.join(given)}",
        f"eval base {tag}",
        f"sft {tag}",
        f"eval chat {tag}",
    ]
    if config.data is None:  # with --data both are here
        commands.insert(0, f"tokenizer train{data} --vocab-size {config.vocab_size}")
    if not own:
        commands.insert(0, f"data download --num-shards {content['data']['train_shards']}")
    return [f"archerchat {command}" for command in commands]
