"""Find the number that an answer ends on, `#### 42`, as GSM8K writes it (SPEC section 9)."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"#### *(-?\.?[0-9][0-9.,]*)")


def find_number(text: str) -> str | None:
    """Return the number after the first `####` that has one, commas removed; None without one."""
    match = _NUMBER.search(text)
    return match[1].replace(",", "").rstrip(".") if match else None


def same_number(expected: str, completion: str) -> bool:
    """Say whether `completion` ends on the number that `expected` ends on."""
    number = find_number(expected)
    return number is not None and number == find_number(completion)
