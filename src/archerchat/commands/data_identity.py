"""`archerchat data identity`: write conversations in which the assistant says who it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from archerchat.console import build_console
from archerchat.errors import DataError, UsageError
from archerchat.files import write_bytes
from archerchat.home import Home
from archerchat.tasks.identity import default_template, draw_identity, parse_template


@dataclass(frozen=True)
class DataIdentityConfig:
    """Write conversations in which the assistant says who it is, to mix into fine-tuning."""

    name: str = "Archer"
    """What the assistant is called."""
    creator: str = "the person who runs me"
    """Who trained it, as it would say that."""
    output: Path = Path("identity.jsonl")
    """The file of JSON lines to write; one that is there is replaced."""
    num_conversations: int = 1000
    """How many conversations to write."""
    template: Path | None = None
    """A template of one's own (TOML); by default the package's."""
    save_template: Path | None = None
    """Write the package's template to this new file, to be edited, and nothing else."""
    seed: int = 0
    """Another seed draws other conversations."""


def identity(config: DataIdentityConfig, home: Home) -> None:
    """Draw the conversations and write them, a JSON line each.

    Raises:
        UsageError: a value is empty or not positive, or the template's new file exists.
        DataError: the template cannot be read, or the output not written.
    """
    console = build_console()
    if config.save_template is not None:
        if config.save_template.exists():
            raise UsageError(f"{config.save_template} exists: name a new file for the template")
        _write(config.save_template, default_template())
        console.print(f"wrote the template to {config.save_template}", highlight=False)
        return
    values = {"name": config.name.strip(), "creator": config.creator.strip()}
    for flag, value in values.items():
        if not value:
            raise UsageError(f"--{flag} is empty: give the assistant's {flag}")
    if config.num_conversations < 1:
        raise UsageError(
            f"{config.num_conversations} conversations cannot be written: give at least 1"
        )
    text = default_template() if config.template is None else _read(config.template)
    where = "the template" if config.template is None else str(config.template)
    template = parse_template(text, values, where)
    conversations = draw_identity(template, config.num_conversations, config.seed)
    lines = [json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations]
    _write(config.output, "".join(lines))
    console.print(
        f"wrote {len(conversations)} conversations of {values['name']} to {config.output}",
        highlight=False,
        markup=False,
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
