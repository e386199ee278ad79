"""Configurations whose limits live in their types, and the flags that many commands share.

    @dataclass(frozen=True)
    class SampleConfig(Config):
        num_samples: PositiveInt = 1

A `Config` checks its fields when it is built, so a value out of range is refused in one way
wherever it comes from: the command line, a saved run, or Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

from archerchat.errors import UsageError

DeviceName = Literal["cuda", "mps", "cpu"]
DtypeName = Literal["bfloat16", "float32", "float16"]
StateDtypeName = Literal["float32", "bfloat16"]
AttentionName = Literal["sdpa", "matmul", "flex", "varlen", "flash"]
StageName = Literal["base", "sft", "rl"]
STAGES: tuple[StageName, ...] = get_args(StageName)
T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """The values that a number may take, as part of its type: `Annotated[int, Limit(1)]`."""

    minimum: float = -math.inf
    maximum: float = math.inf
    exclusive: bool = False
    """Whether `minimum` itself is refused."""

    def accepts(self, value: float) -> bool:
        """Whether `value` is finite and within the bounds."""
        above = value > self.minimum if self.exclusive else value >= self.minimum
        return math.isfinite(value) and above and value <= self.maximum

    def __str__(self) -> str:
        bounds = []
        if math.isfinite(self.minimum):
            bounds.append(f"{'above' if self.exclusive else 'at least'} {self.minimum:g}")
        if math.isfinite(self.maximum):
            largest = "2**63 - 1" if self.maximum == MAX_SEED else f"{self.maximum:g}"
            bounds.append(f"at most {largest}")
        return " and ".join(bounds) or "finite"


FLOAT = "$float"
"""The key of the object that stands for a non-finite float."""
SHORT_LISTS = 4
"""Entries of two lists that a message about their difference shows in full."""
SHORT_VALUE = 40
"""Characters of a text that a message about a difference shows, if the texts differ in them."""
MAX_SEED = 2**63 - 1
PositiveInt = Annotated[int, Limit(1)]
NonNegativeInt = Annotated[int, Limit(0)]
Seed = Annotated[int, Limit(0, MAX_SEED)]
PositiveFloat = Annotated[float, Limit(0, exclusive=True)]
NonNegativeFloat = Annotated[float, Limit(0)]
Fraction = Annotated[float, Limit(0, 1)]
Share = Annotated[float, Limit(0, 1, exclusive=True)]


@dataclass(frozen=True)
class Config:
    """Base of a command's configuration or of a group of flags in it.

    Raises:
        UsageError: a field is outside its limit; the message names its flag.
    """

    def __post_init__(self) -> None:
        for name, limit in _limits(cast(Any, type(self))):
            value = getattr(self, name)
            if isinstance(value, int | float) and not limit.accepts(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {limit}")


@cache
def _limits(kind: Any) -> list[tuple[str, Limit]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(name, limit) for name, hint in hints.items() for limit in _iter_limits(hint)]


def _iter_limits(hint: Any) -> Iterator[Limit]:
    """Yield the limits of a type; those in a union such as `PositiveInt | None` too."""
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Limit))
    for argument in get_args(hint):
        yield from _iter_limits(argument)


@dataclass(frozen=True)
class DeviceConfig(Config):
    """Device options."""

    device: DeviceName | None = None
    """Device to run on. Defaults to the best one of this machine."""
    dtype: DtypeName | None = None
    """Compute dtype. Defaults to the fastest one that the device multiplies well."""


def as_json(config: Any) -> Any:
    """Return a configuration as JSON's types; paths become text."""
    return json.loads(json.dumps(asdict(config), default=str))


def from_json(kind: type[T], saved: Mapping[str, Any]) -> T:
    """Build a configuration from what `as_json` returned; missing names get their defaults."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(cast(Any, kind)) if field.name in saved]
    return kind(**{name: _from_json(hints[name], saved[name]) for name in names})


def _from_json(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return from_json(cast(Any, hint), value)
    if isinstance(value, list):
        return tuple(_from_json(get_args(hint)[0], item) for item in value)
    if isinstance(value, dict):  # JSON turned the token ids of --logit-bias into text
        return {int(key): item for key, item in value.items()}
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line for each value that differs, nested ones by their dotted names.

    Both sides are compared as JSON would hold them, so a tuple equals a list. Of long lists, such
    as those of shards, only the first difference is shown.
    """
    before, now = (dict(_flatten(json.loads(json.dumps(encode_json(c))))) for c in (saved, current))
    return [
        _difference(name, before, now)
        for name in sorted(before.keys() | now.keys())
        if name not in before or name not in now or before[name] != now[name]
    ]


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    lists = [side[name] for side in (before, now) if isinstance(side.get(name), list)]
    if len(lists) < 2 or sum(map(len, lists)) <= SHORT_LISTS:
        shown, other = _shown(before, name), _shown(now, name)
        if shown == other:  # they differ in what was cut
            shown, other = (repr(decode_json(side[name])) for side in (before, now))
        return f"{name}: {shown} saved, {other} now"
    pairs = [pair for pair in zip_longest(*lists) if pair[0] != pair[1]]
    first, second = ("none" if entry is None else repr(decode_json(entry)) for entry in pairs[0])
    return (
        f"{name}: {len(lists[0])} entries saved, {len(lists[1])} now; {len(pairs)} differ, the "
        f"first: {first} saved, {second} now"
    )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value and FLOAT not in value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(config: Mapping[str, Any], name: str) -> str:
    if name not in config:
        return "absent"
    value = decode_json(config[name])
    if isinstance(value, str) and len(value) > SHORT_VALUE:
        value = f"{value[:SHORT_VALUE]}..."
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def encode_json(value: Any) -> Any:
    """Return `value` with each non-finite float as an object that JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        return {key: encode_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_json(item) for item in value]
    return value


def decode_json(value: Any) -> Any:
    """Undo `encode_json`."""
    if isinstance(value, dict):
        if set(value) == {FLOAT}:
            return float(value[FLOAT])
        return {key: decode_json(item) for key, item in value.items()}
    return [decode_json(item) for item in value] if isinstance(value, list) else value
