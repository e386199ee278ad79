"""`archerchat plan --depth N [--gpu NAME]`: estimate what training takes, before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table

from archerchat.console import duration_text
from archerchat.data.hub import SOURCES
from archerchat.data.shards import Shard, data_directory, list_shards, list_sources, split_shards
from archerchat.data.text_sample import measure_text
from archerchat.home import Home
from archerchat.planning.memory import CPU_TOKENS, RESERVED_SHARE
from archerchat.planning.plan import BYTES_PER_TOKEN, PlanConfig, build_plan
from archerchat.report.document import build_environment
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer


def plan(config: PlanConfig, home: Home) -> None:
    """Print the plan of a run."""
    text, packing, config = None, "best-fit", _choose_vocabulary(config, home)
    if config.data is not None:
        shards, held_out = split_shards(list_shards(data_directory(config.data, home)))
        tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
        with Shard(held_out[0]) as shard:  # an evaluation reads it once at most
            eval_tokens = min(config.eval_tokens, max(1, shard.text_bytes // BYTES_PER_TOKEN))
        config = replace(config, eval_tokens=eval_tokens)
        text = measure_text(shards, tokenizer, config.dial.max_seq_len + 1)
        packing = "best-fit" if config.data in SOURCES else text.packing
    content = build_plan(config, home.cache_dir)
    if config.json:
        if text is not None:
            passes = text.passes(content["hyperparameters"]["total_tokens"], packing)
            content["text"] = asdict(text) | {"packing": packing, "passes": passes}
        print(json.dumps(content, allow_nan=False))
        return
    # A plan for another machine does not use the text that is on this one, unless --data names it.
    here = [] if config.gpu else [source.name for source in list_sources(home)]
    own = config.data or ("" if "climbmix" in here or not here else here[0])
    environment = build_environment(Path(__file__).parent)
    environment.filters["days"] = lambda hours: (
        duration_text(3600 * hours) if hours < 72 else f"{hours / 24:.1f} days"
    )
    printed = environment.get_template("plan.txt").render(
        content,
        config=config,
        text=text,
        packing=packing,
        own=own,
        has_tokenizer=_has_tokenizer(config, home),
        quote=quote,
        free=RESERVED_SHARE,
        cpu_tokens=CPU_TOKENS,
        from_own=f" --data {quote(own)}" if own else "",
        pretrain_flags=" ".join(_pretrain_flags(config, content["memory"]["device_batch_size"])),
    )
    _print(printed)


def _print(printed: str) -> None:
    """Print tables, each a title and rows of cells, and the commands at the end."""
    *tables, commands = printed.strip().split("\n\n")
    console = Console(markup=False, emoji=False, highlight=False)
    for part in tables:
        title, *rows = part.split("\n")
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", min_width=20)
        table.add_column(justify="right", min_width=14)
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*(cell.rstrip() for cell in row.split(" | ")))
        console.print(table)
    title, _, lines = commands.partition("\n")
    console.print(title, style="bold")
    console.print(lines, soft_wrap=True)


def _has_tokenizer(config: PlanConfig, home: Home) -> bool:
    """Whether the tokenizer is here; that does not count for another machine without --data."""
    here = config.gpu is None and home.tokenizer_dir(config.tokenizer).is_dir()
    return here or config.data is not None


def _choose_vocabulary(config: PlanConfig, home: Home) -> PlanConfig:
    """Use the vocabulary of the tokenizer if it is here; a new one of another size gets a name."""
    if not _has_tokenizer(config, home):
        return config
    size = Tokenizer.load(find_tokenizer(home, config.tokenizer)).vocab_size
    if config.data is None and config.vocab_size not in (None, size):
        return replace(config, tokenizer=f"{config.tokenizer}-{config.vocab_size}")
    return replace(config, vocab_size=size)


def _pretrain_flags(config: PlanConfig, size: int | None) -> Iterator[str]:
    """Yield the flags that differ from the defaults."""
    if config.tokenizer != "default":
        yield f"--tokenizer {quote(config.tokenizer)}"
    for field in fields(config.dial):
        flag, value = field.name.replace("_", "-"), getattr(config.dial, field.name)
        if value is False:
            yield f"--no-{flag}"
        elif field.name == "depth" or value != field.default:
            yield f"--{flag} {value}"
    if config.activation_checkpointing:
        yield "--activation-checkpointing"
    if config.optimizer_state != "float32":
        yield f"--optimizer-state {config.optimizer_state}"
    if size is not None:
        yield f"--device-batch-size {size}"
