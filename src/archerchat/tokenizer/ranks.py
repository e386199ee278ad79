"""The ranks file: a BPE vocabulary as text, in tiktoken's format.

A line for each token, in order of rank: base64 of its bytes, a space, the rank. The rank is
both the order in which merges apply and the token id.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from archerchat.errors import TokenizerError


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a ranks file."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def load_ranks(path: Path, sha256: str | None = None) -> dict[bytes, int]:
    """Read a ranks file, and check its hexadecimal SHA-256 where one is given.

    Raises:
        TokenizerError: the file cannot be read, has another checksum, or holds a line that is
            not a token and its rank; the message names the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from error
    actual = hashlib.sha256(content).hexdigest()
    if sha256 is not None and actual != sha256:
        raise TokenizerError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, expected {sha256}"
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            encoded, rank = line.split(b" ")
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError("this token comes twice")
            ranks[token] = int(rank)
        except ValueError as error:
            raise TokenizerError(
                f"{path}, line {number}: {line[:60]!r} is not 'base64 rank' ({error})"
            ) from error
    return ranks
