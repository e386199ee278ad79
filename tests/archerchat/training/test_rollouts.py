"""Rollouts: the order of questions, masks of forced tokens, advantages, batches, and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Completion
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.generated import ArithmeticTask
from archerchat.training.rollouts import (
    Rollout,
    RolloutLoader,
    RolloutSettings,
    build_batches,
    build_rollout,
    group_advantages,
    question_indices,
)

SCRIPT = (
    "<|assistant_start|>",
    *("<|python_start|>", "6*7", "<|python_end|>"),
    *("<|output_end|>", "####", "42", "<|assistant_end|>"),
)
SAMPLING = SamplingParams(24, top_k=50, num_samples=4, seed=1)
SETTINGS = RolloutSettings(3, SAMPLING, device_batch_size=5)


class Lengths(ArithmeticTask):
    """Pays for the length of an answer, so that the samples of a group differ."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        return len(completion) / 8


@pytest.fixture
def loader(scripted: Callable[[Sequence[str]], Any]) -> RolloutLoader:
    """A loader whose model is of two minds about what to say."""
    speaker = scripted(SCRIPT)
    with torch.no_grad():
        speaker.model.unembedding.weight.mul_(0.4)
    engine = Engine(speaker.model, max_batch=5)
    return RolloutLoader(engine, speaker.tokenizer, Lengths("train", 20), SETTINGS)


def test_an_advantage_is_the_reward_less_the_groups_mean() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1.0, 1.0]) == [0.0, 0.0]


def test_each_epoch_asks_every_question_once_in_an_order_of_its_own() -> None:
    steps = [question_indices(9, SETTINGS, step) for step in range(6)]
    epochs = [[i for step in steps[:3] for i in step], [i for step in steps[3:] for i in step]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(9))] * 2
    assert epochs[0] != epochs[1]
    assert question_indices(9, SETTINGS, 4) == steps[4]
    # An epoch may end within a step.
    uneven = [i for step in range(7) for i in question_indices(7, SETTINGS, step)]
    assert sorted(uneven) == sorted([*range(7)] * 3)


def test_forced_tokens_and_the_prompt_are_not_trained_on_but_the_end_is(
    scripted: Callable[[Sequence[str]], Any],
) -> None:
    speaker = scripted(SCRIPT)
    sampling = SamplingParams(24, temperature=0.001, top_k=1, num_samples=2)
    settings = RolloutSettings(1, sampling, device_batch_size=8)
    task = ArithmeticTask("train", 1)
    loader = RolloutLoader(Engine(speaker.model), speaker.tokenizer, task, settings)
    rollout = loader.roll_out(0)[0]
    chosen = speaker.ids(["<|python_start|>", "6*7", "<|python_end|>"])
    forced = speaker.ids(["<|output_start|>", "42", "<|output_end|>"])
    rest = speaker.ids(["####", "42", "<|assistant_end|>"])
    answer = (*chosen, *forced, *rest)
    prompt = len(rollout.token_ids) - len(answer)
    assert rollout.token_ids[prompt:] == answer
    assert rollout.mask == (
        *([0] * prompt + [1] * len(chosen)),
        *([0] * len(forced) + [1] * len(rest)),
    )
    assert rollout.token_ids[prompt - 1] == speaker.tokenizer.special_id("<|assistant_start|>")
    assert not rollout.cut
    # What is predicted at each position that has a target is a token that the model chose.
    batch = build_batches([Rollout(**(vars(rollout) | {"advantage": 1.0}))], settings, 0)[0]
    targets = batch.targets[0]
    assert targets[targets != -1].tolist() == [*chosen, *rest]
    assert batch.inputs[0].tolist() == list(rollout.token_ids[:-1])
    assert [n for n, target in enumerate(targets, 1) if target != -1] == [
        n for n, flag in enumerate(rollout.mask) if flag
    ]


def test_an_answer_that_was_cut_has_no_end_to_learn() -> None:
    completion = Completion([7, 8], [1, 1], "max_tokens")
    rollout = build_rollout([1, 2], completion, 0.0, -0.5)
    assert rollout.token_ids == (1, 2, 7, 8)
    assert rollout.mask == (0, 0, 1, 1)
    assert rollout.cut


