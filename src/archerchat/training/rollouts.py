"""Rollouts as batches: questions in order, answers by the engine, rewards, advantages, rows.

A step's rollouts depend only on the weights, the seed and the step: questions are shuffled once per
epoch, and an answer's tokens depend on seed, step, question and sample. The whole state of a loader
is therefore the number of steps that it has rolled out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

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


@dataclass(frozen=True, eq=False)
class RolloutBatch(Batch):
    """Rows padded on the right."""

    advantages: NDArray[np.float32]
    """(B,)"""


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Return how much better each sample of one question is than their mean (SPEC section 8)."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def question_indices(count: int, per_step: int, seed: int, step: int) -> list[int]:
    """Return a step's questions; every epoch takes each of `count` once, in its own order."""
    first, indices = step * per_step, list[int]()
    for epoch in range(first // count, (first + per_step - 1) // count + 1):
        order = list(range(count))
        Random(f"questions {seed} {epoch}").shuffle(order)
        indices += order
    return indices[first % count :][:per_step]


def build_rollout(
    prompt: Sequence[int], completion: Completion, reward: float, advantage: float
) -> Rollout:
    """Build a row; the token by which the model ended its answer is one that it chose."""
    ended = [completion.stop_token] if completion.stop_token is not None else []
    token_ids = (*prompt, *completion.token_ids, *ended)
    mask = (*[0] * len(prompt), *completion.mask, *[1] * len(ended))
    cut = completion.finish_reason in ("max_tokens", "length")
    return Rollout(token_ids, mask, reward, advantage, cut)


def build_batches(
    rollouts: Sequence[Rollout], rows: int, count: int, padding: int
) -> list[RolloutBatch]:
    """Return `count` micro-batches of up to `rows` rows, sorted by length.

    Rollouts with advantage 0 have no gradient and are left out. Micro-batches without rows get a
    single position without a target.
    """
    kept = [rollout for rollout in rollouts if rollout.advantage != 0 and any(rollout.mask)]
    kept.sort(key=lambda rollout: -len(rollout.token_ids))
    empty = Rollout((padding, padding), (0, 0), 0.0, 0.0, False)
    starts = range(0, count * rows, rows)
    return [_pad(kept[start : start + rows] or [empty], padding) for start in starts]


def _pad(rows: Sequence[Rollout], padding: int) -> RolloutBatch:
    ids = [torch.tensor(row.token_ids) for row in rows]
    chosen = [torch.tensor(row.mask[1:], dtype=torch.bool) for row in rows]
    learned = [torch.where(mask, row[1:], IGNORED) for mask, row in zip(chosen, ids, strict=True)]
    inputs = pad_sequence([row[:-1] for row in ids], batch_first=True, padding_value=padding)
    targets = pad_sequence(learned, batch_first=True, padding_value=IGNORED)
    advantages = np.array([row.advantage for row in rows], dtype=np.float32)
    return RolloutBatch(torch.stack([inputs, targets]).numpy(), advantages)


@dataclass
class RolloutLoader:
    """Yield micro-batches; the first of each step rolls out with the model's current weights."""

    engine: Engine
    tokenizer: Tokenizer
    task: Task
    ranks: Ranks
    sampling: SamplingParams
    questions: int
    """Questions per step, shared by the ranks."""
    rows: int
    """Rows per micro-batch."""
    batches: int
    """Micro-batches per step of this rank."""

    # The last step's figures over all ranks.
    tokens: int = 0
    learned_tokens: int = 0
    """Tokens in rows with a gradient."""
    chosen_tokens: int = 0
    """Tokens that the model chose."""
    metrics: dict[str, float] = field(default_factory=dict)

    _steps: int = 0
    _waiting: deque[RolloutBatch] = field(default_factory=deque)

    @property
    def rolls_out_next(self) -> bool:
        """Whether the next batch begins a step."""
        return not self._waiting

    @property
    def scale(self) -> float:
        """Factor that makes the loop's average over micro-batches one over all chosen tokens of
        the step, those without a gradient too."""
        return self.batches * self.ranks.world_size / max(1, self.chosen_tokens)

    def __next__(self) -> RolloutBatch:
        if self.rolls_out_next:
            started = time.perf_counter()
            rollouts = self.roll_out(self._steps)
            sizes = [(len(r.mask), len(r.mask) * (r.advantage != 0), sum(r.mask)) for r in rollouts]
            sums = self.ranks.sum(torch.tensor(sizes).sum(dim=0)).tolist()
            self.tokens, self.learned_tokens, self.chosen_tokens = sums
            padding = self.tokenizer.bos_id
            self._waiting += build_batches(rollouts, self.rows, self.batches, padding)
            self._steps += 1
            self.metrics = self._measure(rollouts, time.perf_counter() - started)
        return self._waiting.popleft()

    def roll_out(self, step: int) -> list[Rollout]:
        """Return this rank's rollouts of a step, question by question."""
        self.engine.refresh_weights()
        tokenizer, seed = self.tokenizer, self.sampling.seed
        params = replace(self.sampling, seed=derive_seed(seed, step))
        asked = question_indices(len(self.task), self.questions, seed, step)
        places, length = self.ranks.share(len(asked)), self.engine.max_length
        conversations = [self.task[asked[place]] for place in places]
        prompts = [render_question(tokenizer, each, length)[0] for each in conversations]
        numbered = zip(prompts, places, strict=True)
        requests = [build_request(tokenizer, prompt, params, place) for prompt, place in numbered]
        groups, rows = self.engine.generate(requests), list[Rollout]()
        for conversation, prompt, group in zip(conversations, prompts, groups, strict=True):
            texts = [spoken_text(tokenizer, each.token_ids, params.stop) for each in group]
            rewards = [self.task.reward(conversation, text) for text in texts]
            judged = zip(group, rewards, group_advantages(rewards), strict=True)
            rows += [build_rollout(prompt, *each) for each in judged]
        return rows

    def _measure(self, rows: Sequence[Rollout], seconds: float) -> dict[str, float]:
        size = self.sampling.num_samples
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        own = {
            "rollout/reward": sum(row.reward for row in rows) / len(rows),
            "rollout/solved_share": fmean(any(r.reward > 0 for r in group) for group in groups),
            "rollout/learning_share": fmean(any(r.advantage for r in group) for group in groups),
            "rollout/cut_share": fmean(row.cut for row in rows),
        }
        # Each rank has as many questions.
        return dict(zip(own, self.ranks.mean(*own.values()), strict=True)) | {
            "rollout/trained_tokens": float(self.chosen_tokens),
            "rollout/tokens": self.tokens,
            "rollout/seconds": seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps rolled out; only between two steps."""
        assert not self._waiting
        return {"steps": torch.tensor([self._steps])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._waiting.clear()

    def close(self) -> None:
        self._waiting.clear()
