"""What a trainer gives, as JSON: metric values quickly, on every step, and whatever else it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from endlex.protocol import EndlexError, check_name, encode_number

LARGEST_EXACT = 2**53
"""Whole numbers up to here are kept exactly; larger ones as floats, as every reader has them."""

ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str)


class MetricKeys(dict[str, str]):
    """A metric's name to the JSON of its key, `"train/loss":`; names are checked when first met."""

    def __missing__(self, name: str) -> str:
        self[name] = key = json.dumps(check_name(name, "metric name"), ensure_ascii=False) + ":"
        return key


def encode_members(keys: MetricKeys, name: str, value: Any) -> list[str]:
    """The JSON members that a metric's value stands for: one, or those of a mapping.

    Raises:
        EndlexError: a name or value is not one.
    """
    if isinstance(value, Mapping):
        check_name(name, "metric name")
        return [m for k, v in value.items() for m in encode_members(keys, f"{name}/{k}", v)]
    number = encode_number(as_number(name, value))
    return [keys[name] + (repr(number) if not isinstance(number, str) else f'"{number}"')]


def as_number(name: str, value: Any) -> float:
    """Return the number that `value` is.

    Raises:
        EndlexError: it is none, naming the metric.
    """
    if type(value) is float:
        return value
    if type(value) is int and -LARGEST_EXACT <= value <= LARGEST_EXACT:
        return value
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise EndlexError(f"metric {name!r} is {value!r:.80}, which is not a number") from error


def checked_step(step: Any) -> int:
    """Return `step` if it is a whole number from 0, as an `int`.

    Raises:
        EndlexError: it is not.
    """
    if type(step) is int and step >= 0:
        return step
    try:
        whole = int(step.__index__())
    except (AttributeError, TypeError):
        whole = -1
    if whole < 0 or isinstance(step, bool):
        raise EndlexError(f"step is {step!r}; it must be a whole number from 0")
    return whole


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` as JSON keeps it: non-finite floats and other objects as strings."""
    kept: dict[str, Any] = json.loads(to_json(content))
    return kept


def to_json(content: Mapping[str, Any]) -> str:
    """Return `content` as JSON on one line, whatever it holds."""
    try:
        return ENCODER.encode(content)
    except ValueError:  # rare, so only then is every value looked at
        return ENCODER.encode(_finite(content))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return encode_number(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
