"""The words that spelling tasks ask about: a list that is part of the package.

They were collected from the prose in Python's standard library, so that no download is needed,
and are kept as a file, so that every machine and every Python asks the same questions. To collect
them anew from a corpus that `archerchat data build stdlib` made:

    documents = iter_documents(list_shards(home.data_dir("stdlib")))
    text = "".join(f"{word}\\n" for word in collect_words(documents))

Words for training and for the test are told apart by a hash of the word itself, which does not
depend on the list.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from archerchat.errors import UsageError

_WORD = re.compile(r"(?<=[ \n(])(?=[a-z]*[aeiouy])[a-z]{3,15}(?=[ \n,.;:)])")
TEST_SHARE = 10
"""One in so many belongs to the test."""


def collect_words(documents: Iterable[str], min_documents: int = 3) -> list[str]:
    """Return the lower-case words of 3 to 15 letters that stand free in enough documents.

    What has no vowel is an abbreviation, and left out.
    """
    counts = Counter(word for text in documents for word in set(_WORD.findall(text)))
    return sorted(word for word, count in counts.items() if count >= min_documents)


@cache
def load_words(split: str) -> tuple[str, ...]:
    """Return the words of `train` or `test`, in alphabetical order.

    Raises:
        UsageError: there is no such split.
    """
    check_split(split)
    text = files("archerchat.tasks").joinpath("words.txt").read_text(encoding="ascii")
    return tuple(word for word in text.split() if split_of(word) == split)


def check_split(split: str) -> None:
    """Raise UsageError unless generated tasks have this split."""
    if split not in ("train", "test"):
        raise UsageError(f"there is no split {split!r} of a generated task: use train or test")


def split_of(text: str) -> str:
    """Return the split that a word, or any other question, belongs to."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8]) % TEST_SHARE == 0 else "train"
