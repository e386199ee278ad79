"""Checkpoints: safetensors plus JSON, written atomically, verified when read.

    <directory>/step_000020/
        model.safetensors  optimizer.safetensors  loader.safetensors  rng.safetensors ...
        meta.json          format, step, the caller's meta, the state that is not tensors,
                           every file's size and SHA-256, and its own SHA-256

Each section is the `state_dict` of one `Stateful` object: its tensors go into the section's file,
its other values into `meta.json`. There a float that JSON cannot hold is {"$float": "inf"} ("-inf",
"nan"). Nothing is pickled.

A step gets its name only after everything in it is on the disk, so the latest checkpoint loads even
if a process is killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from archerchat.config import decode_json, encode_json
from archerchat.errors import CheckpointError, UsageError
from archerchat.files import (
    FULL,
    STALE,
    UNREADABLE,
    current,
    new_directory,
    remove_directory,
    remove_leftovers,
    sha256_file,
    write_json,
)
from archerchat.home import Home, check_name

FORMAT = 2
META = "meta.json"
SUFFIX = ".safetensors"
STEP_NAME = re.compile(rf"(?:step_(\d{{6,}})|\.step_(\d{{6,}}){re.escape(STALE)})")


class _Damaged(CheckpointError):
    """A problem with a checkpoint, without a remedy yet."""


class Stateful(Protocol):
    """Anything whose state a checkpoint holds: loaders, the optimizer, the loop."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: tensors and JSON values by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from it; a CheckpointError, KeyError or ValueError if it does not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, or some of its sections."""

    step: int
    path: Path
    state: dict[str, dict[str, Any]]
    """Each section's state dict: tensors and JSON values."""
    meta: dict[str, Any]
    hashes: dict[str, str]
    """SHA-256 of each section's file, as it was when it was saved."""


