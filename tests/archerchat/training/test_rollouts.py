"""Rollouts: the order of questions, masks of forced tokens, advantages, batches, and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from archerchat.distributed import Ranks
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Completion
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.generated import ArithmeticTask
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.training.rollouts import (
    Rollout,
    RolloutLoader,
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
QUESTIONS = 3
BATCHES = 3
"""Twelve answers in micro-batches of five."""


class Lengths(ArithmeticTask):
    """Pays for the length of an answer, so that the samples of a group differ."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        return len(completion) / 8


def build_loader(engine: Engine, tokenizer: Tokenizer) -> RolloutLoader:
    return RolloutLoader(
        engine,
        tokenizer,
        Lengths("train", 20),
        questions=QUESTIONS,
        sampling=SAMPLING,
        rows=5,
        batches=BATCHES,
        ranks=Ranks(),
    )


@pytest.fixture
def loader(scripted: Callable[[Sequence[str]], Any]) -> RolloutLoader:
    """A loader whose model is of two minds about what to say."""
    speaker = scripted(SCRIPT)
    with torch.no_grad():
        speaker.model.unembedding.weight.mul_(0.4)
    return build_loader(Engine(speaker.model, max_batch=5), speaker.tokenizer)


def test_an_advantage_is_the_reward_less_the_groups_mean() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1.0, 1.0]) == [0.0, 0.0]


def test_each_epoch_asks_every_question_once_in_an_order_of_its_own() -> None:
    steps = [question_indices(9, 3, 1, step) for step in range(6)]
    epochs = [[i for step in steps[:3] for i in step], [i for step in steps[3:] for i in step]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(9))] * 2
    assert epochs[0] != epochs[1]
    assert question_indices(9, 3, 1, 4) == steps[4]
    assert question_indices(9, 3, 2, 4) != steps[4]
    # Each epoch's order is made once, however many of its questions a step asks.
    with patch("archerchat.training.rollouts.Random", wraps=Random) as made:
        asked = question_indices(9, 6, 1, 1)
    assert made.call_count == 2
    assert asked == [*epochs[0][6:], *epochs[1][:3]]
    # An epoch may end within a step.
    uneven = [i for step in range(7) for i in question_indices(7, 3, 1, step)]
    assert sorted(uneven) == sorted([*range(7)] * 3)


def test_forced_tokens_and_the_prompt_are_not_trained_on_but_the_end_is(
    scripted: Callable[[Sequence[str]], Any],
) -> None:
    speaker = scripted(SCRIPT)
    sampling = SamplingParams(24, temperature=0.001, top_k=1, num_samples=2)
    loader = build_loader(Engine(speaker.model), speaker.tokenizer)
    loader.sampling, loader.task = sampling, ArithmeticTask("train", 1)
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
    (batch,) = build_batches([replace(rollout, advantage=1.0)], 8, 1, 0)
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


def test_batches_hold_what_has_a_gradient() -> None:
    rollouts = [row(4, 2, 0.5), row(6, 3, -0.5), row(9, 5, 0.0)]
    rollouts += [row(5, 1, 0.25), row(4, 0, 0.25), row(3, 1, -0.5)]
    batches = build_batches(rollouts, 2, 3, 99)
    assert len(batches) == 3
    assert [batch.inputs.shape for batch in batches] == [(2, 5), (2, 3), (1, 1)]
    assert [batch.advantages.tolist() for batch in batches] == [[-0.5, 0.25], [0.5, -0.5], [0.0]]
    assert batches[0].inputs.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 99]]
    assert batches[0].targets.tolist() == [[-1, -1, 3, 4, 5], [-1, -1, -1, 4, -1]]
    assert (batches[2].targets == -1).all()


def test_a_step_without_a_gradient_still_has_its_batches() -> None:
    batches = build_batches([row(4, 0, 0.0)] * 4, 3, 2, 0)
    assert len(batches) == 2
    assert all((batch.targets == -1).all() for batch in batches)


def test_rollouts_follow_from_weights_seed_and_step_alone(loader: RolloutLoader) -> None:
    first, again, other = loader.roll_out(0), loader.roll_out(0), loader.roll_out(1)
    assert first == again
    assert first != other
    rows = QUESTIONS * SAMPLING.num_samples
    assert len(first) == rows
    answers = {rollout.token_ids for rollout in first}
    assert len(answers) > rows // 2
    loader.sampling = replace(SAMPLING, seed=2)
    assert loader.roll_out(0) != first


def test_groups_have_the_mean_taken_off(loader: RolloutLoader) -> None:
    rollouts = loader.roll_out(0)
    for start in range(0, len(rollouts), SAMPLING.num_samples):
        group = rollouts[start : start + SAMPLING.num_samples]
        mean = sum(rollout.reward for rollout in group) / len(group)
        assert [r.advantage for r in group] == [r.reward - mean for r in group]
        assert any(r.advantage for r in group)


def test_batches_are_those_of_an_uninterrupted_loader(loader: RolloutLoader) -> None:
    batches = [(next(loader), loader.scale) for _ in range(3 * BATCHES)]
    assert loader.rolls_out_next
    resumed = build_loader(loader.engine, loader.tokenizer)
    for _ in range(BATCHES):
        next(resumed)
    state = resumed.state_dict()
    resumed.close()
    fresh = build_loader(loader.engine, loader.tokenizer)
    fresh.load_state_dict(state)
    for expected, scale in batches[BATCHES:]:
        found = next(fresh)
        assert np.array_equal(found.inputs, expected.inputs)
        assert np.array_equal(found.targets, expected.targets)
        assert np.array_equal(found.advantages, expected.advantages)
        assert fresh.scale == scale


def test_the_average_counts_tokens_without_a_gradient_too(loader: RolloutLoader) -> None:
    loader.task = ArithmeticTask("train", 20)  # pays for none of the answers
    for _ in range(BATCHES):
        next(loader)
    chosen = sum(sum(rollout.mask) for rollout in loader.roll_out(0))
    assert chosen > 0
    assert loader.scale == BATCHES / chosen
    assert loader.learned_tokens == 0


def test_metrics_of_a_step(loader: RolloutLoader) -> None:
    assert loader.metrics == {}
    next(loader)
    rows = loader.roll_out(0)
    found = loader.metrics
    assert found["rollout/reward"] == pytest.approx(sum(r.reward for r in rows) / len(rows))
    assert found["rollout/learning_share"] == 1.0
    assert found["rollout/cut_share"] == sum(r.cut for r in rows) / len(rows)
    assert found["rollout/trained_tokens"] == sum(sum(r.mask) for r in rows)
    assert found["rollout/tokens"] == sum(len(r.token_ids) for r in rows)
    trained = sum(len(r.token_ids) for r in rows if r.advantage)
    assert (loader.tokens, loader.learned_tokens) == (found["rollout/tokens"], trained)
