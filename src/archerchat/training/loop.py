"""THE step loop: accumulation, timing, cadence, checkpoints, resume.

A recipe brings a source of micro-batches, a loss, the settings of each step and what to do at
evaluation, sampling and saving; it never loops itself. Before step i the loop saves, evaluates
and samples where that is due, in this order: a long evaluation that dies costs no training. The
same is done once more after the last update. Ctrl-C and SIGTERM end the loop with a checkpoint,
after the running step or in the middle of an evaluation; a second one ends the process at once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from archerchat.errors import ArcherChatError
from archerchat.optim.optimizer import MuonGroup, Optimizer
from archerchat.peak_flops import PeakFlops
from archerchat.runtime import Runtime
from archerchat.training.metrics import MetricsLog, Occasion
from archerchat.training.progress import ProgressLine, StepReport
from archerchat.training.stopping import StopRequest, explained_memory

WARMUP_STEPS = 5
"""Steps after a start that are left out of speed figures: they compile and fill caches."""
SMOOTHING = 0.9
GC_EVERY = 5000
BEST_BY = {"val/bpb": 1, "val/pass_at_1": -1}
"""Metrics by which a checkpoint is the best, and what makes less of them better."""
SMALLEST_SCALE = 2.0**-10
"""A gradient scale that has been halved to this will not find one that works."""


@dataclass(frozen=True)
class StepSettings:
    """What the schedule gives one step."""

    lr_multiplier: float
    muon_momentum: float
    muon_weight_decay: float


@dataclass(frozen=True)
class Cadence:
    """When the loop does more than train; None is never, the end excepted."""

    num_iterations: int | Callable[[int], int]
    """Steps in all; where the data decides, an estimate of them by the steps done, which is their
    number itself once the data is used up."""
    grad_accum_steps: int
    tokens_per_step: int | Callable[[], int]
    """Over all ranks; where steps differ, those of the step that is done."""
    flops_per_step: int | Callable[[], int]
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    core_every: int | None = None

    def steps_in_all(self, step: int) -> int:
        """Return how many steps the run has, as far as is known after `step` of them."""
        given = self.num_iterations
        return given(step) if callable(given) else given

    def amounts(self) -> tuple[int, int]:
        """Return the tokens and the operations of the step that is done."""
        tokens, flops = self.tokens_per_step, self.flops_per_step
        return tokens() if callable(tokens) else tokens, flops() if callable(flops) else flops


@dataclass
class LoopState:
    """What a checkpoint holds of the loop itself."""

    step: int = 0
    """Updates done."""
    smooth_loss: float = 0.0
    """Exponential average of the training loss, not yet corrected for its start at 0."""
    first_val: float = math.nan
    """Bits per byte when it was first measured."""
    last_val: float = math.nan
    best_val: float = math.inf
    best_saved: float = math.inf
    """What the best checkpoint scored right after it was saved, as `BEST_BY` turns it."""
    tokens: int = 0
    """Trained on, over all ranks."""
    flops: int = 0
    training_seconds: float = 0.0
    """Time in training steps, evaluations and saving excluded."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool
    """False when a signal stopped it."""
    tokens_per_second: float
    """Median over the steps after the warm-up, or over all of fewer steps; NaN without any."""
    mfu: float
    """That rate's share of the peak."""
    data_wait_share: float
    """Share of the training time spent waiting for a batch."""


Measure = Callable[[int], Mapping[str, float]]
"""Returns a step's metrics by name."""


class Recipe(Protocol):
    """What the loop asks of pretraining, fine-tuning and reinforcement learning."""

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) on the device."""

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the micro-batch's mean loss."""

    def settings(self, step: int) -> StepSettings: ...

    def step_metrics(self) -> Mapping[str, float]:
        """Return what else to log of the step that is done, by name."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Return metrics by name; `val/bpb` is the one whose best value is kept."""

    def sample(self, step: int) -> Mapping[str, str]:
        """Return texts by the name of their prompt."""

    def save(self, state: LoopState, scaler: Mapping[str, Any]) -> None: ...

    def checkpoint_path(self, step: int) -> Path | None:
        """Return where the checkpoint of `step` is, if there is one."""


