"""Where a loader is in its data, completely: what a checkpoint keeps to resume exactly.

The reference saves a position only and loses the documents its packer had buffered (1,041 of
them in the golden). Here a state is the position, the buffered documents, and what both mean
something for: the shards, the tokenizer and the settings, which a resumed loader must share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from archerchat.data.packing import Document, Packing
from archerchat.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """Name the last chunk of documents that entered the packer's buffer."""

    shard: int
    """index in the list of shards"""
    row_group: int
    """index in that shard"""
    epoch: int
    """passes over the data begun, from 1"""


@dataclass(frozen=True)
class LoaderIdentity:
    """Name everything that decides which batches a loader yields."""

    packing: Packing
    batch_size: int
    sequence_length: int
    buffer_size: int
    tokenizer_batch: int
    rank: int
    world_size: int
    tokenizer: str
    """fingerprint"""
    shards: tuple[tuple[str, int], ...]
    """name and size in bytes of each"""

    def differences(self, other: LoaderIdentity) -> list[str]:
        """Describe in words each setting in which `other` (now) differs from this one (saved)."""
        found = [
            f"{field.name} was {getattr(self, field.name)} and is {getattr(other, field.name)}"
            for field in fields(self)
            if field.name != "shards" and getattr(self, field.name) != getattr(other, field.name)
        ]
        if len(self.shards) != len(other.shards):
            lost = sorted(set(self.shards) - set(other.shards))
            found.append(
                f"there were {len(self.shards)} shards and are {len(other.shards)}"
                + (f", without {lost[0][0]} of {lost[0][1]} bytes" if lost else "")
            )
        else:
            pairs = zip(self.shards, other.shards, strict=True)
            changed = [(old, new) for old, new in pairs if old != new]
            found += [
                f"shard {old[0]} of {old[1]} bytes is now {new[0]} of {new[1]} bytes"
                + (f" ({len(changed) - 1} more differ)" if len(changed) > 1 else "")
                for old, new in changed[:1]
            ]
        return found


@dataclass(frozen=True, eq=False)
class LoaderState:
    """Hold all that decides a loader's next batch."""

    identity: LoaderIdentity
    position: Position
    next_document: int
    """how many documents of the position's row group have been read"""
    documents: tuple[Document, ...]
    """what the packer has buffered, in its order"""

    def to_parts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the state as a JSON value and named arrays; `from_parts` is the inverse.

        The arrays are `tokens` (all buffered documents end to end, uint16 or uint32) and
        `lengths` (int64).
        """
        value = {
            "identity": asdict(self.identity) | {"shards": [list(s) for s in self.identity.shards]},
            "position": asdict(self.position),
            "next_document": self.next_document,
        }
        return value, join_documents(self.documents, np.uint16)

    @classmethod
    def from_parts(
        cls, value: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> LoaderState:
        """Rebuild a state from what `to_parts` returned.

        Raises:
            CheckpointError: a part is missing or does not fit the others.
        """
        try:
            saved = dict(value["identity"])
            saved["shards"] = tuple((str(name), int(size)) for name, size in saved["shards"])
            return cls(
                identity=LoaderIdentity(**saved),
                position=Position(**value["position"]),
                next_document=int(value["next_document"]),
                documents=split_documents(arrays),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved state of the data loader is broken ({error!r}): resume from an "
                f"earlier checkpoint"
            ) from error


def join_documents(
    documents: Sequence[Document], dtype_if_none: DTypeLike
) -> dict[str, NDArray[Any]]:
    """Return documents end to end, `tokens`, and their `lengths` (int64)."""
    lengths = np.array([len(document) for document in documents], np.int64)
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype_if_none)
    return {"tokens": tokens, "lengths": lengths}


def split_documents(arrays: Mapping[str, NDArray[Any]]) -> tuple[Document, ...]:
    """Undo `join_documents`.

    Raises:
        KeyError: an array is missing.
        ValueError: the lengths are not those of documents that make up the tokens.
    """
    tokens, lengths = arrays["tokens"], arrays["lengths"].tolist()
    if tokens.ndim != 1 or min(lengths, default=1) < 1 or sum(lengths) != len(tokens):
        raise ValueError(f"{tokens.shape} tokens in documents of {sum(lengths)} tokens")
    ends = np.cumsum(lengths)
    return tuple(tokens[end - length : end] for end, length in zip(ends, lengths, strict=True))
