"""The calculator in the middle of an answer (SPEC section 10), one state machine a row.

    <|python_start|> 12*7 <|python_end|>   the model's
    <|output_start|> 84 <|output_end|>     forced, mask 0

What the model wrote between the first two tokens is evaluated when it writes the second; an
expression without a value forces nothing, and the model goes on by itself.

    Request(ids, 256, hook=ToolUse(tokenizer, evaluate))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from archerchat.inference.requests import RowHook
from archerchat.tokenizer.bpe import Tokenizer

Evaluate = Callable[[str], str | None]
"""From an expression to its value as text, or None; must not raise, nor take long."""


@dataclass(frozen=True)
class ToolUse:
    """Make the hook of a row: pass it as `Request.hook`."""

    tokenizer: Tokenizer
    evaluate: Evaluate

    def __call__(self) -> RowHook:
        return ToolUseHook(self.tokenizer, self.evaluate)


class ToolUseHook:
    """Follow one row's expressions."""

    def __init__(self, tokenizer: Tokenizer, evaluate: Evaluate) -> None:
        self._tokenizer, self._evaluate = tokenizer, evaluate
        self._start = tokenizer.special_id("<|python_start|>")
        self._end = tokenizer.special_id("<|python_end|>")
        self._expression: list[int] | None = None
        """Tokens since the last start; None outside of an expression."""

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
