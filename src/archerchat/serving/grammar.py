"""Answers in JSON: which tokens may come next under a schema, as llguidance says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from archerchat.errors import UsageError
from archerchat.inference.sequence import TokenMask
from archerchat.tokenizer.bpe import Tokenizer

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One layout, since a small model given the choice may write spaces without end."""


@lru_cache(maxsize=4)
def _read_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Return the tables that masks are computed from; they take a moment."""
    end = tokenizer.special_id("<|assistant_end|>")
    return lltokenizer_from_encoding(tokenizer.encoding, eos_token=end)


def build_mask(tokenizer: Tokenizer, schema: Mapping[str, Any]) -> Callable[[], TokenMask]:
    """Return what builds the masks of answers in JSON that fits `schema`.

    Raises:
        UsageError: no value fits the schema, or it is none that llguidance can keep to.
    """
    vocabulary = _read_vocabulary(tokenizer)
    grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=LAYOUT)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if failed:
        raise UsageError(messages[0])
    start = LLMatcher(vocabulary, grammar, log_level=0)
    start.compute_bitmask()
    if start.is_stopped():
        raise UsageError("no value fits it")
    return lambda: _Mask(LLMatcher(vocabulary, grammar, log_level=0))


class _Mask:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher, self._consumed = matcher, 0

    def __call__(self, said: Sequence[int]) -> Sequence[int]:
        self._matcher.consume_tokens(list(said[self._consumed :]))
        self._consumed = len(said)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids: list[int] = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        return ids
