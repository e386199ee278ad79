"""The search language of runs: one grammar for the dashboard's box, the API and `endlex ls`.

`parse_search` turns a text into terms, which the server makes SQL of and `matches` applies to runs
at hand. `HELP` shows the grammar where people type.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Literal

from endlex.protocol import UsageError

HELP = """\
d12              in the name, project, group, notes, host, tags or id
tag:baseline     also project: group: status: name: host: id:
val/bpb < 0.9    a metric's last value: < <= > >= = != ; min:val/bpb and max:val/bpb too
depth >= 12      a key of the configuration; config.depth where a metric has the same name
optimizer = muon a text of the configuration
-tag:old         not
d12 OR d20       one of the two; all other words must hold
"two words"      taken as they are; * outside quotes is any text: name:d1*"""

FIELDS = ("project", "group", "status", "tag", "name", "host", "id")
ANYWHERE = ("name", "project", "notes", "group", "host", "tag", "id")
"""The fields in which a bare word is searched."""
MOST_TERMS = 50
KEYS_OF_RUN = {"tag": "tags", "id": "run"}
CONFIG = "config."
COMPARISONS: dict[str, Callable[[Any, Any], Any]]
COMPARISONS = {"<": lt, "<=": le, ">": gt, ">=": ge, "=": eq, "!=": ne}

WORD = r'(?:[^\s"<>=!]|"[^"]*"?|!(?!=))+'
OPERATOR = "[<>]=?|!?="
TERM = re.compile(  # an OR between two terms is compared with nothing
    rf"(?P<word>{WORD})(?:(?<!\sOR)\s*(?P<operator>{OPERATOR})\s*(?P<value>{WORD})?)?|{OPERATOR}"
)

Kind = Literal["field", "last", "min", "max", "config", "any"]


class SearchError(UsageError):
    """The search is not one; the message says what is wrong with it."""


@dataclass(frozen=True)
class Text:
    """A text to look for: what stands between its `*`, each of which is any text."""

    parts: tuple[str, ...]

    def __str__(self) -> str:
        return "*".join(self.parts)

    def like(self, anywhere: bool = False) -> str:
        r"""Return it as a pattern for SQL: `LIKE ? ESCAPE '\'`."""
        pattern = "%".join(re.sub(r"([\\%_])", r"\\\1", part) for part in self.parts)
        return f"%{pattern}%" if anywhere else pattern

    def matches(self, text: object, anywhere: bool = False) -> bool:
        """Whether `text` equals the pattern, or contains it; case does not matter."""
        pattern = re.compile(".*".join(map(re.escape, self.parts)), re.IGNORECASE | re.DOTALL)
        found = pattern.search if anywhere else pattern.fullmatch
        return text is not None and found(str(text)) is not None


@dataclass(frozen=True)
class Key:
    """What is compared, sorted by, or shown in a column: a field, a metric or a configuration key.

    `any` is a metric's last value or, where a run has none of that name, a configuration key.
    """

    kind: Kind
    name: Text

    def __str__(self) -> str:
        prefix = {"min": "min:", "max": "max:", "last": "last:", "config": CONFIG}
        return f"{prefix.get(self.kind, '')}{self.name}"


@dataclass(frozen=True)
class Term:
    """One condition; `key` is None for a bare word, and `number` what `text` says if it is one."""

    negated: bool
    key: Key | None
    operator: str
    text: Text
    number: float | None = None


Query = tuple[tuple[Term, ...], ...]
"""All of these must hold, of each at least one."""


def parse_key(text: str, literal: bool = False) -> Key:
    """Return what a name stands for: `status`, `val/bpb`, `min:val/bpb`, `config.lr`."""
    prefix, colon, rest = text.partition(":")
    if colon and rest and prefix in ("min", "max", "last"):
        return Key(prefix, _text(rest, literal))  # type: ignore[arg-type]
    if text.startswith(CONFIG) and text != CONFIG:
        return Key("config", _text(text.removeprefix(CONFIG), literal))
    return Key("field" if text in FIELDS else "any", _text(text, literal))


def parse_search(text: str) -> Query:
    """Return the terms of a search.

    It is a `SearchError` that an operator lacks a side, a text is compared by size, or there are
    too many terms.
    """
    terms = list(TERM.finditer(text))
    groups: list[tuple[Term, ...]] = []
    joined = False
    for found in terms:
        if found.group() == "OR" and groups and found is not terms[-1]:
            joined = True
            continue
        earlier = groups.pop() if joined else ()
        groups.append((*earlier, _parse_term(found)))
        joined = False
    if sum(map(len, groups)) > MOST_TERMS:
        raise SearchError(f"the search has more than {MOST_TERMS} words")
    return tuple(groups)


def _parse_term(found: re.Match[str]) -> Term:
    word, operator, value = found.group("word", "operator", "value")
    if word is None:
        raise SearchError(f"{found.group()!r} has no name before it: compare like val/bpb < 0.9")
    negated = len(word) > 1 and word.startswith("-")
    word = word[1:] if negated else word
    plain, literal = word.replace('"', ""), word.startswith('"')
    if operator:
        if value is None:
            raise SearchError(f"{plain!r} {operator} lacks a value: compare like val/bpb < 0.9")
        key, compared = parse_key(plain, literal), _unquote(value)
        number = parse_number(str(compared))
        if operator not in ("=", "!=") and (number is None or key.kind == "field"):
            raise SearchError(
                f"{str(key)!r} {operator} {str(compared)!r}: only numbers of metrics and of the "
                "configuration are larger or smaller; compare like val/bpb < 0.9"
            )
        return Term(negated, key, operator, compared, number)
    field, _, wanted = word.partition(":")
    if wanted and field.lower() in FIELDS:
        return Term(negated, Key("field", Text((field.lower(),))), "=", _unquote(wanted))
    return Term(negated, None, "=", _text(plain, literal))


def _text(text: str, literal: bool) -> Text:
    return Text((text,) if literal else tuple(text.split("*")))


def _unquote(word: str) -> Text:
    return _text(word.replace('"', ""), word.startswith('"'))


def parse_number(text: str) -> float | None:
    """Return the finite number that a text says, if any."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # those are words in JSON


