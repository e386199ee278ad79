"""Compare two runs, or a run with the reference's printed log, and what they cost.

Losses are smoothed ones, as both sides print them. Correct runs drift apart by rounding, so step by
step they are compared only at the start; at the end, and for scores, their noise sets the limits
(SPEC section 11).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from archerchat.errors import DataError
from archerchat.home import Home
from archerchat.report.charts import Lines, Series
from archerchat.report.report import gather
from archerchat.report.results import latest
from archerchat.report.runs import Run

FIRST_STEPS = 20
BITS, CORE, SFT_BITS, CHATCORE = "bits per byte", "CORE", "SFT bits per byte", "ChatCORE"
FIRST_LOSS, LAST_LOSS = f"loss of the first {FIRST_STEPS} steps", "loss of the last tenth"
SPEED, MFU = "tokens/s", "MFU"
SCORES = (BITS, CORE, SFT_BITS, CHATCORE, SPEED, MFU)
LIMITS = {
    FIRST_LOSS: 0.05,
    LAST_LOSS: 0.03,
    BITS: 0.01,
    CORE: 0.01,
    SFT_BITS: 0.01,
    CHATCORE: 0.01,
}
"""By how much runs that agree may differ. CORE of single runs has a sigma of 0.004 to 0.005."""
_NAMES = {
    "loss": ("loss", "train_loss"),
    BITS: ("val_bpb", "bpb", "validation_bpb"),
    CORE: ("core", "core_metric", "core_score"),
    CHATCORE: ("chatcore", "chatcore_metric", "chatcore_score"),
    SPEED: ("tok_sec", "tok_per_sec", "tokens_per_second"),
    MFU: ("mfu",),
    "flops": ("total_flops", "total_training_flops", "total_training_flops_estimate"),
    "flops_per_token": ("flops_per_token", "num_flops_per_token", "estimated_flops_per_token"),
    "batch": ("total_batch_size",),
    "step": ("step",),
}
"""What a log may call each of its figures, in lower case and with _ for all else."""
_QUANTITY = {name: quantity for quantity, names in _NAMES.items() for name in names}
_NUMBER = r"([-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?)"
_TAGGED = re.compile(r"\W*(step|eval|core|params|chatcore|bench|summary)\b.*?\s\S+=", re.I)


@dataclass
class Course:
    """What a run or a log says of a training run."""

    name: str
    losses: dict[int, float] = field(default_factory=dict)
    """Smoothed training loss of the base model by step."""
    bits: dict[int, float] = field(default_factory=dict)
    """Validation bits per byte of the base model by step."""
    flops_per_step: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Final figures by name."""


@dataclass(frozen=True)
class Row:
    """One quantity of both sides."""

    name: str
    first: float
    second: float
    difference: float

    @property
    def agrees(self) -> bool | None:
        """Whether the difference is within the limit; None where there is none."""
        limit = LIMITS.get(self.name)
        return None if limit is None else abs(self.difference) <= limit


def read_course(home: Home, name: str) -> Course:
    """Read the log at the path `name`, or else the run or model of that name.

    Raises:
        UsageError: there is no such run.
        DataError: the log has no line that can be read, or a journal is damaged.
    """
    if Path(name).is_file():
        return parse_log(name, Path(name).read_text(encoding="utf-8", errors="replace"))
    runs, results = gather(home, name)
    by_stage = {run.stage: run for run in runs}
    base = by_stage.get("base", Run(name))
    flops = base.last("train/flops")
    course = Course(
        name,
        base.metrics.get("train/smooth_loss", {}),
        base.metrics.get("val/bpb", {}),
        flops / base.steps if flops and base.steps else None,
    )
    core, chat = latest(results, "core"), latest(results, "chat", "sft")
    scores = {
        BITS: base.last("val/bpb"),
        CORE: core.score if core else None,
        SFT_BITS: by_stage.get("sft", Run(name)).last("val/bpb"),
        CHATCORE: chat.score if chat else None,
        SPEED: base.last("train/tokens_per_second"),
        MFU: base.last("train/mfu"),
    }
    course.scores = {name: value for name, value in scores.items() if value is not None}
    return course


