"""Rollouts as batches: questions in order, answers by the engine, rewards, advantages, rows.

A step's rollouts depend only on the weights, the seed and the step: questions are shuffled once per
epoch, and an answer's tokens depend on seed, step, question and sample. The whole state of a loader
is therefore the number of steps that it has rolled out.

    loader = RolloutLoader(engine, tokenizer, task, settings)
    batch = next(loader)        # the first of a step's `settings.batches` rolls out
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from archerchat.config import Config, PositiveInt
from archerchat.data.prefetch import Batch
from archerchat.distributed import Ranks
from archerchat.evals.chat import build_request, render_question
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams, derive_seed
from archerchat.inference.sequence import Completion
from archerchat.inference.tools import spoken_text
from archerchat.model.loss import IGNORED
from archerchat.tasks.base import Task
from archerchat.tokenizer.bpe import Tokenizer

SAMPLING = SamplingParams(max_new_tokens=256, top_k=50, num_samples=16)
IDENTITY_PARAMS = ("num_samples", "max_new_tokens", "temperature", "top_k", "seed")
"""Sampling parameters that every saved identity has; others only if they are not the default."""


@dataclass(frozen=True)
class RolloutSettings(Config):
    """Settings for a step's rollouts; all of them affect the weights."""

    questions_per_step: PositiveInt
    sampling: SamplingParams
    """How answers are sampled; the samples of one question form a group."""
    device_batch_size: PositiveInt
    """Rows per micro-batch."""

    @property
    def rows(self) -> int:
        """Rollouts per step."""
        return self.questions_per_step * self.sampling.num_samples

    def batches(self, world_size: int = 1) -> int:
        """Return the micro-batches of one of `world_size` ranks per step."""
        return -(-self.rows // (world_size * self.device_batch_size))

    def identity(self) -> dict[str, Any]:
        """Return the settings as checkpoints hold them."""
        given, default = asdict(self.sampling), asdict(SamplingParams())
        kept = {k: v for k, v in given.items() if k in IDENTITY_PARAMS or v != default[k]}
        counts = ("questions_per_step", "device_batch_size")
        return {name: getattr(self, name) for name in counts} | kept


@dataclass(frozen=True)
class Rollout:
    """One sample of a question, and its reward."""

    token_ids: tuple[int, ...]
    """Prompt, answer and, if the model ended it, the token that did."""
    mask: tuple[int, ...]
    """1 for the tokens that the model chose; 0 for the prompt and the results of tools."""
    reward: float
    advantage: float
    cut: bool
    """Whether the token limit or the end of the context cut it off."""

    @property
    def trained(self) -> int:
        """Tokens to learn from."""
        return sum(self.mask)


@dataclass(frozen=True, eq=False)
class RolloutBatch(Batch):
    """Rows padded on the right."""

    advantages: NDArray[np.float32]
    """(B,)"""
    scale: float
    """Number of micro-batches over the number of trained tokens of the whole step: the loop
    averages over micro-batches."""


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Return how much better each sample of one question is than their mean (SPEC section 8)."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def question_indices(count: int, settings: RolloutSettings, step: int) -> list[int]:
    """Return the questions of a step; every epoch takes each of `count` once, in its own order.

    A step at the end of an epoch continues with the next epoch's first questions.
    """
    first = step * settings.questions_per_step
    orders: dict[int, array[int]] = {}
    found = []
    for position in range(first, first + settings.questions_per_step):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = array("Q", range(count))
            Random(f"questions {settings.sampling.seed} {epoch}").shuffle(orders[epoch])
        found.append(orders[epoch][place])
    return found


def build_rollout(
    prompt: Sequence[int], completion: Completion, reward: float, advantage: float
) -> Rollout:
    """Build a row; the token by which the model ended its answer is one that it chose."""
    ended = [completion.stop_token] if completion.stop_token is not None else []
    return Rollout(
        token_ids=(*prompt, *completion.token_ids, *ended),
        mask=(*[0] * len(prompt), *completion.mask, *[1] * len(ended)),
        reward=reward,
        advantage=advantage,
        cut=completion.finish_reason in ("max_tokens", "length"),
    )


def build_batches(
    rollouts: Sequence[Rollout],
    settings: RolloutSettings,
    padding: int,
    ranks: Ranks | None = None,
) -> list[RolloutBatch]:
    """Return this rank's micro-batches of a step: the same number for every step.

    Rows are sorted by length. Rows with advantage 0 have no gradient and are left out, though their
    tokens count in the average; micro-batches without rows get a single position without a target.
    """
    ranks = ranks or Ranks()
    trained = int(ranks.sum(torch.tensor(sum(rollout.trained for rollout in rollouts))))
    count = settings.batches(ranks.world_size)
    scale = count * ranks.world_size / max(1, trained)
    rows = [rollout for rollout in rollouts if rollout.advantage != 0 and rollout.trained]
    rows.sort(key=lambda rollout: -len(rollout.token_ids))
    size = settings.device_batch_size
    batches = [_pad(rows[i : i + size], padding, scale) for i in range(0, len(rows), size)]
    empty = Rollout((padding, padding), (0, 0), 0.0, 0.0, False)
    return batches + [_pad([empty], padding, scale)] * (count - len(batches))


def _pad(rows: Sequence[Rollout], padding: int, scale: float) -> RolloutBatch:
    width = max(len(row.token_ids) for row in rows) - 1
    stacked = np.full((2, len(rows), width), padding, dtype=np.int64)
    inputs, targets = stacked
    targets.fill(IGNORED)
    for number, row in enumerate(rows):
        ids, mask = np.array(row.token_ids, dtype=np.int64), np.array(row.mask[1:], dtype=bool)
        inputs[number, : len(ids) - 1] = ids[:-1]
        targets[number, : len(ids) - 1] = np.where(mask, ids[1:], IGNORED)
    advantages = np.array([row.advantage for row in rows], dtype=np.float32)
    return RolloutBatch(stacked, advantages, scale)


class RolloutLoader:
    """Yield micro-batches; the first one of each step rolls out with the model's current weights.

    Args:
        task: asks the questions; its `reward` judges the answers.
        ranks: the ranks that share a step's questions.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        task: Task,
        settings: RolloutSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.task = engine, tokenizer, task
        self.settings, self.ranks = settings, ranks or Ranks()
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
            own = build_batches(self._rollouts, self.settings, padding, self.ranks)
            self._waiting.extend(own)
            self._steps += 1
            self._seconds = time.perf_counter() - started
        return self._waiting.popleft()

    def roll_out(self, step: int) -> list[Rollout]:
        """Return this rank's rollouts of a step, question by question."""
        self.engine.refresh_weights()
        settings, rows = self.settings, []
        params = settings.sampling
        params = replace(params, seed=derive_seed(params.seed, step))
        asked = question_indices(len(self.task), settings, step)
        places = self.ranks.share(len(asked))
        conversations = [self.task[asked[place]] for place in places]
        prompts = [
            render_question(self.tokenizer, conversation, self.engine.max_length)[0]
            for conversation in conversations
        ]
        requests = [
            build_request(self.tokenizer, prompt, params, place)
            for place, prompt in zip(places, prompts, strict=True)
        ]
        groups = self.engine.generate(requests)
        for conversation, prompt, group in zip(conversations, prompts, groups, strict=True):
            texts = [spoken_text(self.tokenizer, each.token_ids, params.stop) for each in group]
            rewards = [self.task.reward(conversation, text) for text in texts]
            for sample, reward, advantage in zip(
                group, rewards, group_advantages(rewards), strict=True
            ):
                rows.append(build_rollout(prompt, sample, reward, advantage))
        return rows

    def amounts(self) -> tuple[int, int]:
        """Return how many tokens the last step's rows have: all rows, and those trained on."""
        lengths = [(len(row.token_ids), row.advantage != 0) for row in self._rollouts]
        own = [sum(n for n, _ in lengths), sum(n for n, is_trained in lengths if is_trained)]
        rolled_out, trained = self.ranks.sum(torch.tensor(own)).tolist()
        return rolled_out, trained

    def metrics(self) -> dict[str, float]:
        """Return the figures of the last step's rollouts, over all ranks."""
        rows, size = self._rollouts, self.settings.sampling.num_samples
        if not rows:
            return {}
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        own = {
            "rollout/reward": sum(row.reward for row in rows) / len(rows),
            "rollout/solved_share": _share(any(r.reward > 0 for r in group) for group in groups),
            "rollout/learning_share": _share(any(r.advantage for r in group) for group in groups),
            "rollout/cut_share": _share(row.cut for row in rows),
            "rollout/trained_tokens": float(sum(row.trained for row in rows)),
        }
        # Each rank has as many questions.
        figures = dict(zip(own, self.ranks.mean(*own.values()), strict=True))
        figures["rollout/trained_tokens"] *= self.ranks.world_size
        return figures | {"rollout/tokens": self.amounts()[0], "rollout/seconds": self._seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps rolled out; only between two steps."""
        assert not self._waiting
        return {"steps": torch.tensor([self._steps])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the saved step; a broken state is a KeyError or RuntimeError."""
        self._steps = int(state["steps"])
        self._waiting.clear()

    def close(self) -> None:
        """Drop the waiting batches."""
        self._waiting.clear()


def _share(flags: Any) -> float:
    values = [bool(flag) for flag in flags]
    return sum(values) / len(values)
