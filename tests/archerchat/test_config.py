"""Limits live in the types of a configuration's fields."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from archerchat.cli import parse
from archerchat.config import Config, PositiveFloat, PositiveInt, Seed, Share, as_json, from_json
from archerchat.errors import UsageError


@dataclass(frozen=True)
class Example(Config):
    """An example."""

    num_rows: PositiveInt | None = None
    seed: Seed = 0
    temperature: PositiveFloat = 1.0
    top_p: Share = 1.0
    anything: int = -5


def test_values_within_the_limits_are_taken() -> None:
    Example(num_rows=1, seed=2**63 - 1, temperature=1e-9, top_p=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_rows": 0}, "--num-rows is 0; it must be at least 1"),
        ({"seed": 2**63}, f"--seed is {2**63}; it must be at least 0 and at most 2**63 - 1"),
        ({"seed": -1}, "--seed is -1; it must be at least 0 and at most 2**63 - 1"),
        ({"temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
        ({"temperature": math.nan}, "--temperature is nan; it must be above 0"),
        ({"temperature": math.inf}, "--temperature is inf; it must be above 0"),
        ({"top_p": 1.01}, "--top-p is 1.01; it must be above 0 and at most 1"),
    ],
)
def test_values_outside_are_refused_by_the_name_of_their_flag(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        Example(**values)  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("pretrain --depth 4", "--matrix-lr 0.1 --tags a b --save-every 3"),
        ("sft", "--jsonl a.jsonl b --identity me.jsonl --num-epochs 3"),
        ("rl", "--num-samples 4 --logit-bias 3 -1.5 --data-dir d"),
    ],
)
def test_a_configuration_comes_back_from_json(command: str, flags: str) -> None:
    given = parse([*command.split(), *flags.split()]).config
    saved = json.loads(json.dumps(as_json(given) | {"a flag of before": 1}))
    assert from_json(type(given), saved) == given
