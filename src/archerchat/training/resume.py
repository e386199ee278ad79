"""A run's checkpoints: which one it may resume from, and how it writes the next.

A run's identity is everything that decides its weights. `--extend` allows part of it
(`EXTENDABLE`) to change; the shape of the model, the tokenizer and the packing stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    replace_values,
    save_checkpoint,
)
from archerchat.config import compare_configs
from archerchat.errors import CheckpointError, UsageError
from archerchat.optim.schedule import Schedule

EXTENDABLE = (
    "num_iterations",
    "total_batch_size",
    "device_batch_size",
    "learning_rates.",
    "weight_decay",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_frac",
)


@dataclass(frozen=True)
class CheckpointWriter:
    """Write a run's checkpoints and prune older ones."""

    directory: Path
    meta: Mapping[str, Any]
    """Kept with each of them; `identity` in it decides who may resume."""
    keep_last: int

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        """Save a step's state.

        Raises:
            CheckpointError: it cannot be written; older checkpoints are untouched.
        """
        meta = {**self.meta, "finished": finished}
        save_checkpoint(self.directory, step, state, meta, keep_last=self.keep_last)

    def note_measured(self, step: int, loop: Mapping[str, Any]) -> None:
        """Let a saved step know what was measured after it was saved."""
        if (path := self.find(step)) is not None:
            replace_values(path, "loop", loop)

    def find(self, step: int) -> Path | None:
        """Return the path of a step's checkpoint, if there is one."""
        saved = step in list_checkpoints(self.directory)
        return find_checkpoint(self.directory, step) if saved else None


def find_start(
    directory: Path, identity: Mapping[str, Any], step: int | None, extend: bool = False
) -> Checkpoint | None:
    """Load the checkpoint to resume from, or return None if the model has none yet.

    Args:
        directory: the model's checkpoints.
        identity: identity of the run that is asked for; its `num_iterations` is None where the
            data decides the end.
        step: the checkpoint to take; None takes the latest.
        extend: allow differences in what `EXTENDABLE` names.

    Raises:
        UsageError: the run there is another one, and how; or there is no such step; or it is past
            the horizon.
        CheckpointError: the checkpoint is damaged, or holds a model without training state.
    """
    if not list_checkpoints(directory):
        if step is not None:
            raise UsageError(f"no checkpoint in {directory}: leave --resume-from-step out")
        if extend:
            raise UsageError(f"no checkpoint in {directory} to extend: leave --extend out")
        return None
    path = find_checkpoint(directory, step)
    meta = load_checkpoint(path, sections=()).meta
    if "identity" not in meta:
        raise CheckpointError(
            f"{path} has weights but no training state to resume ({meta.get('source', '?')}): "
            "choose another --model-tag for a new run"
        )
    differences = compare_configs(meta["identity"], identity)
    # A base model of the same weights may have been renamed.
    differences = [d for d in differences if not d.startswith("base.tag:")]
    refused = [d for d in differences if not (extend and d.startswith(EXTENDABLE))]
    if refused:
        base = meta.get("stage", "base") == "base"  # the only stage that has --extend
        allowed = base and not extend and all(d.startswith(EXTENDABLE) for d in refused)
        remedy = "continue with the new settings by --extend, or " if allowed else ""
        tag = "--model-tag" if base else "--output-tag"
        raise UsageError(
            f"{path} belongs to a different run: {'; '.join(refused)}. Use the saved settings to "
            f"resume it exactly, {remedy}choose another {tag} for a new run"
        )
    start = load_checkpoint(path)
    horizon = identity["num_iterations"]
    if horizon is not None and start.step > horizon:
        raise UsageError(
            f"{path} is past the horizon of {horizon} steps: give more steps, "
            "or an earlier checkpoint by --resume-from-step"
        )
    return start


def describe_extension(
    before: Schedule,
    after: Schedule,
    step: int,
    old_peaks: Mapping[str, float],
    new_peaks: Mapping[str, float],
) -> str:
    """Say what `--extend` does to the learning rate at `step` and after it.

    Args:
        old_peaks: the saved run's learning rate of each group at multiplier 1.
        new_peaks: the new rates of the same groups.
    """
    old = before.lr_multiplier(min(step, before.num_iterations - 1))
    new = after.lr_multiplier(step)
    text = (
        f"extending at step {step} of {before.num_iterations} to {after.num_iterations} steps: "
        f"the learning rate goes from x{old:.3f} to x{new:.3f}"
    )
    if step < after.warmdown_start:
        text += f", falls from step {after.warmdown_start}"
    text += f", ends at x{after.lr_multiplier(after.num_iterations - 1):.3f}"
    changed = {name: peak for name, peak in new_peaks.items() if peak != old_peaks[name]}
    if changed:
        shown = (f"{name} {old_peaks[name]:.3g} to {peak:.3g}" for name, peak in changed.items())
        text += f"; x1 itself changes: {', '.join(shown)}"
    growth = max((new_peaks[name] / peak for name, peak in old_peaks.items() if peak), default=1.0)
    jump = growth * new / old
    if jump > 1.5:
        text += f"\nwarning: that is {jump:.1f} times the rate that was planned there; the loss "
        text += "will rise at first, and what the warm-down gained is lost"
    return text


def set_aside_later(path: Path) -> list[Path]:
    """Move later checkpoints than `path` out of the run's way, so that none is resumed from.

    Returns:
        Their new places, in `<tag>.before-step-<step>` beside the model's directory.
    """
    directory, step = path.parent, int(path.name.removeprefix("step_"))
    later = [find_checkpoint(directory, other) for other in list_checkpoints(directory)]
    later = [other for other in later if int(other.name.removeprefix("step_")) > step]
    if not later:
        return []
    aside = directory.with_name(f"{directory.name}.before-step-{step}")
    suffix = 1
    while aside.exists():
        suffix += 1
        aside = directory.with_name(f"{directory.name}.before-step-{step}.{suffix}")
    aside.mkdir()
    return [other.rename(aside / other.name) for other in later]


def changed_circumstances(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return differences after which results match closely, but not bit for bit."""
    names = ("hardware", "attention", "compile", "validation")
    return compare_configs(
        {name: saved.get(name) for name in names}, {name: current.get(name) for name in names}
    )