def row(length: int, trained: int, advantage: float) -> Rollout:
    mask = (*[0] * (length - trained), *[1] * trained)
    return Rollout(tuple(range(length)), mask, 0.0, advantage, False)


def test_batches_hold_what_has_a_gradient_and_count_all_tokens() -> None:
    settings = RolloutSettings(2, SamplingParams(num_samples=3), device_batch_size=2)
    rollouts = [row(4, 2, 0.5), row(6, 3, -0.5), row(9, 5, 0.0)]
    rollouts += [row(5, 1, 0.25), row(4, 0, 0.25), row(3, 1, -0.5)]
    batches = build_batches(rollouts, settings, padding=99)
    assert len(batches) == settings.batches() == 3
    # Twelve trained tokens, those without a gradient too; three batches to average over.
    assert {batch.scale for batch in batches} == {3 / 12}
    assert [batch.inputs.shape for batch in batches] == [(2, 5), (2, 3), (1, 1)]
    assert [batch.advantages.tolist() for batch in batches] == [[-0.5, 0.25], [0.5, -0.5], [0.0]]
    assert batches[0].inputs.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 99]]
    assert batches[0].targets.tolist() == [[-1, -1, 3, 4, 5], [-1, -1, -1, 4, -1]]
    assert (batches[2].targets == -1).all()


def test_a_step_without_a_gradient_still_has_its_batches() -> None:
    settings = RolloutSettings(2, SamplingParams(num_samples=2), device_batch_size=3)
    batches = build_batches([row(4, 0, 0.0)] * 4, settings, 0)
    assert len(batches) == 2
    assert all((batch.targets == -1).all() for batch in batches)


def test_rollouts_follow_from_weights_seed_and_step_alone(loader: RolloutLoader) -> None:
    first, again, other = loader.roll_out(0), loader.roll_out(0), loader.roll_out(1)
    assert first == again
    assert first != other
    assert len(first) == SETTINGS.rows
    answers = {rollout.token_ids for rollout in first}
    assert len(answers) > SETTINGS.rows // 2
    loader.settings = replace(SETTINGS, sampling=replace(SAMPLING, seed=2))
    assert loader.roll_out(0) != first


def test_groups_have_the_mean_taken_off(loader: RolloutLoader) -> None:
    rollouts = loader.roll_out(0)
    for start in range(0, len(rollouts), SETTINGS.sampling.num_samples):
        group = rollouts[start : start + SETTINGS.sampling.num_samples]
        mean = sum(rollout.reward for rollout in group) / len(group)
        assert [r.advantage for r in group] == [r.reward - mean for r in group]
        assert any(r.advantage for r in group)


def test_batches_are_those_of_an_uninterrupted_loader(
    loader: RolloutLoader, scripted: Callable[[Sequence[str]], Any]
) -> None:
    size = SETTINGS.batches()
    batches = [next(loader) for _ in range(3 * size)]
    assert loader.rolls_out_next
    resumed = RolloutLoader(loader.engine, loader.tokenizer, loader.task, SETTINGS)
    for _ in range(size):
        next(resumed)
    state = resumed.state_dict()
    resumed.close()
    fresh = RolloutLoader(loader.engine, loader.tokenizer, loader.task, SETTINGS)
    fresh.load_state_dict(state)
    for expected in batches[size:]:
        found = next(fresh)
        assert np.array_equal(found.inputs, expected.inputs)
        assert np.array_equal(found.targets, expected.targets)
        assert np.array_equal(found.advantages, expected.advantages)
        assert found.scale == expected.scale


def test_metrics_of_a_step(loader: RolloutLoader) -> None:
    assert loader.metrics() == {}
    next(loader)
    rows = loader.roll_out(0)
    found = loader.metrics()
    assert found["rollout/reward"] == pytest.approx(sum(r.reward for r in rows) / len(rows))
    assert found["rollout/learning_share"] == 1.0
    assert found["rollout/cut_share"] == sum(r.cut for r in rows) / len(rows)
    assert found["rollout/trained_tokens"] == sum(r.trained for r in rows)
    assert found["rollout/tokens"] == sum(len(r.token_ids) for r in rows)
    trained = sum(len(r.token_ids) for r in rows if r.advantage)
    assert loader.amounts() == (found["rollout/tokens"], trained)
