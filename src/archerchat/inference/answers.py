"""From an answer's tokens to what it says: text, expressions for the calculator, their results.

    reader = AnswerReader(tokenizer)
    for token in tokens: show(reader.read(token))
    show(reader.finish())

    read_parts(tokenizer, ids)       # the content of an assistant's message
    spoken_text(tokenizer, ids)      # its words alone, for judging an answer

Text comes in whole characters: bytes of one that is not complete wait for the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from archerchat.tokenizer.bpe import Tokenizer

PartType = Literal["text", "python", "python_output"]
MOST_PENDING = 4
"""Tokens that an unfinished character may take, at a byte each; more of them are not one."""


@dataclass(frozen=True)
class Piece:
    """Some of an answer."""

    type: PartType
    text: str
    starts: bool = False
    """Whether a part begins with it."""


class AnswerReader:
    """Follow one answer's tokens; special tokens that have no place in an answer read as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_id
        self._begins: dict[int, PartType] = {
            special("<|python_start|>"): "python",
            special("<|output_start|>"): "python_output",
        }
        self._ends = {special("<|python_end|>"), special("<|output_end|>")}
        self._type: PartType = "text"
        self._starts = True
        self._pending: list[int] = []

    def read(self, token: int) -> list[Piece]:
        """Take the next token; return what can be shown now."""
        if token in self._begins or token in self._ends:
            pieces = self.finish()
            before = self._type
            self._type = self._begins.get(token, "text")
            # Two expressions in a row are two parts; an end where nothing was open is none.
            self._starts = self._starts or self._type != before or token in self._begins
            return pieces
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < MOST_PENDING:
            return []
        return self._piece(text)

    def finish(self) -> list[Piece]:
        """Return what waits to be completed, as it is."""
        return self._piece(self._tokenizer.decode(self._pending)) if self._pending else []

    def _piece(self, text: str) -> list[Piece]:
        self._pending = []
        if not text:
            return []
        starts, self._starts = self._starts, False
        return [Piece(self._type, text, starts)]


def read_parts(tokenizer: Tokenizer, token_ids: Iterable[int]) -> list[dict[str, str]]:
    """Return the parts, `{"type": ..., "text": ...}`, of a whole answer."""
    reader = AnswerReader(tokenizer)
    pieces = [piece for token in token_ids for piece in reader.read(token)] + reader.finish()
    parts: list[dict[str, str]] = []
    for piece in pieces:
        if piece.starts:
            parts.append({"type": piece.type, "text": piece.text})
        else:
            parts[-1]["text"] += piece.text
    return parts


def spoken_text(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    """Return an answer's text without expressions and results."""
    parts = read_parts(tokenizer, token_ids)
    return "".join(each["text"] for each in parts if each["type"] == "text")
