"""Tools in an answer: the calculator while it is written, its parts when it is read (SPEC 10).

    <|python_start|> 12*7 <|python_end|>   the model's
    <|output_start|> 84 <|output_end|>     forced, mask 0

    Request(ids, hook=partial(ToolUse, tokenizer, evaluate))   # calls the calculator

    reader = AnswerReader(tokenizer)                  # from tokens to text, as they come
    for token in tokens: show(reader.read(token))
    show(reader.finish())

    read_parts(tokenizer, ids)     # the content of an assistant's message
    spoken_text(tokenizer, ids)    # its words alone, for judging an answer

`ToolUse` evaluates what the model wrote between the first two tokens when it writes the second. An
expression without a value forces nothing, and the model continues by itself. Readers return whole
characters: the bytes of an incomplete one wait for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from archerchat.inference.sequence import Detokenizer
from archerchat.tasks.conversation import text_of
from archerchat.tokenizer.bpe import Tokenizer

Evaluate = Callable[[str], str | None]
"""From an expression to its value as text, or None; must not raise, nor take long."""
PartType = Literal["text", "python", "python_output"]


def answer_stop_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the tokens that end an answer (SPEC section 10)."""
    return tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id


class ToolUse:
    """The hook of one sequence, which follows its expressions."""

    def __init__(self, tokenizer: Tokenizer, evaluate: Evaluate) -> None:
        self._tokenizer, self._evaluate = tokenizer, evaluate
        self._start = tokenizer.special_id("<|python_start|>")
        self._end = tokenizer.special_id("<|python_end|>")
        self._expression: list[int] | None = None
        """Tokens since the start of an expression; None outside."""

    def __call__(self, token: int) -> Sequence[int]:
        """Return the value, between its two tokens, after an expression that has one."""
        if token == self._start:
            self._expression = []
        elif token == self._end and self._expression is not None:
            text, self._expression = self._tokenizer.decode(self._expression), None
            value = self._evaluate(text)
            if value is not None:
                special = self._tokenizer.special_id
                ids = self._tokenizer.encode(value)
                return [special("<|output_start|>"), *ids, special("<|output_end|>")]
        elif self._expression is not None:
            self._expression.append(token)
        return ()


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer's text."""

    type: PartType
    text: str
    starts: bool = False
    """Whether it is the first of its part."""


class AnswerReader:
    """Turn the tokens of one answer into text, split into parts.

    Special tokens that do not belong in an answer are read as text.

    Args:
        stops: texts that end the answer; nothing from there on is read.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        special = tokenizer.special_id
        self._begins: dict[int, PartType] = {
            special("<|python_start|>"): "python",
            special("<|output_start|>"): "python_output",
        }
        self._ends = {special("<|python_end|>"), special("<|output_end|>")}
        self._text = Detokenizer(tokenizer.decode, stops)
        self._type: PartType = "text"
        self._starts = True

    def read(self, token: int) -> list[Piece]:
        """Take the next token; return what can be shown now."""
        if token in self._begins or token in self._ends:
            pieces = self.finish()
            before = self._type
            self._type = self._begins.get(token, "text")
            # Two expressions in a row are two parts; an end where nothing was open is none.
            self._starts = self._starts or self._type != before or token in self._begins
            return pieces
        return self._pieces(self._text.read(token))

    def finish(self) -> list[Piece]:
        """Return the text that was held back."""
        return self._pieces(self._text.finish())

    def _pieces(self, text: str) -> list[Piece]:
        if not text:
            return []
        starts, self._starts = self._starts, False
        return [Piece(self._type, text, starts)]


def read_parts(
    tokenizer: Tokenizer, token_ids: Iterable[int], stops: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Return the parts of a whole answer, each `{"type": ..., "text": ...}`."""
    reader = AnswerReader(tokenizer, stops)
    pieces = [piece for token in token_ids for piece in reader.read(token)] + reader.finish()
    parts: list[dict[str, str]] = []
    for piece in pieces:
        if piece.starts:
            parts.append({"type": piece.type, "text": piece.text})
        else:
            parts[-1]["text"] += piece.text
    return parts


def spoken_text(tokenizer: Tokenizer, token_ids: Iterable[int], stops: Sequence[str] = ()) -> str:
    """Return an answer's text without expressions and results."""
    return text_of(read_parts(tokenizer, token_ids, stops))