class Loop:
    """Run a recipe from `state` to its last step.

    Args:
        recipe: what to train on and how.
        optimizer: steps the model's parameters.
        state: continued in place.
        peak: of one device.
        scaler_state: of the float16 gradient scaler, from a checkpoint.
        core: measures at `core_every` what takes long, after a checkpoint of its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        runtime: Runtime,
        cadence: Cadence,
        state: LoopState,
        peak: PeakFlops,
        metrics: MetricsLog,
        progress: ProgressLine,
        scaler_state: Mapping[str, Any] | None = None,
        core: Measure | None = None,
    ) -> None:
        self.core = core
        self.recipe, self.optimizer, self.runtime = recipe, optimizer, runtime
        self.cadence, self.state, self.peak = cadence, state, peak
        self.metrics, self.progress = metrics, progress
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.compute_dtype == torch.float16
        )
        if scaler_state:
            self.scaler.load_state_dict(dict(scaler_state))
        self._stop = StopRequest()
        self._saved_step = state.step
        # One rate shows the schedule; the others are multiples of it, and in the config.
        muon = [group.rate for group in optimizer.groups if isinstance(group, MuonGroup)]
        self._rates = {"train/matrix_lr": muon[0]} if muon else {}
        self._step_seconds: list[float] = []
        self._wait_seconds = 0.0
        self._tokens = self._flops = 0

    def run(self) -> Outcome:
        """Train until the last step is done or a signal asks to stop."""
        stop, first_step = self._stop, self.state.step
        with stop.listening(), self._without_gc(), explained_memory():
            while True:
                step = self.state.step
                finished = step == self.cadence.steps_in_all(step)
                if finished or _due(self.cadence.save_every, step):
                    self._save()
                if not stop.asked and (finished or _due(self.cadence.eval_every, step)):
                    self._evaluate(step, self.recipe.evaluate, "eval/seconds")
                core_due = step > 0 and _due(self.cadence.core_every, step)
                if self.core and not stop.asked and (finished or core_due):
                    self._save()
                    self._evaluate(step, self.core, "core/seconds")
                sample_due = step > 0 and _due(self.cadence.sample_every, step)
                if not stop.asked and (finished or sample_due):
                    self._sample(step)
                if stop.asked:
                    self._save()
                    self.metrics.finish("interrupted")
                if stop.asked or finished:
                    return self._outcome(finished and not stop.asked)
                self._train_step(step)
                if step == first_step:
                    gc.collect()
                    gc.freeze()

    def _train_step(self, step: int) -> None:
        started = time.perf_counter()
        settings, accum = self.recipe.settings(step), self.cadence.grad_accum_steps
        total = torch.zeros((), device=self.runtime.device)
        for _ in range(accum):
            asked = time.perf_counter()
            inputs, targets = self.recipe.next_micro_batch()
            self._wait_seconds += time.perf_counter() - asked
            loss = self.recipe.loss(inputs, targets)
            self.scaler.scale(loss / accum).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch_optimizer = cast(torch.optim.Optimizer, self.optimizer)
        self.scaler.unscale_(torch_optimizer)
        self.scaler.step(
            torch_optimizer,
            settings.lr_multiplier,
            settings.muon_momentum,
            settings.muon_weight_decay,
        )
        self.scaler.update()
        self.optimizer.zero_grad()
        mean, last = (total / accum).item(), loss.item()  # waits for the device
        seconds = time.perf_counter() - started
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise ArcherChatError(
                f"float16 gradients overflow at step {step} however far they are scaled down: use "
                "--dtype float32 or bfloat16; the last checkpoint is intact"
            )
        if not math.isfinite(mean):
            raise ArcherChatError(
                f"the loss of step {step} is {mean}: lower the learning rates (--matrix-lr, "
                f"--embedding-lr), or use --dtype float32; the last checkpoint is intact"
            )
        self.state.step += 1
        tokens, flops = self.cadence.amounts()
        self.state.tokens += tokens
        self.state.flops += flops
        self._tokens += tokens
        self._flops += flops
        self.state.training_seconds += seconds
        self.state.smooth_loss = SMOOTHING * self.state.smooth_loss + (1 - SMOOTHING) * mean
        self._step_seconds.append(seconds)
        self._report(step, mean, last, settings, seconds)
        if (step + 1) % GC_EVERY == 0:
            gc.collect()

    def _report(
        self, step: int, loss: float, last: float, settings: StepSettings, seconds: float
    ) -> None:
        tokens, flops = self.cadence.amounts()
        rate = tokens / seconds
        mfu = self._mfu(flops, seconds)
        smooth = self._smooth()
        self.metrics.log(
            {
                "train/loss": loss,
                "train/last_micro_batch_loss": last,
                "train/smooth_loss": smooth,
                "train/lr_multiplier": settings.lr_multiplier,
                "train/muon_momentum": settings.muon_momentum,
                "train/muon_weight_decay": settings.muon_weight_decay,
                "train/tokens_per_second": rate,
                "train/mfu": mfu,
                "train/seconds": self.state.training_seconds,
                "train/tokens": self.state.tokens,
                "train/flops": self.state.flops,
                "train/memory_bytes": self.runtime.peak_memory_bytes(),
            }
            | {name: rate * settings.lr_multiplier for name, rate in self._rates.items()}
            | ({"train/grad_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})
            | dict(self.recipe.step_metrics()),
            step,
        )
        steps = self.cadence.steps_in_all(self.state.step)
        steady, steps_left = self._steady(), steps - self.state.step
        known = bool(steady) or steps_left == 0
        self.progress.step(
            StepReport(
                step=self.state.step,
                num_iterations=steps,
                loss=smooth,
                lr_multiplier=settings.lr_multiplier,
                tokens_per_second=rate,
                mfu=mfu,
                seconds_left=steps_left * _median(steady or [seconds]) if known else None,
            )
        )

    def _evaluate(self, step: int, measure: Measure, seconds_name: str) -> None:
        started = time.perf_counter()
        values = self._stop.interruptible(lambda: dict(measure(step)))
        if not values:
            return
        seconds = time.perf_counter() - started
        self.metrics.log(values | {seconds_name: seconds}, step)
        if "val/bpb" in values:
            self._note_validation(values["val/bpb"])
        self._push_best(values)
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, value in values.items()
            if not name.startswith("core/task/")
        )
        self.progress.note(f"step {step}: {shown} ({seconds:.1f} s)")

    def _note_validation(self, bits: float) -> None:
        state = self.state
        state.first_val = bits if math.isnan(state.first_val) else state.first_val
        state.last_val, state.best_val = bits, min(state.best_val, bits)

    def _push_best(self, values: Mapping[str, float]) -> None:
        """Push this step's checkpoint if there is one and none before it scored as well."""
        state = self.state
        for name in BEST_BY.keys() & values.keys():
            score = values[name] * BEST_BY[name]
            if 0 < state.step == self._saved_step and score < state.best_saved:
                state.best_saved = score
                self._push("best", {name: values[name]})

    def _sample(self, step: int) -> None:
        texts = self._stop.interruptible(lambda: dict(self.recipe.sample(step)))
        for name, text in (texts or {}).items():
            self.metrics.log_text(f"sample/{name}", text, step)
            self.progress.note(f"step {step}: {text!r}")

    def _save(self) -> None:
        """Save the state of this step, once."""
        if self._saved_step == self.state.step:
            return
        started = time.perf_counter()
        self.recipe.save(self.state, self.scaler.state_dict())
        self._saved_step = self.state.step
        seconds = time.perf_counter() - started
        self.progress.note(f"step {self.state.step}: checkpoint saved ({seconds:.1f} s)")
        self._push("last", {"train/tokens": self.state.tokens, "train/smooth_loss": self._smooth()})

    def _push(self, occasion: Occasion, metadata: Mapping[str, float]) -> None:
        """Hand the checkpoint of this step over, if it is one to be pushed."""
        step = self.state.step
        path = self.recipe.checkpoint_path(step)
        if path is not None:
            problem = self.metrics.push_checkpoint(path, step, occasion, metadata)
            if problem:
                self.progress.note(f"step {step}: the checkpoint is not pushed: {problem}")

    def _smooth(self) -> float:
        """Return the average loss, corrected for its start at 0."""
        return self.state.smooth_loss / (1 - SMOOTHING**self.state.step)

    def _steady(self) -> list[float]:
        """Return the times of steps after the warm-up, the last 100 of them."""
        return self._step_seconds[WARMUP_STEPS:][-100:]

    def _mfu(self, flops: float, seconds: float) -> float:
        return flops / seconds / (self.peak.flops_per_second * self.runtime.world_size)

    def _outcome(self, finished: bool) -> Outcome:
        seconds = self._step_seconds[WARMUP_STEPS:] or self._step_seconds
        typical = _median(seconds) if seconds else math.nan
        spent, steps = sum(self._step_seconds), max(1, len(self._step_seconds))
        return Outcome(
            finished,
            self._tokens / steps / typical,
            self._mfu(self._flops / steps, typical),
            self._wait_seconds / spent if spent else 0.0,
        )

    @contextmanager
    def _without_gc(self) -> Iterator[None]:
        """Collect garbage only when the loop says so: a collection in a step is a stall."""
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            gc.enable()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
