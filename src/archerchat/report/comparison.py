"""Compare two runs, or a run with the reference's printed log.

Losses are smoothed, as both sides print them. Rounding makes correct runs drift apart, so they are
compared step by step only at the start. The limits for the end and for scores follow from the noise
between runs (SPEC section 11).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from archerchat.errors import DataError
from archerchat.home import Home
from archerchat.report.charts import Lines, Series, draw
from archerchat.report.runs import Run, gather, latest

FIRST_STEPS = 20
FIRST_LOSS, LAST_LOSS = f"loss of the first {FIRST_STEPS} steps", "loss of the last tenth"
BITS, CORE, SFT_BITS, CHATCORE = "bits per byte", "CORE", "SFT bits per byte", "ChatCORE"
SPEED, MFU = "tokens/s", "MFU"
SCORES = (BITS, CORE, SFT_BITS, CHATCORE, SPEED, MFU)
LIMITS = {FIRST_LOSS: 0.05, LAST_LOSS: 0.03, **dict.fromkeys(SCORES[:4], 0.01)}
"""Largest differences between runs that agree. CORE of single runs has a sigma of about 0.005."""
QUANTITIES = {
    "loss": "(train_)?loss",
    BITS: "(val_|validation_)?bpb",
    CORE: "core(_metric|_score)?",
    CHATCORE: "chatcore(_metric|_score)?",
    SPEED: "tok_sec|tok_per_sec|tokens_per_second",
    MFU: "mfu",
    "flops": "total_(training_)?flops|total_training_flops_estimate",
    "flops_per_token": "(num_|estimated_)?flops_per_token",
    "batch": "total_batch_size",
    "step": "step",
}
"""Patterns of a figure's names in logs, in lower case and with _ for other characters."""
NUMBER = r"\"?([-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?)"
PAIR = re.compile(rf"([\w./-]+)={NUMBER}|([A-Za-z][\w/ ]*?)(?:\s*:\s*|\s+){NUMBER}")
"""`val_bpb=0.93`, `tok/sec: 106,000` or `Total batch size 524,288`."""


@dataclass
class Course:
    """A training run's curves and final figures, from a journal or a log."""

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
    few_steps: int | None = None
    """The number of common steps, if it is too small to say that the runs agree."""

    @property
    def limit(self) -> float | None:
        return LIMITS.get(self.name)

    @property
    def agrees(self) -> bool | None:
        """Whether the difference is within the limit; None if there is no limit or too few steps.

        A difference beyond the limit shows after any number of steps.
        """
        if not self.limit or (not abs(self.difference) > self.limit and self.few_steps):
            return None
        return abs(self.difference) <= self.limit


def read_course(home: Home, name: str) -> Course:
    """Read the log file `name`, or the run or model of that name.

    Raises:
        UsageError: there is no such run.
        DataError: the log has no readable line, or a journal is damaged.
    """
    if Path(name).is_file():
        return parse_log(name, Path(name).read_text(encoding="utf-8", errors="replace"))
    runs, results = gather(home, name)
    by_stage = {run.stage: run for run in runs}
    base, tuned = by_stage.get("base", Run(name)), by_stage.get("sft", Run(name))
    core, chat = latest(results, "core"), latest(results, "chat", "sft")
    scores = {
        BITS: base.last("val/bpb"),
        CORE: core.score if core else None,
        SFT_BITS: tuned.last("val/bpb"),
        CHATCORE: chat.score if chat else None,
        SPEED: base.last("train/tokens_per_second"),
        MFU: base.last("train/mfu"),
    }
    flops = base.last("train/flops")
    return Course(
        name,
        base.metrics.get("train/smooth_loss", {}),
        base.metrics.get("val/bpb", {}),
        flops / base.steps if flops and base.steps else None,
        {score: value for score, value in scores.items() if value is not None},
    )


