"""Whether a run may go on from a checkpoint, and with what state.

A run's identity is all that decides its weights. Some of it (`EXTENDABLE`) may be changed on
purpose with `--extend`; the shape of the model, the tokenizer, the data and the packing may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from archerchat.checkpoint import (
    Checkpoint,
    compare_configs,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
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


def find_start(
    directory: Path,
    identity: Mapping[str, Any],
    step: int | None,
    extend: bool,
    extendable: tuple[str, ...] = EXTENDABLE,
) -> Checkpoint | None:
    """Load the checkpoint to go on from, or return None where there is none yet.

    Args:
        directory: of the model's checkpoints.
        identity: of the run that is asked for; `num_iterations` is None where its data ends it.
        step: a certain checkpoint; None takes the latest.
        extend: allow the differences that `extendable` names.

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
            f"{path} has weights but no training state to go on with ({meta.get('source', '?')}): "
            "choose another --model-tag for a new run"
        )
    differences = compare_configs(meta["identity"], identity)
    refused = [d for d in differences if not (extend and d.startswith(extendable))]
    if refused:
        allowed = all(d.startswith(extendable) for d in refused)
        remedy = "go on with the new settings by --extend, or " if allowed and not extend else ""
        raise UsageError(
            f"{path} belongs to a different run: {'; '.join(refused)}. Use the saved settings to "
            f"resume it exactly, {remedy}choose another --model-tag for a new run"
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
        old_peaks: each group's rate at multiplier 1, which the batch scales too.
        new_peaks: the same groups' from now on.
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
    """Move the checkpoints after `path`, of the run as it was, where they cannot be resumed from.

    Returns:
        Where they are now, in `<tag>.before-step-<step>` beside the model's directory.
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
    """Return what differs without being part of the identity: results agree, but not to the bit."""
    names = ("hardware", "attention", "compile", "validation")
    return compare_configs(
        {name: saved.get(name) for name in names}, {name: current.get(name) for name in names}
    )


class Loader(Protocol):
    """What a checkpoint needs of a loader."""

    def close(self) -> None: ...


def loader_parts(loader: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a loader's state as JSON and tensors."""
    if hasattr(loader, "state_dict"):
        state = loader.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return {name: value for name, value in state.items() if name not in tensors}, tensors
    value, arrays = loader.state().to_parts()
    return value, {name: torch.from_numpy(array) for name, array in arrays.items()}


def restore_loader(loader: Any, checkpoint: Checkpoint, extend: bool) -> None:
    """Set the loader to the batch that follows the checkpoint.

    Raises:
        CheckpointError: the data or the packing are not those of the run.
    """
    tensors = checkpoint.tensors["loader"]
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict(checkpoint.meta["loader"] | tensors)
        return
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    loader.restore(loader.state().from_parts(checkpoint.meta["loader"], arrays), extend=extend)


def rng_tensors() -> dict[str, Tensor]:
    """Return the state of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set the generators whose state was saved and that exist here."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
