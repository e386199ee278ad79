"""Byte-level BPE: learned by rustbpe, run by tiktoken, kept as plain text (SPEC section 5).

A vocabulary is a table of ranks (byte string -> merge order, which is also the token id) and a
pattern that cuts text into the pieces merges stay inside. The special tokens follow the learned
ones and are never produced by encoding text: only code places them, so no user can.

On disk a tokenizer is a directory of two files: `ranks.tiktoken` (in tiktoken's format, one line
per token: base64 of the bytes, a space, the rank) and `tokenizer.json` (everything else, with the
checksum of the ranks).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rustbpe
import tiktoken

from archerchat.errors import DataError, TokenizerError, UsageError
from archerchat.files import UNREADABLE, explained_writes, new_directory, write_bytes, write_json
from archerchat.home import Home

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
WHITESPACE_LIMIT = 400_000
"""The regex engine of tiktoken and rustbpe keeps one stack entry per character of a run of
whitespace and panics at 999,774 spaces. The panic is a `BaseException`, so one such document would
end a training run. Longer runs are therefore cut (`cut_long_whitespace`)."""

Phase = Literal["read", "merge"]


class Tokenizer:
    """Turn text into token ids and back.

    Build one from its ranks, with `train_tokenizer` or with `Tokenizer.load`. It can be shared by
    threads and pickled to worker processes.

    Attributes:
        vocab_size: number of ids, special tokens included; ids are 0 .. vocab_size - 1.
        bos_id: the id of `<|bos|>`, which starts every document and conversation.
        encoding: tiktoken's.
        fingerprint: hexadecimal SHA-256 over ranks, pattern and special tokens; two tokenizers
            with the same fingerprint encode every text alike.
        provenance: what the tokenizer was trained on, for information only.

    Raises:
        TokenizerError: the ranks are not 0, 1, 2, ..., lack one of the 256 single bytes (then
            some text could not be encoded), or the pattern is not a regular expression.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise TokenizerError(f"the {len(ranks)} ranks are not 0 .. {len(ranks) - 1}, each once")
        if missing := [value for value in range(256) if bytes([value]) not in ranks]:
            raise TokenizerError(f"the ranks lack the single byte 0x{missing[0]:02x}")
        self._ranks = dict(ranks)
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        try:
            self.encoding = tiktoken.Encoding(
                "archerchat",
                pat_str=pattern,
                mergeable_ranks=self._ranks,
                special_tokens=self._special_ids,
            )
        except ValueError as error:
            raise TokenizerError(
                f"the split pattern {pattern!r} does not compile: {error}"
            ) from error
        self.pattern, self.provenance = pattern, dict(provenance or {})
        self.vocab_size = len(self._ranks) + len(self._special_ids)
        self.bos_id = self.special_id("<|bos|>")
        settings = json.dumps([pattern, list(special_tokens)]).encode()
        self.fingerprint = hashlib.sha256(settings + b"\n" + format_ranks(self._ranks)).hexdigest()

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read a tokenizer that `save` wrote.

        Raises:
            TokenizerError: a file is missing, broken, or does not belong to the other.
        """
        try:
            metadata = _load_metadata(directory / METADATA_FILE)
            tokenizer = cls(
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
        except (OSError, TokenizerError) as error:
            raise TokenizerError(
                f"cannot load a tokenizer: {error}. Copy its directory again, or make one with "
                f"`archerchat tokenizer train` (--force replaces a broken one)"
            ) from error
        return tokenizer

    def save(self, directory: Path) -> None:
        """Write `directory` as a whole, or leave what is there as it is.

        Raises:
            TokenizerError: the disk is full or cannot be written.
        """
        content = format_ranks(self._ranks)
        metadata = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": self._special_ids,
            "ranks_sha256": hashlib.sha256(content).hexdigest(),
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        with explained_writes(directory, TokenizerError), new_directory(directory) as temporary:
            write_bytes(temporary / RANKS_FILE, content)
            write_json(temporary / METADATA_FILE, metadata)

    def special_id(self, name: str) -> int:
        """Return the id of a special token such as `<|user_start|>`, or raise `TokenizerError`."""
        if name not in self._special_ids:
            raise TokenizerError(
                f"no special token {name!r}: this tokenizer has {', '.join(self._special_ids)}"
            )
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Encode `text`; the text of a special token is ordinary text.

        Lone surrogates, which UTF-8 cannot hold, are encoded as U+FFFD.
        """
        if len(text) < WHITESPACE_LIMIT:
            return self.encoding.encode_ordinary(text)
        pieces = cut_long_whitespace(text)
        return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many documents, in order, each starting with BOS."""
        return [[self.bos_id, *self.encode(text)] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        token_ids = list(ids)
        try:
            return self.encoding.decode(token_ids)
        except (KeyError, OverflowError) as error:
            unknown = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"token id {unknown} is outside this tokenizer's vocabulary of {self.vocab_size}: "
                "the model was probably trained with another tokenizer"
            ) from error

    def token(self, token_id: int) -> bytes:
        """Return the bytes that an id stands for; a special token's are its name."""
        return self.encoding.decode_single_token_bytes(token_id)

    @property
    def token_bytes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The number of bytes each id stands for, (vocab_size,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Return the content of a ranks file."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def load_ranks(path: Path, sha256: str | None = None) -> dict[bytes, int]:
    """Read a ranks file, and compare its hexadecimal SHA-256 if one is given.

    Raises:
        OSError: the file cannot be read.
        TokenizerError: it has another checksum, or holds a line that is not a token and its rank.
    """
    content = path.read_bytes()
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


def _load_metadata(path: Path) -> dict[str, Any]:
    kinds = {"pattern": str, "special_tokens": dict, "ranks_sha256": str, "provenance": dict}
    try:
        metadata: dict[str, Any] = json.loads(path.read_bytes())
        complete = all(isinstance(metadata[key], kind) for key, kind in kinds.items())
        if complete and metadata["format"] == FORMAT:
            return metadata
    except (*UNREADABLE, KeyError, TypeError):
        pass
    raise TokenizerError(f"{path} does not describe a tokenizer of format {FORMAT}")


def cut_long_whitespace(text: str, limit: int = WHITESPACE_LIMIT) -> Iterator[str]:
    """Yield `text` in pieces, cut after every `limit` characters of a run of whitespace.

    A search at each character of a run would take quadratic time, hence the lookbehind.
    """
    start = 0
    for run in re.finditer(rf"(?<!\s)\s{{{limit},}}", text):
        for end in range(run.start() + limit, run.end() + 1, limit):
            yield text[start:end]
            start = end
    yield text[start:]


def replace_surrogates(text: str) -> str:
    """Return `text` with lone surrogates as U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def find_tokenizer(home: Home, name: str) -> Path:
    """Return the directory of tokenizer `name`, for `Tokenizer.load`; an error lists the others."""
    directory = home.tokenizer_dir(name)
    if directory.is_dir():
        return directory
    names = sorted(path.parent.name for path in directory.parent.glob(f"*/{METADATA_FILE}"))
    known = f"; there is {', '.join(names)}. Choose one of them, or " if names else ": "
    raise UsageError(
        f"no tokenizer {name!r} under {directory.parent}{known}make one with "
        f"`archerchat tokenizer train`"
    )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int = 2_000_000_000,
    document_chars: int = 10_000,
    on_progress: Callable[[Phase, int], None] = lambda phase, characters: None,
) -> Tokenizer:
    """Learn a vocabulary from `texts`, deterministically and whatever their order.

    Args:
        vocab_size: number of ids, the nine special tokens included.
        max_chars: stop reading after the document that reaches this many characters.
        document_chars: longer documents are cropped to this many characters.
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

    def iter_text() -> Iterator[str]:
        characters = 0
        for text in texts:
            cropped = replace_surrogates(text[:document_chars])
            characters += len(cropped)
            on_progress("read", characters)
            yield from cut_long_whitespace(cropped)
            if characters >= max_chars:
                break
        on_progress("merge", characters)

    trainer, num_learned = rustbpe.Tokenizer(), vocab_size - len(SPECIAL_TOKENS)
    trainer.train_from_iterator(iter_text(), num_learned, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): int(rank) for token, rank in trainer.get_mergeable_ranks()}
    possible = len(ranks) + len(SPECIAL_TOKENS)
    if possible < vocab_size:
        raise DataError(
            f"the text is too short for a vocabulary of {vocab_size}: it yields only {possible} "
            f"tokens. Train on more text, or pass --vocab-size {possible}"
        )
    return Tokenizer(ranks)
