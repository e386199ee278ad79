"""Rollouts as batches: questions in order, answers by the engine, rewards, advantages, rows.

A step's rollouts follow from the weights, the seed and the step alone: the order of questions is a
shuffle an epoch, and a row's draws come from seed, step, question and sample. A loader's whole
state is therefore the number of steps that it rolled out, and a resumed run asks what the
uninterrupted one would have asked.

    loader = RolloutLoader(engine, tokenizer, task, settings)
    batch = next(loader)        # of a step's `settings.batches`, the first rolls out
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from archerchat.errors import CheckpointError
from archerchat.evals.chat.generative import Sampling, build_request, render_question
from archerchat.inference.answers import spoken_text
from archerchat.inference.draws import row_seed
from archerchat.inference.engine import Engine
from archerchat.inference.requests import Completion
from archerchat.model.loss import IGNORED
from archerchat.tasks.base import Task
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class RolloutSettings:
    """How a step's rollouts are made; all of it decides the weights."""

    questions_per_step: int = 16
    num_samples: int = 16
    """Of each question: a group."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    device_batch_size: int = 8
    """Rows in a micro-batch."""
    seed: int = 42

    @property
    def rows(self) -> int:
        """Rollouts in a step."""
        return self.questions_per_step * self.num_samples

    @property
    def batches(self) -> int:
        """Micro-batches in a step."""
        return -(-self.rows // self.device_batch_size)


@dataclass(frozen=True)
class Rollout:
    """One sample of a question, with what it is worth."""

    token_ids: tuple[int, ...]
    """Prompt, answer and, where the model ended it, the token that did."""
    mask: tuple[int, ...]
    """1 for the tokens that the model chose; 0 for the prompt and the results of tools."""
    reward: float
    advantage: float
    cut: bool
    """Whether the limit of tokens or the context ended it."""

    @property
    def trained(self) -> int:
        """Tokens to learn from."""
        return sum(self.mask)


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Rows padded on the right."""

    inputs: NDArray[np.int64]
    """(B, T)"""
    targets: NDArray[np.int64]
    """(B, T); -1 where nothing is trained."""
    advantages: NDArray[np.float32]
    """(B,)"""
    scale: float
    """One over the trained tokens of the whole step, times its micro-batches: the loop averages
    over these."""


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Return how much better each sample of one question is than their mean (SPEC section 8)."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def question_indices(count: int, settings: RolloutSettings, step: int) -> list[int]:
    """Return the questions of a step; every epoch takes each of `count` once, in its own order.

    A step that begins at an epoch's end goes on with the next one's beginning.
    """
    first = step * settings.questions_per_step
    orders: dict[int, array[int]] = {}
    found = []
    for position in range(first, first + settings.questions_per_step):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = array("Q", range(count))
            Random(f"questions {settings.seed} {epoch}").shuffle(orders[epoch])
        found.append(orders[epoch][place])
    return found


def build_rollout(
    prompt: Sequence[int], completion: Completion, reward: float, advantage: float
) -> Rollout:
    """Put a row together; the token by which the model ended its answer is one that it chose."""
    ended = [completion.stop_token] if completion.stop_token is not None else []
    return Rollout(
        token_ids=(*prompt, *completion.token_ids, *ended),
        mask=(*[0] * len(prompt), *completion.mask, *[1] * len(ended)),
        reward=reward,
        advantage=advantage,
        cut=completion.finish_reason in ("max_tokens", "length"),
    )


def build_batches(
    rollouts: Sequence[Rollout], settings: RolloutSettings, padding: int
) -> list[RolloutBatch]:
    """Return a step's micro-batches, always `settings.batches` of them.

    Rows of one length stand together. Those whose advantage is 0 have no gradient and are left
    out, though their tokens count in the average; micro-batches that remain are a single position
    without a target.
    """
    trained = sum(rollout.trained for rollout in rollouts)
    scale = settings.batches / max(1, trained)
    rows = [rollout for rollout in rollouts if rollout.advantage != 0 and rollout.trained]
    rows.sort(key=lambda rollout: -len(rollout.token_ids))
    size = settings.device_batch_size
    batches = [_pad(rows[i : i + size], padding, scale) for i in range(0, len(rows), size)]
    empty = Rollout((padding, padding), (0, 0), 0.0, 0.0, False)
    return batches + [_pad([empty], padding, scale)] * (settings.batches - len(batches))


