"""The words of a search, as SQL conditions with the values apart.

    tag:x  project:x  group:x  status:x     the run has it
    val/bpb<0.9                             a metric's last value compares so: < <= > >= = !=
    anything else                           in the name, project, notes, group, host, tags or id

All of them must hold; "quotes" keep words together.
"""

from __future__ import annotations

import re
from typing import Any

from endlex.server.errors import ApiError

Condition = tuple[str, list[Any]]

WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
COMPARISON = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)(.*)", re.DOTALL)
MOST_WORDS = 20

FIELDS = {
    "project": "run.project = ? COLLATE NOCASE",
    "group": "run.group_name = ? COLLATE NOCASE",
    "status": "run.status = ? COLLATE NOCASE",
    "tag": "EXISTS (SELECT 1 FROM json_each(run.tags) WHERE value = ? COLLATE NOCASE)",
}
TEXT_COLUMNS = ("name", "project", "notes", "group_name", "host", "tags", "id")


def parse_search(text: str) -> list[Condition]:
    """Return the conditions of a search.

    Raises:
        ApiError: 422, a metric is compared with something that is no number.
    """
    words = WORD.findall(text)
    if len(words) > MOST_WORDS:
        raise ApiError(422, f"the search has {len(words)} words; at most {MOST_WORDS}")
    return [_parse_word(word) for word in words]


def _parse_word(word: str) -> Condition:
    plain = word.replace('"', "")
    field, colon, value = plain.partition(":")
    if colon and field.lower() in FIELDS and value:
        return FIELDS[field.lower()], [value]
    match = COMPARISON.fullmatch(plain)
    if match and not word.startswith('"'):
        return _compare(*match.groups())
    escaped = re.sub(r"([\\%_])", r"\\\1", plain)
    anywhere = " OR ".join(f"run.{column} LIKE ? ESCAPE '\\'" for column in TEXT_COLUMNS)
    return f"({anywhere})", [f"%{escaped}%"] * len(TEXT_COLUMNS)


def _compare(metric: str, operator: str, number: str) -> Condition:
    try:
        value = float(number)
    except ValueError as error:
        raise ApiError(
            422, f"{number!r} is not a number: compare a metric like val/bpb<0.9"
        ) from error
    condition = (
        "EXISTS (SELECT 1 FROM metric WHERE metric.run = run.pk AND metric.name = ? "
        f"AND metric.last {operator} ?)"
    )
    return condition, [metric, value]
