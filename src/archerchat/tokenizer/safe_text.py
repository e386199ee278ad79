"""Text that the tokenizer libraries would choke on, made harmless.

The regex engine under tiktoken and rustbpe keeps one stack entry for each character of a run of
whitespace and panics at a million of them (measured: 999,774 spaces). The panic is a
`BaseException`, so one such document would end a training run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import tiktoken

WHITESPACE_LIMIT = 400_000
_LONG_WHITESPACE = re.compile(rf"\s{{{WHITESPACE_LIMIT}}}")


def encode_text(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Encode `text` without special tokens, surviving any amount of whitespace.

    A run of `WHITESPACE_LIMIT` whitespace characters or more is encoded in parts; decoding gives
    the text back all the same.
    """
    if len(text) < WHITESPACE_LIMIT:
        return encoding.encode_ordinary(text)
    return [i for piece in cut_long_whitespace(text) for i in encoding.encode_ordinary(piece)]


def cut_long_whitespace(text: str) -> Iterator[str]:
    """Yield `text` in pieces without a run of 2 * `WHITESPACE_LIMIT` whitespace characters."""
    start = 0
    for run in _LONG_WHITESPACE.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def replace_surrogates(text: str) -> str:
    """Return `text` with lone surrogates as U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
