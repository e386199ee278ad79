"""Tools in an answer: the calculator while it is written, its parts when it is read (SPEC 10).

    <|python_start|> 12*7 <|python_end|>   the model's
    <|output_start|> 84 <|output_end|>     forced, mask 0

    Request(ids, hook=partial(ToolUse, tokenizer, evaluate))

`ToolUse` evaluates what the model wrote between the first two tokens when it writes the second. An
expression without a value forces nothing, and the model continues by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from archerchat.inference.sequence import Detokenizer
from archerchat.tasks.conversation import part, text_of
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import encode_answer

Evaluate = Callable[[str], str | None]
"""From an expression to its value as text, or None; must not raise, nor take long."""
PartType = Literal["text", "python", "python_output"]
FOLLOWING: dict[str, PartType] = {
    "<|python_start|>": "python",
    "<|output_start|>": "python_output",
    "<|python_end|>": "text",
    "<|output_end|>": "text",
}
"""What a special token begins."""


class ToolUse:
    """The hook of one sequence, which follows its expressions."""

    def __init__(self, tokenizer: Tokenizer, evaluate: Evaluate) -> None:
        self._tokenizer, self._evaluate = tokenizer, evaluate
        self._start = tokenizer.special_id("<|python_start|>")
        self._end = tokenizer.special_id("<|python_end|>")
        self._expression: list[int] | None = None  # tokens since its start; None outside

    def __call__(self, token: int) -> Sequence[int]:
        """Return the value, between its two tokens, after an expression that has one."""
        if token == self._start:
            self._expression = []
        elif token == self._end and self._expression is not None:
            text, self._expression = self._tokenizer.decode(self._expression), None
            if (value := self._evaluate(text)) is not None:
                return encode_answer(self._tokenizer, [part("python_output", value)])
        elif self._expression is not None:
            self._expression.append(token)
        return ()


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer's text."""

    type: PartType
    text: str
    starts: bool = False
    """Whether this piece is the first of its part."""


class AnswerReader:
    """Turn the tokens of one answer into text, split into parts, up to one of the stop strings.

    Special tokens that do not belong in an answer are read as text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._types = {tokenizer.special_id(name): kind for name, kind in FOLLOWING.items()}
        self._text = Detokenizer(tokenizer.decode, stops)
        self._type: PartType = "text"
        self._starts = True

    def read(self, token: int) -> list[Piece]:
        """Take the next token; return what can be shown now."""
        found = self._types.get(token)
        if found is None:
            return self._pieces(self._text.read(token))
        pieces = self.finish()
        # Two expressions in a row are two parts; an end where nothing was open is none.
        self._starts = self._starts or found != "text" or found != self._type
        self._type = found
        return pieces

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
    """Return the parts of a whole answer, as `tasks.conversation` has them."""
    reader = AnswerReader(tokenizer, stops)
    parts: list[dict[str, str]] = []
    for piece in [*chain.from_iterable(map(reader.read, token_ids)), *reader.finish()]:
        if piece.starts:
            parts.append(part(piece.type, ""))
        parts[-1]["text"] += piece.text
    return parts


def spoken_text(tokenizer: Tokenizer, token_ids: Iterable[int], stops: Sequence[str] = ()) -> str:
    """Return an answer's text without expressions and results."""
    return text_of(read_parts(tokenizer, token_ids, stops))
