"""What a trainer gives, as JSON: metric values quickly, on every step, and whatever else it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from endlex.protocol import MAX_NAME_CHARS, MAX_STEP, EndlexError, check_name, encode_number

LARGEST_EXACT = 2**53
"""Whole numbers up to here are kept exactly; larger ones as floats, as every reader has them."""
DEEPEST = 50
"""Levels of nested values; what is deeper is kept as text."""

Refuse = Callable[[str, EndlexError], None]
"""Told the name, and the fault, of what cannot be recorded as it is."""


class MetricKeys(dict[str, str]):
    """A metric's name to the JSON of its key, `"train/loss":`; names are checked when first met."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__()
        self.refuse = refuse

    def __missing__(self, name: str) -> str:
        good = accepted_name(name, "metric name", self.refuse)
        self[name] = key = json.dumps(good, ensure_ascii=False) + ":"
        return key


def tidy_name(name: Any, default: str) -> str:
    """Make a name printable and short enough, as `protocol.check_name` wants it.

    A name that is too long ends with a hash of the whole, so that two of them stay apart.
    """
    text = "".join(c if c.isprintable() else "_" for c in str(name)).strip()
    if len(text) > MAX_NAME_CHARS:
        import hashlib

        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
        text = f"{text[: MAX_NAME_CHARS - 9]}~{digest}"
    return text or default


def accepted_name(name: Any, what: str, refuse: Refuse) -> str:
    """Return `name`, or the nearest good name after telling `refuse` what is wrong with it."""
    try:
        return check_name(name, what)
    except EndlexError as error:
        good = tidy_name(name, "unnamed")
        refuse(str(name), EndlexError(f"{error}; it is recorded as {good!r}"))
        return good


def encode_members(keys: MetricKeys, name: str, value: Any) -> list[str]:
    """The JSON members that a metric's value stands for: one, those of a mapping, or none."""
    if isinstance(value, Mapping):
        return [m for k, v in value.items() for m in encode_members(keys, f"{name}/{k}", v)]
    try:
        number = encode_number(as_number(value))
    except Exception:  # whatever some library's tensor raises
        keys.refuse(str(name), EndlexError(f"metric {name!r} is {value!r:.80}, which is no number"))
        return []
    return [keys[name] + (repr(number) if not isinstance(number, str) else f'"{number}"')]


def as_number(value: Any) -> float:
    """Return the number that `value` is, or raise: one of anything, but no text."""
    if type(value) is float or (type(value) is int and abs(value) <= LARGEST_EXACT):
        return value
    if isinstance(value, str | bytes):
        raise TypeError("text")
    item = getattr(value, "item", None)  # of an array or tensor of one element, in any shape
    return float(item() if callable(item) else value)


def checked_step(step: Any) -> int:
    """Return `step` as an `int`, if it is a whole number from 0 to `MAX_STEP`."""
    if type(step) is int and 0 <= step <= MAX_STEP:
        return step
    try:
        whole = int(step)
        if 0 <= whole <= MAX_STEP and whole == step and not isinstance(step, bool):
            return whole
    except Exception:  # as above
        pass
    raise EndlexError(f"step is {step!r:.80}; it must be a whole number from 0 to 2**62")


def as_list(given: str | Iterable[str]) -> list[str]:
    """Return several words, or the one that was given, as a list."""
    return [given] if isinstance(given, str) else list(given)


class RunConfig(dict[str, Any]):
    """A run's configuration: calls `changed` when a key is set."""

    def __init__(self, content: Mapping[str, Any], changed: Callable[[], None]) -> None:
        super().__init__(content)
        self._changed = changed

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._changed()

    def update(self, *others: Any, allow_val_change: bool = True, **more: Any) -> None:
        """Do what `dict.update` does; `allow_val_change`, known from wandb, makes no difference."""
        super().update(*(as_config(other) for other in others), **more)
        self._changed()

    def __ior__(self, other: Any) -> RunConfig:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is another one's

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Do what `dict.setdefault` does."""
        if key not in self:
            self[key] = default
        return self[key]


def as_config(given: Any) -> dict[Any, Any]:
    """Return a configuration in any usual shape as a dictionary: its own top level, unchanged."""
    content = _members(given)
    if content is not None:
        return content
    return {} if given is None else {"config": given}


def _members(value: Any) -> dict[Any, Any] | None:
    """What an object with named members holds: a mapping, a dataclass, a namespace; else None."""
    if isinstance(value, Mapping):
        return dict(value)
    fields = getattr(type(value), "__dataclass_fields__", None)  # importing dataclasses takes long
    if fields is not None:
        return {name: getattr(value, name) for name in fields}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value))
    return None


def _default(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    members = _members(value)
    return str(value) if members is None else members


ENCODER = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_default
)


def plain(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return `content` as JSON keeps it: non-finite floats and other objects as strings."""
    kept: dict[str, Any] = json.loads(to_json(content))
    return kept


def to_json(content: Mapping[Any, Any]) -> str:
    """Return `content` as JSON on one line, whatever it holds."""
    try:
        return ENCODER.encode(content)
    except (ValueError, TypeError, RecursionError):  # rare: only then is every value looked at
        return ENCODER.encode(_jsonable(content))


def _jsonable(value: Any, depth: int = 0) -> Any:
    if isinstance(value, float):
        return encode_number(value)
    if value is None or isinstance(value, str | int):
        return value
    if depth > DEEPEST:
        return f"{value!r:.200}"
    if isinstance(value, list | tuple):
        return [_jsonable(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {_key(key): _jsonable(item, depth + 1) for key, item in value.items()}
    return _jsonable(_default(value), depth + 1)


def _key(key: Any) -> str:
    return str(key.value if isinstance(key, Enum) else key)
