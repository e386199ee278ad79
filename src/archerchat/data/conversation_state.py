"""Where a loader of conversations is in its mixture, completely, and what it met so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archerchat.data.packing import Document
from archerchat.data.state import join_documents, split_documents
from archerchat.errors import CheckpointError


@dataclass(frozen=True)
class Counts:
    """What became of a rank's conversations, over all passes, up to a batch."""

    read: int = 0
    cut: int = 0
    """Longer than a row, and cut to it."""
    dropped: int = 0
    """Without a token to learn, or with none in what fits a row."""
    targets: int = 0
    """Positions in all rows, T each."""
    padding: int = 0
    """Those of them that only fill a row."""
    trained: int = 0
    """Those of them that are learned from."""

    @property
    def padding_share(self) -> float:
        """Share of the positions that only fill rows; NaN before the first batch."""
        return self.padding / self.targets if self.targets else math.nan

    @property
    def trained_share(self) -> float:
        """Share of the positions that are learned from; NaN before the first batch."""
        return self.trained / self.targets if self.targets else math.nan


@dataclass(frozen=True, eq=False)
class ConversationState:
    """Hold all that decides a loader's next batch."""

    identity: Mapping[str, Any]
    """What decides which batches a loader yields, as JSON."""
    counts: Counts
    """Of the batches so far; `read` is also the position."""
    documents: tuple[Document, ...]
    """What the packer has buffered, in its order."""

    @property
    def consumed(self) -> int:
        """Conversations that are in rows, or dropped."""
        return self.counts.read - len(self.documents)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the state as a JSON value and named arrays; `from_parts` is the inverse."""
        value = {"identity": dict(self.identity), "counts": asdict(self.counts)}
        return value, join_documents(self.documents, np.int32)

    @classmethod
    def from_parts(
        cls, value: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> ConversationState:
        """Rebuild a state from what `to_parts` returned.

        Raises:
            CheckpointError: a part is missing or does not fit the others.
        """
        try:
            counts = Counts(**value["counts"])
            return cls(dict(value["identity"]), counts, split_documents(arrays))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved state of the conversations is broken ({error!r}): resume from an "
                f"earlier checkpoint"
            ) from error
