"""A run's checkpoints: which one it may resume from, and how the next is written.

A run's identity is everything that decides its weights. With `--extend` part of it (`EXTENDABLE`)
may change, but not the shape of the model, the tokenizer or the packing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

import archerchat
from archerchat.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_model,
    list_checkpoints,
    load_checkpoint,
    replace_values,
    save_checkpoint,
)
from archerchat.config import compare_configs, from_json
from archerchat.errors import CheckpointError, UsageError
from archerchat.files import hash_ends
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.optim.schedule import Schedule
from archerchat.training.stage import Stage

EXTENDABLE = (
    r"num_iterations|target_\w+|\w+_batch_size|learning_rates\.\w+|\w+_lr|weight_decay|warm\w+|"
    r"final_lr_frac"
)
"""What `--extend` lets change: horizon, batch, rates and schedule, in an identity and as flags."""
FREE_FLAGS = (
    r"device|attention|compile|run|push_checkpoints|tags|save_every|keep_last|(core|sample|eval)_\w+|"
    r"resume\w*|overwrite|extend|data_dir|val_jsonl|output_tag"
)
"""Flags that may change from one session of a run to the next."""
T = TypeVar("T")


class CheckpointWriter:
    """Write a run's checkpoints, each with `meta`, and prune older ones.

    `save` copies the state to the CPU and returns; a thread writes the copy while training
    continues. A process that is killed meanwhile leaves the previous checkpoint.
    """

    def __init__(self, directory: Path, meta: Mapping[str, Any], keep_last: int) -> None:
        self.directory, self.meta, self.keep_last = directory, meta, keep_last
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        """Wait for the previous checkpoint and start saving a step's state; raises as `wait`."""
        self.wait()
        staged = {
            section: {
                name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
            for section, entries in state.items()
        }
        meta = {**self.meta, "finished": finished}
        self._writing = self._pool.submit(
            save_checkpoint, self.directory, step, staged, meta, keep_last=self.keep_last
        )

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def note_measured(self, step: int, loop: Mapping[str, Any]) -> None:
        """Update a saved step with what was measured after it was saved."""
        if (path := self.find(step)) is not None:
            replace_values(path, "loop", loop)

    def find(self, step: int) -> Path | None:
        """Return the path of a step's checkpoint, if there is one, once it is written."""
        self.wait()
        saved = step in list_checkpoints(self.directory)
        return find_checkpoint(self.directory, step) if saved else None


def load_settings(kind: type[T], home: Home, stage: str, tag: str) -> T:
    """Return the settings of a model's last checkpoint, as a configuration that resumes its run.

    Raises:
        UsageError: there is no such model.
        CheckpointError: its checkpoint is damaged, or has no training state.
    """
    path = find_checkpoint(find_model(home, stage, tag))
    meta = load_checkpoint(path, sections=()).meta
    identity = _identity(path, meta)
    saved = {**meta["config"], "extend": False, "dtype": identity["dtype"]}
    now = {"resume": tag, "resume_from_step": None, "overwrite": False}
    # Earlier versions saved these options outside the group.
    saved["checkpoint"] = {**saved, **saved.get("checkpoint", {}), **now}
    if stage == "base":
        saved["model_tag"] = tag
    else:
        base = identity["base"]
        saved |= {"output_tag": tag, "model_tag": base["tag"], "model_step": base["step"]}
    return from_json(kind, saved)


def _identity(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    if "identity" not in meta:
        raise CheckpointError(
            f"{path} has weights but no training state to resume ({meta.get('source', '?')}): "
            f"choose another {_tag_flag(meta)} for a new run"
        )
    identity: dict[str, Any] = meta["identity"]
    if "model" in identity:  # saved before these settings existed, perhaps
        model = {"model": asdict(ModelConfig(**identity["model"]))}
        identity = {"fp8": False, "optimizer_state": "float32"} | identity | model
    return identity


def _tag_flag(meta: Mapping[str, Any]) -> str:
    return "--model-tag" if meta.get("stage", "base") == "base" else "--output-tag"


def find_start(stage: Stage) -> Checkpoint | None:
    """Load the checkpoint to resume from, the same on all ranks; return None for a new run.

    Raises:
        UsageError: the saved run is a different one, or is past the horizon, or options contradict
            each other or what is saved.
        CheckpointError: the checkpoint is damaged, or holds a model without training state.
    """
    stage.__dict__.pop("saved", None)  # read before the directory was locked: look again
    asked, saved = stage.config.checkpoint, stage.saved
    goes_back, start = asked.resume_from_step is not None, None
    if asked.overwrite and (asked.resume or stage.extend or goes_back):
        others = "--resume, --resume-from-step and --extend"
        raise UsageError(f"--overwrite starts over, and {others} do not: give one or the other")
    if saved is not None:
        start = _load_start(stage, saved)
    elif stage.extend or goes_back:
        flag = "--resume-from-step" if goes_back else "--extend"
        raise UsageError(f"no checkpoint in {stage.directory}: leave {flag} out")
    _require_same_run(stage, start.step if start else 0)
    return start


def _load_start(stage: Stage, saved: Checkpoint) -> Checkpoint:
    identity, is_imported = stage.meta["identity"], "identity" not in saved.meta
    if is_imported and stage.extend:
        _require_same_model(saved, stage.meta)
    else:
        _require_same_settings(saved, stage)
    start, horizon = load_checkpoint(saved.path), identity["num_iterations"]
    if horizon is not None and start.step > horizon:
        raise UsageError(
            f"{saved.path} is past the horizon of {horizon} steps: give more steps, "
            "or an earlier checkpoint by --resume-from-step"
        )
    if is_imported:
        tokens = start.step * identity["total_batch_size"]
        start.state["loop"] = {"step": start.step, "first_smoothed": start.step, "tokens": tokens}
    return start


def _require_same_model(saved: Checkpoint, current: Mapping[str, Any]) -> None:
    """Refuse another trainer's checkpoint if a run of this model cannot continue from it."""

    def shape(meta: Mapping[str, Any]) -> dict[str, Any]:
        fingerprint = (meta["tokenizer"] or {}).get("fingerprint")
        return {"model_config": meta["model_config"], "tokenizer": {"fingerprint": fingerprint}}

    if differences := compare_configs(shape(saved.meta), shape(current)):
        raise UsageError(f"{saved.path} is another model than this run's: {'; '.join(differences)}")
    if "optimizer" not in saved.hashes:
        raise UsageError(
            f"{saved.path} was imported without optimizer state, so its run cannot be continued: "
            "import it again from a folder that has it"
        )


def _require_same_settings(saved: Checkpoint, stage: Stage) -> None:
    """Refuse a checkpoint of a different run."""
    path, meta, extend = saved.path, saved.meta, stage.extend
    free = r"base\.tag"  # a base model of the same weights may have been renamed
    if not isinstance(stage.config.device_batch_size, int):  # they were chosen for this machine
        free += r"|(rollouts\.)?device_batch_size"
    free += f"|{EXTENDABLE}" if extend else ""
    differences = compare_configs(_identity(path, meta), stage.meta["identity"])
    refused = [line for line in differences if not re.match(f"({free}): ", line)]
    if not refused:
        return
    extends = stage.name == "base" and not extend  # no other stage has --extend
    extends = extends and all(re.match(f"({EXTENDABLE}): ", line) for line in refused)
    remedy = "continue with the new settings by --extend, or " if extends else ""
    shown = _changed_flags(meta, stage.meta, extend) or refused
    raise UsageError(
        f"{path} belongs to a different run: {'; '.join(shown)}. Resume it with its saved "
        f"settings by --resume {path.parent.name}, {remedy}choose another {_tag_flag(meta)} "
        "for a new run, or start this one over by --overwrite"
    )


def _changed_flags(saved: Mapping[str, Any], current: Mapping[str, Any], extend: bool) -> list[str]:
    """Return one line for each flag whose value differs from the saved run's.

    Flags that resolve to the same value, such as a default given explicitly, do not differ.
    """
    lines, before, now = [], saved["identity"], current["identity"]
    free = f"{FREE_FLAGS}|{EXTENDABLE}" if extend else FREE_FLAGS
    for line in compare_configs(saved["config"], current["config"]):
        name, _, values = line.partition(": ")
        flag = name.rpartition(".")[2]
        decides = "base" if flag in ("model_tag", "model_step", "source") else flag
        same = before.get(decides) == now.get(decides) and decides in {"base", *now}
        if not (same or re.fullmatch(free, flag) or values.startswith("absent")):
            lines.append(f"--{flag.replace('_', '-')}: {values.replace('None', 'none')}")
    return lines


def _require_same_run(stage: Stage, step: int) -> None:
    """Compare the ranks' settings, code, data files and first step; all of them raise."""
    if stage.ranks.world_size == 1:
        return
    code = sorted(Path(archerchat.__file__).parent.rglob("*.py"))
    own = {name: stage.meta[name] for name in ("identity", "validation", "compile")} | {
        "archerchat": f"{archerchat.__version__} {hash_ends(*code)}",
        "data": {path.name: hash_ends(path) for path in stage.files},
        "step": step,
    }
    first, *others = stage.ranks.gather(own)
    for rank, run in enumerate(others, start=1):
        if differences := compare_configs(first, run):
            raise UsageError(
                f"rank {rank} would train a different run than rank 0 (rank 0's values are called "
                f"saved): {'; '.join(differences)}. Start all ranks with the same command, code "
                "and data"
            )


def prepare_extension(stage: Stage, start: Checkpoint) -> list[str]:
    """Move later checkpoints aside; return lines about what `--extend` changes."""
    if "schedule" not in start.meta:
        return ["continuing an imported run: its text begins again with the first shard"]
    lines, moved = [describe_extension(start.meta, stage.meta, start.step)], set_aside(start.path)
    return lines + [f"moved {path.name} of the earlier run to {path.parent}" for path in moved]


def describe_extension(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> str:
    """Describe what `--extend` does to the learning rate from `step` on, by the runs' metas."""
    before, after = (Schedule(**meta["schedule"]) for meta in (saved, current))
    old_peaks, new_peaks = (meta["identity"]["learning_rates"] for meta in (saved, current))
    old = before.lr_multiplier(min(step, before.num_iterations - 1))
    new, last = (after.lr_multiplier(at) for at in (step, after.num_iterations - 1))
    falls = f", falls from step {after.warmdown_start}" if step < after.warmdown_start else ""
    text = (
        f"extending at step {step} of {before.num_iterations} to {after.num_iterations} steps: "
        f"the learning rate goes from x{old:.3f} to x{new:.3f}{falls}, ends at x{last:.3f}"
    )
    pairs = {name: (old_peaks[name], peak) for name, peak in new_peaks.items()}
    changed = [f"{n} {was:.3g} to {peak:.3g}" for n, (was, peak) in pairs.items() if was != peak]
    text += f"; the peak rates change: {', '.join(changed)}" if changed else ""
    jump = max((peak / was for was, peak in pairs.values() if was), default=1.0) * new / old
    if jump > 1.5:
        text += (
            f"\nwarning: that is {jump:.1f} times the rate that was planned there; the loss will "
            "rise at first, and what the warm-down gained is lost"
        )
    return text


def set_aside(path: Path) -> list[Path]:
    """Move checkpoints later than `path` aside, so that no run resumes from them.

    They go to a directory `<tag>.before-step-<step>` next to the model's. Return their new paths.
    """
    directory, step = path.parent, int(path.name.removeprefix("step_"))
    later = [find_checkpoint(directory, s) for s in list_checkpoints(directory) if s > step]
    if not later:
        return []
    name = f"{directory.name}.before-step-{step}"
    names = chain([name], (f"{name}.{number}" for number in count(2)))
    aside = next(place for place in map(directory.with_name, names) if not place.exists())
    aside.mkdir()
    return [other.rename(aside / other.name) for other in later]


def changed_circumstances(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return differences after which results match closely, but not bit for bit."""
    names = ("hardware", "attention", "compile", "validation")
    before, now = ({name: meta.get(name) for name in names} for meta in (saved, current))
    return compare_configs(before, now)