def check_names(keys: Iterable[Key], metrics: Iterable[str], config: Iterable[str]) -> None:
    """Raise a `SearchError`, with the nearest names, where no run has a metric or key."""
    metrics, config = list(metrics), list(config)
    known = {"config": config, "any": [*metrics, *config]}
    for key in keys:
        there = known.get(key.kind, metrics)
        if any(key.name.matches(name) for name in there):
            continue
        name, by_case = str(key.name).lower(), {one.lower(): one for one in there}
        near = difflib.get_close_matches(name, by_case, 3, 0.6)
        near = near or [one for one in by_case if name in one.split("/")[-1]][:3]
        said = f"; did you mean {' or '.join(by_case[one] for one in near)}?" if near else ""
        raise SearchError(f"no run has {str(key)!r}{said}")


def matches(query: Query, run: Mapping[str, Any]) -> bool:
    """Whether a search finds a run, which is given as the API answers it."""
    return all(any(_holds(term, run) != term.negated for term in group) for group in query)


def _holds(term: Term, run: Mapping[str, Any]) -> bool:
    if term.key is not None and term.key.kind != "field":
        return any(compare(value, term) for value in values_of(term.key, run))
    fields = ANYWHERE if term.key is None else (str(term.key.name),)
    values = [run.get(KEYS_OF_RUN.get(field, field)) for field in fields]
    texts = [text for v in values for text in (v if isinstance(v, list) else [v])]
    found = any(term.text.matches(text, anywhere=term.key is None) for text in texts)
    return found != (term.operator == "!=")


def compare(value: Any, term: Term) -> bool:
    """Whether a metric's or the configuration's value is as a term says."""
    number = parse_number(value) if isinstance(value, str) else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if is_number and term.number is not None:
        return bool(COMPARISONS[term.operator](number, term.number))
    if term.operator not in ("=", "!="):
        return False
    return term.text.matches(str(value)) != (term.operator == "!=")  # true = True, and None


def values_of(key: Key, run: Mapping[str, Any]) -> list[Any]:
    """Return the values of a metric or configuration key: none, one, or several for a pattern."""
    found: list[Any] = []
    if key.kind in ("min", "max"):
        found = [m[key.kind] for m in run.get("metrics", ()) if key.name.matches(m["name"])]
    elif key.kind != "config":
        found = [v for name, v in run.get("summary", {}).items() if key.name.matches(name)]
    if found or key.kind not in ("config", "any"):
        return [value for value in found if value is not None]
    return [v for name, v in flatten(run.get("config", {})).items() if key.name.matches(name)]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's leaves by their keys, joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
