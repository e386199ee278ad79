"""Byte-level BPE: learned by rustbpe, run by tiktoken, kept as plain text (SPEC section 5).

A vocabulary is a table of ranks (byte string -> merge order, which is also the token id) and a
pattern that cuts text into the pieces merges stay inside. The special tokens follow the learned
ones and are never produced by encoding text: only code places them, so no user can.

On disk a tokenizer is a directory of two files: `ranks.tiktoken` (a line each: base64 of the
bytes, a space, the rank) and `tokenizer.json` (everything else, with the checksum of the ranks).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rustbpe
import tiktoken

from archerchat.errors import DataError, TokenizerError, UsageError
from archerchat.files import explained_writes, new_directory, write_bytes, write_json
from archerchat.home import Home
from archerchat.tokenizer.ranks import format_ranks, load_ranks
from archerchat.tokenizer.safe_text import cut_long_whitespace, encode_text, replace_surrogates

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
RANKS_FILE = "ranks.tiktoken"
METADATA_FILE = "tokenizer.json"
FORMAT = 1
_METADATA_TYPES = {
    "pattern": str,
    "special_tokens": dict,
    "ranks_sha256": str,
    "provenance": dict,
}

Phase = Literal["read", "merge"]


class Tokenizer:
    """Turn text into token ids and back.

    Build one with `train_tokenizer`, `Tokenizer.load` or `Tokenizer.from_ranks`. It can be
    shared by threads and pickled to worker processes.

    Attributes:
        vocab_size: number of ids, special tokens included; ids are 0 .. vocab_size - 1.
        bos_id: the id of `<|bos|>`, which starts every document and conversation.
        fingerprint: hexadecimal SHA-256 over ranks, pattern and special tokens; two tokenizers
            with the same fingerprint encode every text alike.
        provenance: what the tokenizer was trained on, for information only.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        special_tokens: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> None:
        self._ranks = dict(ranks)
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self._encoding = tiktoken.Encoding(
            "archerchat",
            pat_str=pattern,
            mergeable_ranks=self._ranks,
            special_tokens=self._special_ids,
        )
        self.pattern = pattern
        self.provenance = dict(provenance)
        self.vocab_size = len(self._ranks) + len(self._special_ids)
        self.bos_id = self.special_id("<|bos|>")
        settings = json.dumps([pattern, list(special_tokens)]).encode()
        self.fingerprint = hashlib.sha256(settings + b"\n" + format_ranks(self._ranks)).hexdigest()

    @classmethod
    def from_ranks(
        cls,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        provenance: Mapping[str, Any] | None = None,
    ) -> Tokenizer:
        """Build a tokenizer from ranks that were learned elsewhere.

        Raises:
            TokenizerError: the ranks are not 0, 1, 2, ..., lack one of the 256 single bytes (then
                some text could not be encoded), or the pattern is not a regular expression.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise TokenizerError(f"the {len(ranks)} ranks are not 0 .. {len(ranks) - 1}, each once")
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        if missing:
            raise TokenizerError(f"the ranks lack the single byte 0x{missing[0]:02x}")
        if len(set(special_tokens)) != len(special_tokens):
            raise TokenizerError(f"a special token is listed twice: {list(special_tokens)}")
        try:
            return cls(ranks, pattern, special_tokens, provenance or {})
        except ValueError as error:
            raise TokenizerError(
                f"the split pattern {pattern!r} does not compile: {error}"
            ) from error

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read a tokenizer that `save` wrote.

        Raises:
            TokenizerError: a file is missing, broken, or does not belong to the other.
        """
        try:
            metadata = _load_metadata(directory / METADATA_FILE)
            tokenizer = cls.from_ranks(
                load_ranks(directory / RANKS_FILE, metadata["ranks_sha256"]),
                pattern=metadata["pattern"],
                special_tokens=list(metadata["special_tokens"]),
                provenance=metadata["provenance"],
            )
            if metadata["special_tokens"] != tokenizer._special_ids:
                raise TokenizerError(
                    f"{directory / METADATA_FILE} gives the special tokens other ids than "
                    f"{len(tokenizer._ranks)} and up, which follow the ranks"
                )
        except TokenizerError as error:
            raise TokenizerError(
                f"{error}. Copy the tokenizer's directory anew, or make one with "
                f"`archerchat tokenizer train` (--force replaces a broken one)"
            ) from error
        return tokenizer

    def save(self, directory: Path) -> None:
        """Write both files into `directory`, which is made if needed; each replaced atomically."""
        content = format_ranks(self._ranks)
        write_bytes(directory / RANKS_FILE, content)
        metadata = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": self._special_ids,
            "ranks_sha256": hashlib.sha256(content).hexdigest(),
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        write_json(directory / METADATA_FILE, metadata)

    def special_id(self, name: str) -> int:
        """Return the id of a special token such as `<|user_start|>`.

        Raises:
            TokenizerError: this tokenizer has no such special token.
        """
        if name not in self._special_ids:
            raise TokenizerError(
                f"no special token {name!r}: this tokenizer has {', '.join(self._special_ids)}"
            )
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Encode `text`; the text of a special token is ordinary text.

        Lone surrogates, which no UTF-8 can hold, are encoded as U+FFFD.
        """
        return encode_text(self._encoding, text)

    def encode_batch(
        self, texts: Sequence[str], *, prepend_bos: bool = False, num_threads: int = 4
    ) -> list[list[int]]:
        """Encode many texts in parallel, in order, each starting with BOS if so asked."""
        if num_threads <= 1 or len(texts) <= 1:
            rows = [self.encode(text) for text in texts]
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                rows = list(pool.map(self.encode, texts))
        if prepend_bos:
            for row in rows:
                row.insert(0, self.bos_id)
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        token_ids = list(ids)
        try:
            return self._encoding.decode(token_ids)
        except (KeyError, OverflowError) as error:
            unknown = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"token id {unknown} is outside this tokenizer's vocabulary of {self.vocab_size}: "
                "the model was probably trained with another tokenizer"
            ) from error

    @property
    def token_bytes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The number of bytes each id stands for, (vocab_size,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths


def _load_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise TokenizerError(f"{path} is not a tokenizer of format {FORMAT}")
    for key, kind in _METADATA_TYPES.items():
        if not isinstance(metadata.get(key), kind):
            raise TokenizerError(f"{path} has no {key!r} that is a {kind.__name__}")
    return metadata


def find_tokenizer(home: Home, name: str) -> Path:
    """Return the directory of tokenizer `name`, for `Tokenizer.load`.

    Raises:
        UsageError: there is no such tokenizer; the message lists those there are.
    """
    directory = home.tokenizer_dir(name)
    if directory.is_dir():
        return directory
    found = directory.parent.glob("*/") if directory.parent.is_dir() else ()
    names = sorted(path.name for path in found if (path / METADATA_FILE).is_file())
    known = f"; there is {', '.join(names)}. Choose one of them, or " if names else ": "
    raise UsageError(
        f"no tokenizer {name!r} under {directory.parent}{known}make one with "
        f"`archerchat tokenizer train`"
    )


def save_new_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `directory` as a whole, or leave what is there as it is.

    Raises:
        TokenizerError: the disk is full or cannot be written.
    """
    with explained_writes(directory, TokenizerError), new_directory(directory) as temporary:
        tokenizer.save(temporary)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int = 2_000_000_000,
    document_chars: int = 10_000,
    on_progress: Callable[[Phase, int], None] | None = None,
) -> Tokenizer:
    """Learn a vocabulary from `texts`, deterministically and whatever their order.

    Args:
        texts: documents; they are taken one by one until `max_chars` is reached.
        vocab_size: number of ids, the nine special tokens included.
        max_chars: stop reading after the document that reaches so many characters.
        document_chars: only so many characters of each document count.
        on_progress: called with "read" and the characters so far after each document, and once
            with "merge" when reading is over (that phase takes a while and reports nothing).

    Raises:
        UsageError: `vocab_size` cannot hold the 256 bytes and the special tokens.
        DataError: the text has too few distinct pieces to fill the vocabulary. A smaller one is
            not returned instead, since the model's size was planned for the one asked for.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(
            f"vocabulary size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need at least {smallest}"
        )
    report = on_progress or (lambda phase, characters: None)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        _iter_training_text(texts, max_chars, document_chars, report),
        vocab_size - len(SPECIAL_TOKENS),
        pattern=SPLIT_PATTERN,
    )
    ranks = {bytes(token): int(rank) for token, rank in trainer.get_mergeable_ranks()}
    possible = len(ranks) + len(SPECIAL_TOKENS)
    if possible < vocab_size:
        raise DataError(
            f"the text is too short for a vocabulary of {vocab_size}: it yields only {possible} "
            f"tokens. Train on more text, or ask for at most {possible}"
        )
    return Tokenizer.from_ranks(ranks)


def _iter_training_text(
    texts: Iterable[str],
    max_chars: int,
    document_chars: int,
    report: Callable[[Phase, int], None],
) -> Iterator[str]:
    characters = 0
    for text in texts:
        cropped = replace_surrogates(text[:document_chars])
        characters += len(cropped)
        report("read", characters)
        yield from cut_long_whitespace(cropped)
        if characters >= max_chars:
            break
    report("merge", characters)
