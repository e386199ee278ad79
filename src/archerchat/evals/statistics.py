"""Statistics of CORE, ChatCORE and the report: centred accuracy, confidence intervals, pass@k.

wilson_interval(30, 200)         # the 95 % interval of 30 right answers in 200
pass_at_k([3, 0, 16], 16, 4)     # the chance that at least one of four samples is right
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Standard normal quantile of 97.5 %."""

Interval = tuple[float, float]


def centred(accuracy: float, baseline: float) -> float:
    """Return `accuracy` on a scale where guessing is 0 and perfection is 1 (SPEC section 9)."""
    return (accuracy - baseline) / (1 - baseline)


def wilson_interval(right: float, trials: int, z: float = Z_95) -> Interval:
    """Return the score interval of a share (Wilson 1927), which holds near 0 and 1 too.

    Args:
        right: the number of successes. It may be a sum of shares, if each of `trials` problems
            was answered several times; the interval is then too wide rather than too narrow.
    """
    assert 0 <= right <= trials > 0, f"{right} of {trials}"
    share, weight = right / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    # At the ends the formula gives exactly 0 and 1; rounding would not.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == trials else min(1.0, middle + half)
    return low, high


def mean_interval(estimates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Return the interval of a mean of independent estimates, from their own intervals.

    It is computed from their limits instead of variances, so that skewed intervals stay skewed
    (MOVER: Zou and Donner 2008).
    """
    count = len(estimates)
    pairs = list(zip(estimates, intervals, strict=True))
    mean = sum(estimates) / count
    below = math.sqrt(sum((estimate - low) ** 2 for estimate, (low, _) in pairs)) / count
    above = math.sqrt(sum((high - estimate) ** 2 for estimate, (_, high) in pairs)) / count
    return mean - below, mean + above


def pass_at_k(right: Sequence[int], samples: int, k: int) -> float:
    """Return the mean over problems of the chance that at least one of k samples is right.

    The estimate from n >= k samples is unbiased (Chen et al. 2021): 1 - C(n - c, k) / C(n, k).

    Args:
        right: number of right samples per problem.
        samples: samples per problem, n.
    """
    assert 1 <= k <= samples, f"pass@{k} of {samples}"
    total = math.comb(samples, k)
    missed = sum(math.comb(samples - count, k) / total for count in right)
    return 1 - missed / len(right)


def pass_sizes(samples: int) -> list[int]:
    """Return the k to report: the powers of two below `samples`, then `samples` itself."""
    return [1 << i for i in range(samples.bit_length()) if 1 << i < samples] + [samples]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A model's score in one task, over all ranks."""

    label: str
    """The task's name."""
    task_type: str
    examples: int
    correct: int
    """Number of right answers, over the samples of all examples."""
    random_baseline: float
    """The accuracy of guessing."""
    seconds: float = 0.0
    num_samples: int = 1
    """Samples per example."""

    @property
    def accuracy(self) -> float:
        """The share of right answers: pass@1."""
        return self.correct / (self.examples * self.num_samples)

    @property
    def interval(self) -> Interval:
        """95 % confidence interval of the accuracy; each example is one trial."""
        return wilson_interval(self.correct / self.num_samples, self.examples)

    @property
    def centred(self) -> float:
        """The accuracy on a scale where guessing is 0 and perfection 1."""
        return centred(self.accuracy, self.random_baseline)


def mean_score(tasks: Sequence[TaskResult]) -> tuple[float, Interval]:
    """Return the mean centred accuracy, which CORE and ChatCORE are, and its 95 % interval."""
    scores = [task.centred for task in tasks]
    limits = [[centred(limit, task.random_baseline) for limit in task.interval] for task in tasks]
    return sum(scores) / len(scores), mean_interval(scores, [(low, high) for low, high in limits])
