"""Sampling parameters: their limits, and seeds."""

from __future__ import annotations

from typing import Any

import pytest

from archerchat.errors import UsageError
from archerchat.inference.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -5}, "--max-new-tokens is -5"),
        ({"num_samples": 0}, "--num-samples is 0"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0; it must be at least 0 and at most 100"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 1e-9}, "--temperature is 1e-09; it must be 0, or at least 0.001"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"top_p": 0.0}, "--top-p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"top_p": float("nan")}, "--top-p is nan"),
        ({"min_p": -0.1}, "--min-p is -0.1; it must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty is 0.0; it must be above 0"),
        (
            {"presence_penalty": 2.5},
            "--presence-penalty is 2.5; it must be at least -2 and at most",
        ),
        ({"frequency_penalty": -3.0}, "--frequency-penalty is -3.0"),
        ({"logit_bias": {4: 101.0}}, "--logit-bias of token 4 is 101.0; it must be at least -100"),
        ({"stop": ("a", "")}, "--stop has an empty string"),
        ({"logprobs": 21}, "--logprobs is 21; it must be at least 0 and at most 20"),
        ({"seed": -1}, "--seed is -1; it must be at least 0"),
        ({"seed": 2**63}, "--seed is 9223372036854775808"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**changes)


def test_what_a_command_has_no_use_for_is_refused() -> None:
    SamplingParams(top_k=5).refuse_changes("num_samples")
    with pytest.raises(UsageError, match="--num-samples 3 has no use here"):
        SamplingParams(num_samples=3).refuse_changes("seed", "num_samples")
