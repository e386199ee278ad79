"""THE step loop: accumulation, timing, cadence, checkpoints, resume.

A recipe provides micro-batches, a loss, the settings of each step, evaluations and samples. Before
each step, and after the last one, the loop saves, evaluates and samples what is due, in this order:
a long evaluation that crashes loses no training. Ctrl-C and SIGTERM end the loop with a checkpoint,
after the current step or in the middle of an evaluation; a second signal ends the process at once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, cast

import torch

from archerchat.checkpoint import Stateful
from archerchat.console import ProgressLine, duration_text
from archerchat.errors import ArcherChatError, CheckpointError
from archerchat.optim.optimizer import MuonGroup
from archerchat.runtime import StopRequest, explained_memory
from archerchat.training.recipe import Evaluation, Recipe, StepSettings
from archerchat.training.resume import CheckpointWriter
from archerchat.training.state import LoopState, Speed
from archerchat.training.telemetry import MetricsLog, Occasion

GC_EVERY = 5000
SAVE_SECONDS = 900.0
"""Time between checkpoints that are saved by time."""
SMALLEST_SCALE = 2.0**-10
"""Gradient scale below which halving it again will not help."""


class Loop(Stateful):
    """Train a recipe to its last step.

    Args:
        peak: peak rate of all devices together, in floating-point operations per second.
        save_every: steps between checkpoints, or "time"; the last step is always saved.
        sample_every: steps between samples; None never samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        peak: float,
        save_every: int | Literal["time"] | None = None,
        sample_every: int | None = None,
    ) -> None:
        self.recipe, self.optimizer, self.runtime = recipe, recipe.optimizer, recipe.runtime
        self.ranks, self.speed = recipe.optimizer.ranks, Speed(peak)
        self.save_every, self.sample_every = save_every, sample_every
        self.state = LoopState()
        is_float16 = self.runtime.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=is_float16)
        self._stop = StopRequest(self._describe_stop)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint's sections: the recipe's and the loop's own."""
        own = {"loop": asdict(self.state), "scaler": dict(self.scaler.state_dict())}
        return {**self.recipe.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; raise `CheckpointError` if it does not fit."""
        try:
            self.recipe.load_state_dict(state)
            self.state = LoopState(**state["loop"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(dict(state["scaler"]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error!r}") from error

    def run(
        self, checkpoints: CheckpointWriter, metrics: MetricsLog, progress: ProgressLine
    ) -> bool:
        """Train until the last step is done or a signal asks to stop; return whether it is done."""
        self.checkpoints, self.metrics, self.progress = checkpoints, metrics, progress
        self.recipe.progress = progress
        self._saved_step, self._saved_at = self.state.step, time.monotonic()
        self._unsettled: tuple[int, float, dict[str, float]] | None = None
        with self._stop.listening(), _without_gc(), explained_memory():
            try:
                return self._run_steps()
            finally:  # what was saved is complete, also where a later step fails
                checkpoints.wait()

    def _run_steps(self) -> bool:
        first_step = self.state.step
        while True:
            step = self.state.step
            finished = step == self.recipe.total_steps(step)
            self._do_due(step, finished)
            stopping = self._stopping()
            if stopping or finished:
                self._save(finished)
                self._settle()
                if stopping:
                    self.metrics.finish("interrupted")
                return not stopping
            self._train_step(step)
            if self._unsettled and not self.checkpoints.is_writing:
                self._settle()
            if step == first_step:
                gc.collect()
                gc.freeze()

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop: then all of them stop at the same place."""
        return self.ranks.any(self._stop.asked)[0]

    def _describe_stop(self) -> str:
        """Describe what a first Ctrl-C does now, and what a second one would do."""
        after = ""
        if self.speed.marks:
            left = self.speed.seconds_left_of_step(self.recipe.grad_accum_steps)
            after = " after this step" + (f" (about {duration_text(left)})" if left else "")
        step = self._saved_step
        kept = f"the checkpoint of step {step} remains" if step else "no checkpoint is saved yet"
        return f"stopping{after} and saving; press Ctrl-C again to stop at once: {kept}"

    def _do_due(self, step: int, finished: bool) -> None:
        """Save, evaluate and sample what is due at `step`."""
        if finished or self._save_due(step):
            self._save(finished)
        # The best checkpoint can only be pushed where one was saved before the evaluation.
        saves = self.save_every == "time" and self.metrics.push_checkpoints == "best"
        for evaluation in self.recipe.evaluations:
            due = _due(evaluation.every, step, finished) and (step > 0 or evaluation.at_start)
            if due and not self._stopping():
                if saves or evaluation.slow:
                    self._save(finished)
                self._evaluate(step, evaluation)
        if step > 0 and _due(self.sample_every, step, finished) and not self._stopping():
            self._sample(step)

    def _save_due(self, step: int) -> bool:
        if self.save_every == "time":
            return self.ranks.any(time.monotonic() - self._saved_at >= SAVE_SECONDS)[0]
        return _due(self.save_every, step)

    def _train_step(self, step: int) -> None:
        started = time.perf_counter()
        self.speed.marks = [started]
        settings = self.recipe.settings(step)
        mean, last = self._update(settings)
        seconds = time.perf_counter() - started
        self._require_finite(step, mean)
        tokens, flops = self.recipe.step_tokens(), self.recipe.step_flops()
        self.speed.seconds.append(seconds)
        for total in (self.state, self.speed):
            total.tokens += tokens
            total.flops += flops
        self.state.note_step(mean, seconds)
        self._report(step, settings, mean, last)
        self.speed.marks = []
        if (step + 1) % GC_EVERY == 0:
            gc.collect()

    def _update(self, settings: StepSettings) -> tuple[float, float]:
        """Step the optimizer; return the mean loss, and that of the last micro-batch."""
        accum = self.recipe.grad_accum_steps
        total = torch.zeros((), device=self.runtime.device)
        for _ in range(accum):
            asked = time.perf_counter()
            inputs, targets = self.recipe.next_micro_batch()
            self.speed.wait_seconds += time.perf_counter() - asked
            loss = self.recipe.loss(inputs, targets)
            share = loss / (accum * self.ranks.world_size)  # the optimizer sums over the ranks
            self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            self.speed.marks.append(time.perf_counter())
        torch_optimizer = cast(torch.optim.Optimizer, self.optimizer)
        self.scaler.unscale_(torch_optimizer)
        if self.scaler.is_enabled():  # a step that one rank skips is skipped by all
            for found in self.scaler._found_inf_per_device(torch_optimizer).values():
                self.ranks.start_sum(found).wait()
        self.scaler.step(torch_optimizer, *settings)
        self.scaler.update()
        self.optimizer.zero_grad()
        mean, last = torch.stack((total / accum, loss.detach())).tolist()  # waits for the device
        mean, last = self.ranks.mean(mean, last)
        return mean, last

    def _require_finite(self, step: int, loss: float) -> None:
        """Stop before a diverged step is saved."""
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

    def _report(self, step: int, settings: StepSettings, loss: float, last: float) -> None:
        """Log and show a step's figures."""
        state, done, seconds = self.state, self.state.step, self.speed.seconds[-1]
        metrics: dict[str, float] = {
            "train/loss": loss,
            "train/last_micro_batch_loss": last,
            "train/smooth_loss": state.average_loss,
            "train/lr_multiplier": settings.lr_multiplier,
            "train/muon_momentum": settings.muon_momentum,
            "train/muon_weight_decay": settings.muon_weight_decay,
            "train/tokens_per_second": self.recipe.step_tokens() / seconds,
            "train/mfu": self.recipe.step_flops() / seconds / self.speed.peak,
            "train/seconds": state.training_seconds,
            "train/tokens": state.tokens,
            "train/flops": state.flops,
            "train/memory_bytes": self.runtime.peak_memory_bytes(),
        }
        # One rate shows the schedule: that of Muon, whose groups come last.
        if isinstance(group := self.optimizer.groups[-1], MuonGroup):
            metrics["train/matrix_lr"] = group.rate * settings.lr_multiplier
        if self.scaler.is_enabled():
            metrics["train/grad_scale"] = self.scaler.get_scale()
        metrics |= self.recipe.step_metrics()
        self.metrics.log(metrics, step)
        steps = self.recipe.total_steps(done)
        left = self.speed.seconds_left(steps - done)
        self.progress.step(done, steps, metrics, left)

    def _evaluate(self, step: int, evaluation: Evaluation) -> None:
        started, measure = time.perf_counter(), evaluation.measure
        alone = self.ranks.world_size == 1  # others would wait for one that a signal interrupts
        values = self._stop.interruptible(measure) if alone else measure()
        if values is None:
            return
        seconds = time.perf_counter() - started
        self.metrics.log({**values, evaluation.seconds_name: seconds}, step)
        if self.recipe.metric.name in values:
            self._note_metric(values[self.recipe.metric.name])
        shown = ", ".join(f"{k} {value:.4f}" for k, value in values.items() if k.count("/") == 1)
        self.progress.note(f"step {step}: {shown} ({seconds:.1f} s)")

    def _note_metric(self, value: float) -> None:
        """Record the metric's value; push this step's checkpoint if it is the best so far."""
        self._settle()
        state, metric = self.state, self.recipe.metric
        state.note_metric(metric, value)
        if state.overfitting:
            self.progress.note(
                f"warning: {metric.label} gets worse while the training loss falls: the model "
                "memorises its training data. More data or fewer steps would help"
            )
        if 0 < state.step == self._saved_step:
            score = metric.score(value)
            is_best = score < state.best_saved
            state.best_saved = min(state.best_saved, score)
            if self.ranks.is_master:
                self.checkpoints.note_measured(state.step, asdict(state))
            if is_best:
                self._push(state.step, "best", {metric.name: value})

    def _sample(self, step: int) -> None:
        if not self.ranks.is_master:
            return
        texts = self._stop.interruptible(self.recipe.sample) or {}
        for name, text in texts.items():
            self.metrics.log_text(f"sample/{name}", text, step)
            self.progress.note(f"step {step}: {text!r}")

    def _save(self, finished: bool) -> None:
        """Start saving the state of this step, once."""
        step = self.state.step
        if self._saved_step == step:
            return
        self._settle()
        started = time.perf_counter()
        content = self.state_dict()  # on all ranks: it collects what they share
        if self.ranks.is_master:
            self.checkpoints.save(step, content, finished)
        self._saved_step, self._saved_at = step, time.monotonic()
        seconds = time.perf_counter() - started
        metadata = {"train/tokens": self.state.tokens, "train/smooth_loss": self.state.average_loss}
        self._unsettled = step, seconds, metadata

    def _settle(self) -> None:
        """Wait until the last checkpoint is written, then report and push it."""
        if self.ranks.is_master:
            self.checkpoints.wait()
        if self._unsettled is not None:
            (step, seconds, metadata), self._unsettled = self._unsettled, None
            self.progress.note(f"step {step}: checkpoint saved (training waited {seconds:.1f} s)")
            self._push(step, "last", metadata)

    def _push(self, step: int, occasion: Occasion, metadata: Mapping[str, float]) -> None:
        """Push a step's checkpoint if the user wants those of this occasion."""
        if self.ranks.is_master and (path := self.checkpoints.find(step)):
            problem = self.metrics.push_checkpoint(path, step, occasion, metadata)
            if problem:
                self.progress.note(f"step {step}: the checkpoint is not pushed: {problem}")


@contextmanager
def _without_gc() -> Iterator[None]:
    """Collect garbage only when the loop asks for it, since a collection would stall a step."""
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def _due(every: int | None, step: int, finished: bool = False) -> bool:
    return every is not None and (finished or step % every == 0)
