"""Checkpoints survive kills, full disks and bit rot, and say what is wrong with damaged ones."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat import checkpoint
from archerchat.checkpoint import (
    find_checkpoint,
    find_model,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from archerchat.config import compare_configs
from archerchat.errors import CheckpointError, UsageError
from archerchat.files import STALE
from archerchat.home import Home


def sections(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((4, 3), value), "scale": torch.tensor(value)},
        "optimizer.rank0": {"step": torch.tensor(7)},
    }


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same(left: Tensor, right: Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(bits(left), bits(right))


def test_every_kind_of_tensor_returns_bit_for_bit(tmp_path: Path) -> None:
    tied = torch.randn(8, 4)
    stored = {
        "float32": torch.tensor([1.0, -0.0, math.inf, math.nan]),
        "bfloat16": torch.randn(5, 3).bfloat16(),
        "float16": torch.randn(2).half(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "zero_dim": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(6, 4).t()[1:, ::2],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "tied": tied,
        "tied_again": tied,
        "tied_view": tied.view(-1)[3:9],
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    path = save_checkpoint(tmp_path, 20, {"model": stored, "empty": {}}, {})
    assert path == tmp_path / "step_000020"
    assert names(path) == ["meta.json", "model.safetensors"]
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.path, loaded.state["empty"]) == (20, path, {})
    assert loaded.state["model"].keys() == stored.keys()
    for name, tensor in stored.items():
        assert_same(tensor, loaded.state["model"][name])


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_saved(tmp_path: Path) -> None:
    weight = torch.randn(64, 3, device="cuda").t()
    path = save_checkpoint(tmp_path, 0, {"model": {"weight": weight}}, {})
    assert torch.equal(load_checkpoint(path).state["model"]["weight"], weight.cpu())


def test_meta_survives_json_with_its_non_finite_floats(tmp_path: Path) -> None:
    meta = {
        "best": math.inf,
        "history": [1.0, -math.inf, 0.1],
        "nested": {"nan": math.nan, "none": None, "text": "inf", "pair": (1, 2)},
    }
    path = save_checkpoint(tmp_path, 3, sections(), meta)
    json.loads((path / "meta.json").read_text(), parse_constant=pytest.fail)
    loaded = load_checkpoint(path).meta
    assert math.isnan(loaded["nested"].pop("nan"))
    assert loaded == {
        "best": math.inf,
        "history": [1.0, -math.inf, 0.1],
        "nested": {"none": None, "text": "inf", "pair": [1, 2]},
    }


def test_meta_that_json_cannot_hold_fails_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 3, sections(), {"path": tmp_path})
    assert names(tmp_path) == []


def test_only_the_sections_asked_for_are_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, sections(), {})
    (path / "optimizer.rank0.safetensors").write_bytes(b"broken")
    assert list(load_checkpoint(path, ["model"]).state) == ["model"]
    with pytest.raises(
        CheckpointError, match=r"no section 'rng'; it holds model, optimizer\.rank0"
    ):
        load_checkpoint(path, ["rng"])


def test_keep_last_prunes_only_older_complete_steps(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, sections(), {})
    (tmp_path / "step_000010" / "meta.json").unlink()
    save_checkpoint(tmp_path, 35, sections(), {}, keep_last=1)
    assert list_checkpoints(tmp_path) == [10, 35, 40]


def test_nothing_is_pruned_when_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 10, sections(), {})

    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"Permission denied.*still intact: step 10;"):
        save_checkpoint(tmp_path, 20, sections(), {}, keep_last=1)
    assert names(tmp_path) == ["step_000010"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        checkpoint.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("step", [10, 20])
def test_a_full_disk_is_explained_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, step: int
) -> None:
    save_checkpoint(tmp_path, 10, sections(1.0), {})

    def fill(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(
        CheckpointError, match=r"disk is full: 0.0 MiB needed, [\d,.]+ MiB free"
    ) as e:
        save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(3)}}, {})
    assert "still intact: step 10;" in str(e.value)
    assert names(tmp_path) == ["step_000010"]
    loaded = load_checkpoint(find_checkpoint(tmp_path))
    assert_same(loaded.state["model"]["weight"], torch.ones(4, 3))


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        save_checkpoint(mounted, 1, sections(), {})
        with pytest.raises(CheckpointError, match=r"3\.8 MiB needed, 1\.0 MiB free"):
            save_checkpoint(mounted, 2, {"model": {"w": torch.zeros(1_000_000)}}, {}, keep_last=1)
        assert names(mounted) == ["step_000001"]
        load_checkpoint(find_checkpoint(mounted))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_ctrl_c_in_the_middle_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 10, sections(), {})

    def interrupt(file: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 20, sections(), {}, keep_last=1)
    assert names(tmp_path) == ["step_000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(1)}, "old": {}}, {})
    path = save_checkpoint(tmp_path, 10, sections(2.0), {})
    assert load_checkpoint(path).state.keys() == {"model", "optimizer.rank0"}


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 10, sections(), {})
    path.rename(tmp_path / f".step_000010{STALE}")
    assert list_checkpoints(tmp_path) == [10]
    load_checkpoint(find_checkpoint(tmp_path, 10))
    save_checkpoint(tmp_path, 20, sections(), {})
    assert names(tmp_path) == ["step_000010", "step_000020"]


def test_temporaries_of_killed_processes_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".step_000010.xyz.tmp").mkdir()
    (tmp_path / ".step_000010.xyz.tmp" / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 20, sections(), {})
    assert names(tmp_path) == ["step_000020"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.rank0.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_an_intact_step_is_named(
    tmp_path: Path, file: str, damage: str
) -> None:
    for step in (10, 20, 30):
        path = save_checkpoint(tmp_path, step, sections(), {"loss": 1.25})
    (tmp_path / "step_000020" / "model.safetensors").write_bytes(b"also broken")
    broken = path / file
    content = bytearray(broken.read_bytes())
    if damage == "flip":
        place = content.index(b"1.25") if file == "meta.json" else len(content) - 2
        content[place] ^= 1
        broken.write_bytes(content)
    elif damage == "truncate":
        broken.write_bytes(content[:-9])
    else:
        broken.unlink()
    with pytest.raises(CheckpointError, match=r"step_000030 is damaged") as error:
        load_checkpoint(path)
    assert file in str(error.value)
    assert "step 10 in the same directory is intact" in str(error.value)


def test_without_a_good_step_the_message_says_so(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        path = save_checkpoint(tmp_path, step, sections(), {})
        (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no earlier step in the same directory is intact"):
        load_checkpoint(path)


def test_a_file_s_content_and_size_are_compared(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 10, {"model": {"w": torch.zeros(4)}}, {})
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(path)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"format": 1}', "\xff"])
def test_bad_json_is_named(tmp_path: Path, content: str) -> None:
    path = save_checkpoint(tmp_path, 10, sections(), {})
    (path / "meta.json").write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"step_000010 is damaged: .*meta\.json"):
        load_checkpoint(path)


def test_an_unknown_format_asks_for_the_version_that_wrote_it(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 10, sections(), {})
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version of archerchat reads 1 to 2"):
        load_checkpoint(path)
    later = save_checkpoint(tmp_path, 20, sections(), {})
    (later / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no earlier step"):
        load_checkpoint(later)


def test_a_directory_that_cannot_be_read_is_not_called_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    directory = home.checkpoint_dir("base", "d2")
    save_checkpoint(directory, 1, sections(), {})

    def refuse(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", refuse)
        patched.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match=r"denied: .*d2"):
            list_checkpoints(directory)
        with pytest.raises(PermissionError, match=r"denied: .*base"):
            find_model(home, "base", "d2")
    assert list_checkpoints(directory / "step_000001" / "meta.json") == []


def test_one_section_at_a_time_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    save_file = checkpoint.save_file

    class Section(dict[str, Tensor]):
        def items(self) -> Any:
            assert not any(copy() is not None for copy in copies), "the last section's are kept"
            return super().items()

    def save(tensors: dict[str, Tensor], file: Path) -> None:
        copies.extend(map(weakref.ref, tensors.values()))
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save)
    strided = {name: Section(weight=torch.ones(3, 4).t()) for name in ("model", "optimizer")}
    save_checkpoint(tmp_path, 1, strided, {})
    assert len(copies) == 2


def test_find_checkpoint_takes_the_latest_or_names_the_steps(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint in .*missing"):
        find_checkpoint(tmp_path / "missing")
    for step in (5, 1_000_000, 20):
        save_checkpoint(tmp_path, step, sections(), {})
    (tmp_path / "step_final").mkdir()
    assert list_checkpoints(tmp_path) == [5, 20, 1_000_000]
    assert find_checkpoint(tmp_path).name == "step_1000000"
    assert find_checkpoint(tmp_path, 5).name == "step_000005"
    with pytest.raises(UsageError, match=r"no step 6 in .*; it holds 5, 20, 1000000"):
        find_checkpoint(tmp_path, 6)


def test_find_model_takes_the_last_saved_or_names_the_tags(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(UsageError, match="no base model under"):
        find_model(home, "base", None)
    for order, (tag, step) in enumerate([("d4", 900), ("d8", 10), ("d12", 5)]):
        path = save_checkpoint(home.checkpoint_dir("base", tag), step, sections(), {})
        os.utime(path / "meta.json", ns=(0, 10 - order if tag == "d12" else order))
    home.checkpoint_dir("base", "empty").mkdir()
    assert find_model(home, "base", None).name == "d12"
    assert find_model(home, "base", "d4") == home.checkpoint_dir("base", "d4")
    for tag in ("d5", "empty", "../base/d4", ""):
        with pytest.raises(UsageError, match=f"model {tag!r} under .*; there is d12, d4, d8"):
            find_model(home, "base", tag)


def test_compare_configs_shows_the_first_difference_of_long_lists() -> None:
    shards = [[f"shard_{i:05d}.parquet", i] for i in range(5000)]
    changed = [*shards[:4000], ["shard_04000.parquet", 1], *shards[4001:]]
    assert compare_configs({"shards": shards}, {"shards": changed}) == [
        "shards: 5000 entries saved, 5000 now; 1 differ, the first: ['shard_04000.parquet', 4000] "
        "saved, ['shard_04000.parquet', 1] now"
    ]
    assert compare_configs({"shards": shards}, {"shards": shards[:3]}) == [
        "shards: 5000 entries saved, 3 now; 4997 differ, the first: ['shard_00003.parquet', 3] "
        "saved, none now"
    ]
    assert compare_configs({"shards": shards}, {"shards": list(shards)}) == []


def test_compare_configs_names_each_difference() -> None:
    saved = {"total_batch_size": 524288, "model": {"depth": 4, "pattern": "SSSL"}, "gone": None}
    now = {"total_batch_size": 65536, "model": {"depth": 4, "pattern": "L"}, "horizon": math.inf}
    assert compare_configs(saved, now) == [
        "gone: None saved, absent now",
        "horizon: absent saved, inf now",
        "model.pattern: 'SSSL' saved, 'L' now",
        "total_batch_size: 524288 saved, 65536 now",
    ]
    same = {"betas": (0.8, 0.95), "best": math.nan, "empty": {}}
    assert compare_configs({"betas": [0.8, 0.95], "best": math.nan, "empty": {}}, same) == []
