"""How many bytes a token holds on average, compared with GPT-2's and GPT-4's tokens.

More bytes per token means fewer tokens for the same text: cheaper training and a longer view
back. A larger vocabulary compresses better and costs more to predict, so sizes are part of the
comparison. The published vocabularies are read from the ranks files that tiktoken downloads.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from archerchat.errors import DataError
from archerchat.tokenizer.bpe import Tokenizer, load_ranks


@dataclass(frozen=True)
class PublishedVocabulary:
    """A vocabulary that others published, and what identifies its ranks file."""

    title: str
    file_name: str
    sha256: str
    pattern: str

    def load(self, path: Path) -> Tokenizer:
        """Read the vocabulary from its ranks file; raises as `load_ranks` does."""
        return Tokenizer(load_ranks(path, self.sha256), pattern=self.pattern)


GPT2 = PublishedVocabulary(
    title="GPT-2",
    file_name="r50k_base.tiktoken",
    sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)
GPT4 = PublishedVocabulary(
    title="GPT-4",
    file_name="cl100k_base.tiktoken",
    sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    pattern=(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
)


@dataclass(frozen=True)
class Compression:
    """What each vocabulary made of one text."""

    text: str
    num_bytes: int
    tokens: Mapping[str, int]
    """Number of tokens by the vocabulary's title."""

    def bytes_per_token(self, title: str) -> float:
        """Return the average number of UTF-8 bytes in a token."""
        return self.num_bytes / self.tokens[title]

    def ratio(self, title: str, other: str) -> float:
        """Return the bytes per token of `title` divided by those of `other`."""
        return self.tokens[other] / self.tokens[title]


def measure_compression(
    name: str, documents: Sequence[str], encoders: Mapping[str, Callable[[str], Sequence[int]]]
) -> Compression:
    """Encode `documents` one by one with each vocabulary, by its title, and count.

    Raises:
        DataError: there is no text in the documents.
    """
    num_bytes = sum(len(document.encode()) for document in documents)
    if not num_bytes:
        raise DataError(f"the {name} text is empty: there is nothing to measure compression on")
    tokens = {title: sum(map(len, map(encode, documents))) for title, encode in encoders.items()}
    return Compression(name, num_bytes, tokens)


def load_samples() -> dict[str, str]:
    """Return short texts of different kinds, on which vocabularies differ most."""
    return tomllib.loads(Path(__file__).with_name("samples.toml").read_text(encoding="utf-8"))
