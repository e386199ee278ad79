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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from archerchat.console import ProgressLine, StepReport
from archerchat.errors import ArcherChatError
from archerchat.optim.optimizer import MuonGroup, Optimizer
from archerchat.planning.peak_flops import PeakFlops
from archerchat.runtime import Runtime
from archerchat.training.recipe import Cadence, LoopState, Measure, Recipe, StepSettings
from archerchat.training.stopping import StopRequest, explained_memory
from archerchat.training.telemetry import MetricsLog, Occasion
from archerchat.training.throughput import Throughput

SMOOTHING = 0.9
GC_EVERY = 5000
BEST_BY = {"val/bpb": 1, "val/pass_at_1": -1}
"""Metrics by which a checkpoint is the best, and what makes less of them better."""
SMALLEST_SCALE = 2.0**-10
"""A gradient scale that has been halved to this will not find one that works."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool
    """False when a signal stopped it."""
    tokens_per_second: float = math.nan
    """Median over the steps after the warm-up, or over all of fewer steps; NaN without any."""
    mfu: float = math.nan
    """That rate's share of the peak."""
    data_wait_share: float = 0.0
    """Share of the training time spent waiting for a batch."""


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
        self.cadence, self.state = cadence, state
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
        self._throughput = Throughput(peak.flops_per_second * runtime.world_size)

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
                    return Outcome(finished and not stop.asked, *self._throughput.figures())
                self._train_step(step)
                if step == first_step:
                    gc.collect()
                    gc.freeze()

    def _train_step(self, step: int) -> None:
        started = time.perf_counter()
        settings = self.recipe.settings(step)
        mean, last = self._update(settings)
        seconds = time.perf_counter() - started
        self._require_finite(step, mean)
        state, (tokens, flops) = self.state, self.cadence.amounts()
        state.step += 1
        state.tokens += tokens
        state.flops += flops
        state.training_seconds += seconds
        state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * mean
        self._throughput.add(seconds, tokens, flops)
        self._report(step, mean, last, settings, seconds)
        if (step + 1) % GC_EVERY == 0:
            gc.collect()

    def _update(self, settings: StepSettings) -> tuple[float, float]:
        """Step the optimizer; return the mean loss, and that of the last micro-batch."""
        accum = self.cadence.grad_accum_steps
        total = torch.zeros((), device=self.runtime.device)
        for _ in range(accum):
            asked = time.perf_counter()
            inputs, targets = self.recipe.next_micro_batch()
            self._throughput.wait_seconds += time.perf_counter() - asked
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
        return (total / accum).item(), loss.item()  # waits for the device

    def _require_finite(self, step: int, loss: float) -> None:
        """Stop before a step that diverged gets into a checkpoint."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise ArcherChatError(
                f"float16 gradients overflow at step {step} however far they are scaled down: use "
                "--dtype float32 or bfloat16; the last checkpoint is intact"
            )
        if not math.isfinite(loss):
            raise ArcherChatError(
                f"the loss of step {step} is {loss}: lower the learning rates (--matrix-lr, "
                f"--embedding-lr), or use --dtype float32; the last checkpoint is intact"
            )

    def _report(
        self, step: int, loss: float, last: float, settings: StepSettings, seconds: float
    ) -> None:
        tokens, flops = self.cadence.amounts()
        rate = tokens / seconds
        mfu = self._throughput.mfu(flops, seconds)
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
        self.progress.step(
            StepReport(
                step=self.state.step,
                num_iterations=steps,
                loss=smooth,
                lr_multiplier=settings.lr_multiplier,
                tokens_per_second=rate,
                mfu=mfu,
                seconds_left=self._throughput.seconds_left(steps - self.state.step),
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