def _pad(rows: Sequence[Rollout], padding: int, scale: float) -> RolloutBatch:
    width = max(len(row.token_ids) for row in rows) - 1
    inputs = np.full((len(rows), width), padding, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for number, row in enumerate(rows):
        ids, mask = np.array(row.token_ids, dtype=np.int64), np.array(row.mask[1:], dtype=bool)
        inputs[number, : len(ids) - 1] = ids[:-1]
        targets[number, : len(ids) - 1] = np.where(mask, ids[1:], IGNORED)
    advantages = np.array([row.advantage for row in rows], dtype=np.float32)
    return RolloutBatch(inputs, targets, advantages, scale)


class RolloutLoader:
    """Roll out with the engine's model as it is at the first batch of each step.

    Args:
        task: what is asked; its `reward` judges.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, task: Task, settings: RolloutSettings
    ) -> None:
        self.engine, self.tokenizer, self.task = engine, tokenizer, task
        self.settings = settings
        self._steps = 0
        self._waiting: deque[RolloutBatch] = deque()
        self._rollouts: list[Rollout] = []
        self._seconds = 0.0

    @property
    def rolls_out_next(self) -> bool:
        """Whether the next batch begins a step."""
        return not self._waiting

    def __next__(self) -> RolloutBatch:
        if not self._waiting:
            started = time.perf_counter()
            self._rollouts = self.roll_out(self._steps)
            padding = self.tokenizer.bos_id
            self._waiting.extend(build_batches(self._rollouts, self.settings, padding))
            self._steps += 1
            self._seconds = time.perf_counter() - started
        return self._waiting.popleft()

    def roll_out(self, step: int) -> list[Rollout]:
        """Return a step's rollouts, question by question."""
        self.engine.refresh_weights()
        settings, rows = self.settings, []
        sampling = Sampling(
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.num_samples,
            row_seed(settings.seed, step),
        )
        conversations = [
            self.task[index] for index in question_indices(len(self.task), settings, step)
        ]
        prompts = [
            render_question(self.tokenizer, conversation, self.engine.max_length)[0]
            for conversation in conversations
        ]
        requests = [
            build_request(self.tokenizer, prompt, sampling, place)
            for place, prompt in enumerate(prompts)
        ]
        groups = self.engine.generate(requests)
        for conversation, prompt, group in zip(conversations, prompts, groups, strict=True):
            texts = [spoken_text(self.tokenizer, sample.token_ids) for sample in group]
            rewards = [self.task.reward(conversation, text) for text in texts]
            for sample, reward, advantage in zip(
                group, rewards, group_advantages(rewards), strict=True
            ):
                rows.append(build_rollout(prompt, sample, reward, advantage))
        return rows

    def amounts(self) -> tuple[int, int]:
        """Return the tokens of the last step's rows, and of those of them that were trained on."""
        lengths = [(len(row.token_ids), row.advantage != 0) for row in self._rollouts]
        return sum(n for n, _ in lengths), sum(n for n, trained in lengths if trained)

    def metrics(self) -> dict[str, float]:
        """Return the figures of the last step's rollouts."""
        rows, size = self._rollouts, self.settings.num_samples
        if not rows:
            return {}
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        return {
            "rollout/reward": sum(row.reward for row in rows) / len(rows),
            "rollout/solved_share": _share(any(r.reward > 0 for r in group) for group in groups),
            "rollout/learning_share": _share(any(r.advantage for r in group) for group in groups),
            "rollout/cut_share": _share(row.cut for row in rows),
            "rollout/trained_tokens": sum(row.trained for row in rows),
            "rollout/tokens": self.amounts()[0],
            "rollout/seconds": self._seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps."""
        assert not self._waiting, "a step's batches are used up together"
        return {"identity": self._identity(), "steps": torch.tensor([self._steps])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state.

        Raises:
            CheckpointError: other questions were asked, or with other settings.
        """
        try:
            steps, identity = int(state["steps"][0]), dict(state["identity"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of the rollouts cannot be read: {error!r}") from error
        if identity != self._identity():
            raise CheckpointError(
                f"the checkpoint's rollouts are of {identity}, not of "
                f"{self._identity()}: choose another --output-tag for a new run"
            )
        self._steps = steps
        self._waiting.clear()

    def close(self) -> None:
        """Drop what waits."""
        self._waiting.clear()

    def __enter__(self) -> RolloutLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {"task": self.task.describe(), "settings": asdict(self.settings)}


def _share(flags: Any) -> float:
    values = [bool(flag) for flag in flags]
    return sum(values) / len(values)
