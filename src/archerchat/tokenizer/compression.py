"""How many bytes a token holds on average, ours against GPT-2's and GPT-4's.

More bytes to a token means fewer tokens for the same text: cheaper training and a longer view
back. A larger vocabulary compresses better and costs more to predict, so sizes are part of the
comparison. The published vocabularies are read from the ranks files that tiktoken downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from archerchat.errors import DataError
from archerchat.tokenizer.ranks import load_ranks
from archerchat.tokenizer.safe_text import encode_text

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class PublishedVocabulary:
    """Name a vocabulary that others published, and what its ranks file must be."""

    title: str
    file_name: str
    sha256: str
    pattern: str

    def load(self, path: Path) -> Vocabulary:
        """Read the vocabulary from its ranks file.

        Raises:
            TokenizerError: the file cannot be read or is not this vocabulary's.
        """
        ranks = load_ranks(path, self.sha256)
        encoding = tiktoken.Encoding(
            self.title, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        return Vocabulary(self.title, len(ranks), lambda text: encode_text(encoding, text))


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
class Vocabulary:
    """A title, the number of ordinary tokens, and the function that encodes."""

    title: str
    size: int
    encode: Encode


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
        """Return how many times as many bytes `title` packs in a token as `other` does."""
        return self.tokens[other] / self.tokens[title]


def measure_compression(
    name: str, documents: Sequence[str], vocabularies: Sequence[Vocabulary]
) -> Compression:
    """Encode `documents` one by one with each vocabulary and count.

    Raises:
        DataError: there is no text in the documents.
    """
    num_bytes = sum(len(document.encode()) for document in documents)
    if not num_bytes:
        raise DataError(f"the {name} text is empty: there is nothing to measure compression on")
    tokens = {
        vocabulary.title: sum(len(vocabulary.encode(document)) for document in documents)
        for vocabulary in vocabularies
    }
    return Compression(name, num_bytes, tokens)
