"""Checkpoints that take each other's place: of those saved with one `replaces`, the newest stays.

`run.save(..., replaces="last")` notes the word in the checkpoint's metadata. An older checkpoint
that still waits when the newer one is saved is not sent any more. The server removes the older ones
once the newer one is published, never before. `endlex verify` counts a replaced one as settled.
"""

from __future__ import annotations

from pathlib import Path

from endlex.client.staging import read_note, staged_names, unstage
from endlex.client.transport import Refused, Transport, quoted
from endlex.protocol import REPLACES, EndlexError


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


def is_replaced(run: str, word: object, saved: float, transport: Transport) -> bool:
    """Whether the server has a checkpoint that replaced one saved at a moment (Unix seconds)."""
    if not isinstance(word, str):
        return False
    try:
        listed = transport.request("GET", quoted("runs", run, "checkpoints")).content
    except Refused:
        return False
    return any(
        other["state"] == "published"
        and other["created"] > saved
        and (other.get("metadata") or {}).get(REPLACES) == word
        for other in (listed if isinstance(listed, list) else [])
    )
