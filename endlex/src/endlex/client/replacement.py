"""Checkpoints that take each other's place: of those saved with one `replaces`, the newest stays.

`run.save(..., replaces="last")` notes the word in the checkpoint's metadata. Whoever sends a
checkpoint looks here: an older one that still waits is not sent any more, and once the newer one is
published the older ones are removed from the server, never before. `endlex verify` takes a
checkpoint that a newer one has replaced for settled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endlex.client.staging import read_note, staged_names, unstage
from endlex.client.transport import Refused, Transport, quoted
from endlex.protocol import EndlexError, Manifest

REPLACES = "replaces"
"""The key in a checkpoint's metadata."""


def drop_replaced(directory: Path) -> list[str]:
    """Drop the staged checkpoints that a later staged one replaces, and return their names.

    Only the process that sends may call it: it must not be in the middle of one.
    """
    newest: set[str] = set()
    dropped = []
    names = staged_names(directory)
    for name in reversed(names) if len(names) > 1 else ():
        try:
            word = read_note(directory, name)["metadata"].get(REPLACES)
        except (EndlexError, KeyError, AttributeError):
            continue  # damaged: whoever sends it says so
        if isinstance(word, str):
            if word in newest:
                unstage(directory, name)
                dropped.append(name)
            newest.add(word)
    return dropped


def remove_replaced(run: str, manifest: Manifest, transport: Transport) -> None:
    """Remove the older checkpoints that a published one replaces from the server.

    Raises:
        Retry: the server is not there; calling again goes on.
    """
    word = manifest["metadata"].get(REPLACES)
    if not isinstance(word, str):
        return
    for other in _list(run, transport):
        older = other.get("created", manifest["created"]) < manifest["created"]
        if older and other["name"] != manifest["name"] and _word_of(other) == word:
            with contextlib.suppress(Refused):  # gone by itself, or kept by whoever decides there
                where = quoted("runs", run, "checkpoints", other["name"])
                transport.request("DELETE", where, query={"reason": f"replaced by a newer {word}"})


def is_replaced(run: str, word: object, saved: float, transport: Transport) -> bool:
    """Whether the server has a checkpoint that replaced one saved at a moment (Unix seconds)."""
    return isinstance(word, str) and any(
        other["state"] == "published" and _word_of(other) == word and other["created"] > saved
        for other in _list(run, transport)
    )


def _list(run: str, transport: Transport) -> list[Mapping[str, Any]]:
    try:
        listed = transport.request("GET", quoted("runs", run, "checkpoints")).content
    except Refused:
        return []
    return listed if isinstance(listed, list) else []


def _word_of(checkpoint: Mapping[str, Any]) -> object:
    return (checkpoint.get("metadata") or {}).get(REPLACES)
