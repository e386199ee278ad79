"""`archerchat data identity`: write conversations in which the assistant says who it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from archerchat.config import Config, PositiveInt, Seed
from archerchat.console import build_console
from archerchat.errors import DataError, UsageError
from archerchat.files import write_bytes
from archerchat.home import Home
from archerchat.tasks.identity import default_template, draw_identity, parse_template


@dataclass(frozen=True)
class DataIdentityConfig(Config):
    """Write conversations in which the assistant says who it is, to mix into fine-tuning."""

    name: str = "Archer"
    """Name of the assistant."""
    creator: str = "the person who runs me"
    """Who trained the assistant, in its own words."""
    output: Path = Path("identity.jsonl")
    """File of JSON lines to write; an existing one is replaced."""
    num_conversations: PositiveInt = 1000
    """Number of conversations to write."""
    template: Path | None = None
    """Your own template (TOML). Defaults to the package's."""
    save_template: Path | None = None
    """Write the package's template to this new file, for editing, and nothing else."""
    seed: Seed = 0
    """Random seed for drawing the conversations."""


def identity(config: DataIdentityConfig, home: Home) -> None:
    """Draw the conversations and write them, one JSON line each.

    Raises:
        UsageError: a value is empty, or the template's new file exists.
        DataError: the template cannot be read, or the output not written.
    """
    console = build_console()
    if config.save_template is not None:
        if config.save_template.exists():
            raise UsageError(f"{config.save_template} exists: name a new file for the template")
        _write(config.save_template, default_template())
        console.print(f"wrote the template to {config.save_template}")
        return
    values = {"name": config.name.strip(), "creator": config.creator.strip()}
    for flag, value in values.items():
        if not value:
            raise UsageError(f"--{flag} is empty: give the assistant's {flag}")
    text = default_template() if config.template is None else _read(config.template)
    where = "the template" if config.template is None else str(config.template)
    template = parse_template(text, values, where)
    conversations = draw_identity(template, config.num_conversations, config.seed)
    lines = [json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations]
    _write(config.output, "".join(lines))
    console.print(
        f"wrote {len(conversations)} conversations of {values['name']} to {config.output}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the template {path} ({error}): give a TOML file") from error


def _write(path: Path, text: str) -> None:
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}): name a place that can be written"
        ) from error