def save_checkpoint(
    directory: Path,
    step: int,
    state: Mapping[str, Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    keep_last: int | None = None,
) -> Path:
    """Write one step's checkpoint, then prune older ones; return the step's directory.

    Tensors may be on any device, strided, and share storage; those that share it are stored
    separately. One section at a time is copied to the CPU.

    Args:
        directory: holds one directory per step; created if missing.
        step: replaced if it exists.
        state: each section's state dict: "model", "optimizer", "loader", ...
        meta: JSON values, and non-finite floats; tuples become lists.
        keep_last: number of complete checkpoints to keep, this one included; None keeps all.

    Raises:
        CheckpointError: the disk is full or cannot be written. Nothing half-written remains, and
            older checkpoints are untouched.
    """
    assert step >= 0, step
    assert keep_last is None or keep_last >= 1, keep_last
    values = {
        section: {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
        for section, entries in state.items()
    }
    encoded = json.dumps(encode_json({"state": values, "meta": meta}))  # fails before any writing
    content = {"format": FORMAT, "step": step, **json.loads(encoded)}
    path = directory / f"step_{step:06d}"
    try:
        remove_leftovers(directory)
        with new_directory(path) as temporary:
            content["files"] = _write_sections(temporary, state)
            write_json(temporary / META, {**content, "sha256": _digest(content)})
    except (OSError, SafetensorError) as error:
        entries = [each for section in state.values() for each in section.values()]
        needed = sum(each.nbytes for each in entries if isinstance(each, Tensor))
        raise CheckpointError(_explain_failed_save(error, path, needed)) from error
    if keep_last is not None:
        prune_checkpoints(directory, step, keep_last)
    return path


def replace_values(path: Path, section: str, values: Mapping[str, Any]) -> None:
    """Replace a saved section's values other than tensors, or raise a CheckpointError."""
    try:
        content = _read_meta(path)
        content["state"][section] = json.loads(json.dumps(encode_json(values)))
        write_json(path / META, {**content, "sha256": _digest(content)})
    except (_Damaged, OSError) as error:
        raise CheckpointError(f"cannot update {path}: {error}; it is as it was") from error


def _write_sections(
    directory: Path, state: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Write one file per section with tensors; return each file's size and checksum by name."""
    files = {}
    for section, entries in state.items():
        file = directory / (check_name(section, "section") + SUFFIX)
        if any(isinstance(value, Tensor) for value in entries.values()):
            save_file(_storable(entries), file)  # freed before the next is copied
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    return files


def _storable(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors, copied where safetensors needs it: strided, remote or aliased ones."""
    stored, storages = dict[str, Tensor](), set[int]()
    for name, value in entries.items():
        if isinstance(value, Tensor):
            local = value.detach().cpu().contiguous()
            storage = local.untyped_storage().data_ptr()
            stored[name] = local.clone() if storage in storages else local
            storages.add(storage)
    return stored


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _explain_failed_save(error: Exception, path: Path, needed: int) -> str:
    steps = ", ".join(f"step {step}" for step in list_checkpoints(path.parent))
    intact = f"still intact: {steps or 'none, this was the first'}"
    # safetensors reports the system's error only in its text.
    code = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    if number not in FULL:
        return f"cannot save {path}: {error}; {intact}; check its permissions and its disk"
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    return (
        f"cannot save {path}: the disk is full: {needed / 2**20:,.1f} MiB needed, "
        f"{free / 2**20:,.1f} MiB free; {intact}; free some space, keep fewer checkpoints, "
        "or move ARCHERCHAT_HOME to a larger disk"
    )


def prune_checkpoints(directory: Path, step: int, keep_last: int) -> None:
    """Delete complete checkpoints up to `step` beyond the newest `keep_last`."""
    steps = [s for s in list_checkpoints(directory) if s <= step]
    complete = [s for s in steps if _intact(find_checkpoint(directory, s), verify=False)]
    for old in complete[:-keep_last]:
        remove_directory(find_checkpoint(directory, old))


def _intact(path: Path, verify: bool) -> bool:
    try:
        for name, entry in _read_meta(path)["files"].items():
            _check_file(path / name, entry, verify)
    except CheckpointError:
        return False
    return True


def list_checkpoints(directory: Path) -> list[int]:
    """Return the steps saved in `directory`, ascending; none if it is no directory."""
    # `glob` would hide that a directory cannot be read.
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted({step for path in entries if (step := _step_of(path)) is not None})


def _step_of(path: Path) -> int | None:
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1] or match[2]) if match else None


def find_checkpoint(directory: Path, step: int | None = None) -> Path:
    """Return the path of `step` in `directory`, or of the latest step; a UsageError if none."""
    steps = list_checkpoints(directory)
    if not steps:
        raise UsageError(f"no checkpoint in {directory}: train a model first, or check the name")
    if step is not None and step not in steps:
        raise UsageError(f"no step {step} in {directory}; it holds {', '.join(map(str, steps))}")
    return current(directory / f"step_{steps[-1] if step is None else step:06d}")


def list_models(home: Home, stage: str) -> list[Path]:
    """Return the directories of a stage's models, by name."""
    directory = home.stage_dir(stage)
    entries = directory.iterdir() if directory.is_dir() else ()
    return [entry for entry in sorted(entries) if list_checkpoints(entry)]


def find_model(home: Home, stage: str, tag: str | None) -> Path:
    """Return the checkpoint directory of model `tag`; None means the model saved last.

    Raises:
        UsageError: there is no such model; the message lists the others.
    """
    models = {path.name: path for path in list_models(home, stage)}
    if models and tag is None:
        return max(models.values(), key=lambda model: saved_at(find_checkpoint(model)))
    if tag not in models:
        named = "" if tag is None else f" {tag!r}"
        command = "archerchat pretrain" if stage == "base" else f"archerchat {stage}"
        hint = f": make one with `{command}`, or import one"
        if models:
            hint = f"; there is {', '.join(models)}"
        elif stage == "sft" and list_models(home, "base"):
            hint += "; there is a base model, which --source base uses"
        raise UsageError(f"no {stage} model{named} under {home.stage_dir(stage)}{hint}")
    return models[tag]


def saved_at(path: Path) -> int:
    """Return the time of saving in nanoseconds since 1970."""
    meta = path / META
    return (meta if meta.exists() else path).stat().st_mtime_ns


def load_checkpoint(path: Path, sections: Iterable[str] | None = None) -> Checkpoint:
    """Read a step's directory, or only some of its `sections`, onto the CPU.

    Raises:
        CheckpointError: a file is missing, truncated or altered, the format is unknown, or
            there is no such section; the message names an earlier intact step.
    """
    try:
        content = _read_meta(path)
        files = {name.removesuffix(SUFFIX): entry for name, entry in content["files"].items()}
        values, meta = decode_json(content["state"]), decode_json(content["meta"])
        state, known = {}, sorted(files.keys() | values.keys())
        for name in known if sections is None else sections:
            if name not in known:
                raise CheckpointError(
                    f"{path} has no section {name!r}; it holds {', '.join(known)}"
                )
            state[name] = dict(values.get(name, {}))
            if name in files:
                file = path / (name + SUFFIX)
                _check_file(file, files[name], verify=True)
                state[name] |= load_file(file)
    except (_Damaged, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_remedy(path)}") from error
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    return Checkpoint(content["step"], path, state, meta, hashes)


def _read_meta(path: Path) -> dict[str, Any]:
    """Verify and return meta.json's content, in format 2 and without its checksum."""
    file = path / META
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        digest, format_version = content.pop("sha256"), content["format"]
    except FileNotFoundError as error:
        raise _Damaged(f"{file} is missing") from error
    except (*UNREADABLE, AttributeError, KeyError, TypeError) as error:
        raise _Damaged(f"{file} is not a checkpoint's JSON ({error})") from error
    if format_version not in (1, FORMAT):
        raise CheckpointError(
            f"{file} has format {format_version!r}, this version of archerchat reads 1 to "
            f"{FORMAT}: read it with the version that wrote it"
        )
    if digest != _digest(content):
        raise _Damaged(f"{file} does not match its checksum")
    return _upgrade(content) if format_version == 1 else content


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Turn format 1, which kept state in the caller's meta, into format 2."""
    meta = dict(content["meta"])
    state = {name: meta.pop(name) for name in ("loop", "loader", "scaler") if name in meta}
    if "optimizer_steps" in meta:
        state["optimizer"] = {"steps_taken": meta.pop("optimizer_steps")}
    return content | {"state": state, "meta": meta}


def _check_file(file: Path, entry: Mapping[str, Any], verify: bool) -> None:
    """Compare a file with its entry in meta.json."""
    if not file.is_file():
        raise _Damaged(f"{file.name} is missing")
    if (size := file.stat().st_size) != entry["bytes"]:
        raise _Damaged(f"{file.name} has {size} bytes instead of {entry['bytes']}")
    if verify and sha256_file(file) != entry["sha256"]:
        raise _Damaged(f"{file.name} does not match its checksum")


def _remedy(path: Path) -> str:
    """Name the newest earlier step whose files all match their checksums."""
    own = _step_of(path) or 0
    for step in reversed(list_checkpoints(path.parent)):
        if step < own and _intact(find_checkpoint(path.parent, step), verify=True):
            return f"step {step} in the same directory is intact: use that one"
    return "no earlier step in the same directory is intact: restore it from a copy"