def parse_log(name: str, text: str) -> Course:
    """Read the reference's printed log, in either of its layouts.

    `step 00010/02520 (0.40%) | loss: 6.1 | tok/sec: 106,000 | mfu: 39.0` is one, `eval step=250
    val_bpb=0.93` the other. Steps that begin again at 0 are those of fine-tuning.

    Raises:
        DataError: no line has a loss or a score.
    """
    course, stage, last_step = Course(name), 0, -1
    known: dict[str, float] = {}
    for line in text.splitlines():
        found = _read_line(line)
        step = int(found.pop("step", -1))
        if step == 0 and last_step > FIRST_STEPS:
            stage, last_step = 1, 0
        last_step = max(step, last_step)
        if stage == 0 and step >= 0:
            course.losses |= {step: found["loss"]} if "loss" in found else {}
            course.bits |= {step: found[BITS]} if BITS in found else {}
        if stage == 1 and BITS in found:
            found[SFT_BITS] = found.pop(BITS)
        known |= {name: v for name, v in found.items() if stage == 0 or name not in (SPEED, MFU)}
    course.scores = {
        n: known[n] for n in (BITS, CORE, SFT_BITS, CHATCORE, SPEED, MFU) if n in known
    }
    if course.scores.get(MFU, 0.0) > 1.5:  # a percentage
        course.scores[MFU] /= 100
    if not course.losses and not course.scores:
        raise DataError(
            f"{name} has no line with a step's loss or a score, such as `step 00010/02520 | loss: "
            "6.1` or `eval step=250 val_bpb=0.93`: give a run's name or the reference's log"
        )
    steps = max([*course.losses, *course.bits], default=0)
    if "flops_per_token" in known and "batch" in known:
        course.flops_per_step = known["flops_per_token"] * known["batch"]
    elif "flops" in known and steps:
        course.flops_per_step = known["flops"] / steps
    return course


def _read_line(line: str) -> dict[str, float]:
    """Return the figures of a line by our names for them."""
    tagged = _TAGGED.match(line)
    pattern = (
        rf"([\w./-]+)=\"?{_NUMBER}" if tagged else rf"([A-Za-z][\w/ ]*?)(?:\s*:\s*|\s+){_NUMBER}"
    )
    found: dict[str, float] = {}
    for name, number in re.findall(pattern, line):
        key = re.sub(r"\W+", "_", name.strip().lower())
        if tagged and key in ("score", "metric"):
            key = tagged[1].lower()
        if quantity := _QUANTITY.get(key):
            found[quantity] = float(number.replace(",", ""))
    return found


def compare(first: Course, second: Course) -> list[Row]:
    """Return every quantity that both have."""
    steps = sorted(first.losses.keys() & second.losses.keys())
    rows = []
    starts, ends = [s for s in steps if s < FIRST_STEPS], steps[-math.ceil(len(steps) / 10) :]
    for name, chosen in ((FIRST_LOSS, starts), (LAST_LOSS, ends)):
        if chosen:
            pairs = [(first.losses[step], second.losses[step]) for step in chosen]
            one, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            worst = max((b - a for a, b in pairs), key=abs)
            rows.append(Row(name, one, other, worst if name == FIRST_LOSS else other - one))
    for name in SCORES:
        if name in first.scores and name in second.scores:
            one, other = first.scores[name], second.scores[name]
            rows.append(Row(name, one, other, other - one))
    return rows


def compute_multiplier(first: Course, second: Course) -> tuple[str, float] | None:
    """Return the side with fewer bits per byte, and how many times less compute it needs.

    That is the other side's FLOPs over those with which this side reached the same bits per byte,
    interpolated in log-log. A side that does not say its FLOPs is taken to spend the other's per
    step. None where the curves do not tell.
    """
    per_step = first.flops_per_step or second.flops_per_step
    sides = [replace(c, flops_per_step=c.flops_per_step or per_step) for c in (first, second)]
    if not per_step or not all(side.bits for side in sides):
        return None
    better, worse = sorted(sides, key=lambda side: side.bits[max(side.bits)])
    target = worse.bits[max(worse.bits)]
    curve = [(float(step), bits) for step, bits in sorted(better.bits.items()) if step > 0]
    step = _crossing(curve, target)
    if step is None or better.flops_per_step is None or worse.flops_per_step is None:
        return None
    spent = max(worse.bits) * worse.flops_per_step
    return better.name, spent / (step * better.flops_per_step)


def _crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return where a falling curve first reaches a target, interpolated in log-log."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 >= target >= y1:
            share = math.log(y0 / target) / math.log(y0 / y1) if y0 > y1 else 0.0
            return float(x0 * (x1 / x0) ** share)
    return None


def chart(first: Course, second: Course, quantity: str = "loss") -> Lines:
    """Return both curves of the loss, or of bits per byte."""
    curves: list[Mapping[int, float]] = [
        side.losses if quantity == "loss" else side.bits for side in (first, second)
    ]
    series = (
        Series(side.name, sorted(curve.items()), color=i)
        for i, (side, curve) in enumerate(zip((first, second), curves, strict=True))
    )
    unit = "nats per token" if quantity == "loss" else BITS
    return Lines(f"{first.name} and {second.name}: {quantity}", "step", tuple(series), unit)
