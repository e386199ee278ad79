"""Figures of tasks, and ChatCORE."""

from __future__ import annotations

from dataclasses import replace

import pytest

from archerchat.evals.chat import ChatTaskResult, chatcore
from archerchat.evals.statistics import pass_at_k, pass_sizes, wilson_interval
from archerchat.tasks.registry import CHATCORE

LETTERS = ("ARC-Easy", "ARC-Challenge", "MMLU")


def result(name: str, right: tuple[int, ...], num_samples: int = 1) -> ChatTaskResult:
    kind, baseline = ("categorical", 0.25) if name in LETTERS else ("generative", 0.0)
    return ChatTaskResult(
        label=name,
        task_type=kind,
        examples=len(right),
        correct=sum(right),
        random_baseline=baseline,
        num_samples=num_samples,
        pass_at={k: pass_at_k(right, num_samples, k) for k in pass_sizes(num_samples)},
    )


def test_one_sample_a_problem() -> None:
    found = result("MMLU", (1, 0, 1, 1))
    assert found.accuracy == 0.75
    assert found.centred == pytest.approx(2 / 3)
    assert found.interval == wilson_interval(3, 4)
    assert found.to_json()["problems"] == 4
    assert "pass_at" not in found.to_json()
    assert found.to_json()["lenient_accuracy"] is None


def test_several_samples_a_problem() -> None:
    found = result("GSM8K", (0, 2, 4), 4)
    assert found.accuracy == 0.5
    # One of two samples of the middle problem is right in 5 of 6 pairs.
    assert found.pass_at == pytest.approx({1: 0.5, 2: (0 + 5 / 6 + 1) / 3, 4: 2 / 3})
    assert found.to_json()["pass_at"].keys() == {"1", "2", "4"}
    assert found.interval == wilson_interval(1.5, 3)


def test_the_lenient_share_leaves_the_comparable_figures_alone() -> None:
    found = replace(result("GSM8K", (0, 2, 4), 4), lenient=9)
    assert found.lenient_accuracy == found.to_json()["lenient_accuracy"] == 0.75
    assert found.accuracy == found.centred == 0.5


def test_chatcore_is_the_mean_of_the_six_centred_accuracies() -> None:
    results = [result(name, (1, 0, 0, 1)) for name in CHATCORE]
    found = chatcore(results)
    assert found is not None
    # Three tasks of 0.5 against 0.25, three against 0.
    assert found[0] == pytest.approx((3 * (0.25 / 0.75) + 3 * 0.5) / 6)
    low, high = found[1]
    assert low < found[0] < high


def test_chatcore_needs_every_task() -> None:
    assert chatcore([result(name, (1,)) for name in CHATCORE[1:]]) is None