def parse_log(name: str, text: str) -> Course:
    """Read the reference's printed log, in either of its layouts.

    `step 00010/02520 (0.40%) | loss: 6.1 | tok/sec: 106,000 | mfu: 39.0` is one, `eval step=250
    val_bpb=0.93` the other. Steps that begin again at 0 are those of fine-tuning.

    Raises:
        DataError: no line has a loss or a score.
    """
    course, is_base, last_step = Course(name), True, -1
    known: dict[str, float] = {}
    for line in text.splitlines():
        found = _read_line(line)
        step = int(found.pop("step", -1))
        is_base &= step != 0 or last_step <= FIRST_STEPS
        last_step = max(step, last_step)
        if is_base and step >= 0:
            course.losses |= {step: found["loss"]} if "loss" in found else {}
            course.bits |= {step: found[BITS]} if BITS in found else {}
        # CORE and the total of FLOPs may be printed after fine-tuning, and are the base model's.
        of_sft = {BITS: SFT_BITS, CHATCORE: CHATCORE, CORE: CORE, "flops": "flops"}
        known |= found if is_base else {of_sft[q]: found[q] for q in found.keys() & of_sft.keys()}
    course.scores = {name: known[name] for name in SCORES if name in known}
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
    """Return a line's figures, by our names."""
    tag = re.match(r"\W*(core|chatcore)\b", line, re.IGNORECASE)
    found: dict[str, float] = {}
    for match in PAIR.finditer(line):
        key = re.sub(r"\W+", "_", (match[1] or match[3]).strip().lower())
        if tag and key in ("score", "metric"):
            key = tag[1].lower()
        for quantity, names in QUANTITIES.items():
            if re.fullmatch(names, key):
                found[quantity] = float((match[2] or match[4]).replace(",", ""))
    return found


def compare(first: Course, second: Course) -> list[Row]:
    """Return every quantity that both have."""
    steps = sorted(first.losses.keys() & second.losses.keys())
    starts, ends = [s for s in steps if s < FIRST_STEPS], steps[-math.ceil(len(steps) / 10) :]
    few = len(steps) if steps and steps[-1] < FIRST_STEPS - 1 else None
    rows = []
    for name, chosen in ((FIRST_LOSS, starts), (LAST_LOSS, ends)):
        if chosen:
            pairs = [(first.losses[step], second.losses[step]) for step in chosen]
            one, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            worst = max((b - a for a, b in pairs), key=abs)
            rows.append(Row(name, one, other, worst if name == FIRST_LOSS else other - one, few))
    for name in SCORES:
        if name in first.scores and name in second.scores:
            one, other = first.scores[name], second.scores[name]
            rows.append(Row(name, one, other, other - one))
    return rows


def compute_multiplier(first: Course, second: Course) -> tuple[str, float] | None:
    """Return the name of the side with fewer bits per byte at its end, and its advantage in FLOPs.

    The factor is the other side's FLOPs over the FLOPs with which this side reached the same bits
    per byte, interpolated in log-log. A side without FLOPs is assumed to use the other's per step.
    None if the curves do not allow it.
    """
    if not first.bits or not second.bits:
        return None
    better, worse = sorted((first, second), key=lambda side: side.bits[max(side.bits)])
    ours = better.flops_per_step or worse.flops_per_step
    theirs = worse.flops_per_step or ours
    curve = sorted((step, bits) for step, bits in better.bits.items() if step > 0)
    target = worse.bits[max(worse.bits)]
    if not ours or not theirs or not curve or curve[0][1] < target:
        return None
    steps, bits = np.log(curve).T
    # Where the curve first falls to the target.
    step = np.exp(np.interp(-np.log(target), -np.minimum.accumulate(bits), steps))
    return better.name, max(worse.bits) * theirs / (float(step) * ours)


def draw_comparison(first: Course, second: Course) -> str:
    """Draw both curves of bits per byte, or of the loss if one has too few, as SVG."""
    enough = min(len(first.bits), len(second.bits)) > 1
    name, unit = (BITS, BITS) if enough else ("loss", "nats per token")
    series = [
        Series(side.name, sorted((side.bits if enough else side.losses).items()), color=i)
        for i, side in enumerate((first, second))
    ]
    return draw(Lines(f"{first.name} and {second.name}: {name}", "step", series, unit))
