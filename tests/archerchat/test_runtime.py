"""Choosing device and dtype, with hardware that this machine need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archerchat.errors import UsageError
from archerchat.runtime import (
    Runtime,
    build_runtime,
    choose_device,
    choose_dtype,
    cpu_name,
    prepare_process,
)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch report this hardware."""

    def set_hardware(
        cuda: int = 0, mps: bool = False, capability: tuple[int, int] = (8, 0), **flags: bool
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)

    set_hardware()
    return set_hardware


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({"cuda": 2, "mps": True}, CUDA),
        ({"mps": True}, torch.device("mps")),
        ({}, CPU),
    ],
)
def test_the_best_device_is_taken(
    pretend: Callable[..., None], hardware: dict[str, int], expected: torch.device
) -> None:
    pretend(**hardware)
    assert choose_device(None) == expected


def test_each_local_rank_gets_its_card(pretend: Callable[..., None]) -> None:
    pretend(cuda=4)
    assert choose_device(None, local_rank=3) == torch.device("cuda", 3)
    assert choose_device("cuda", local_rank=2) == torch.device("cuda", 2)
    assert choose_device("cuda:1", local_rank=2) == torch.device("cuda", 1)
    assert choose_device("cpu", local_rank=2) == CPU


@pytest.mark.parametrize(
    ("name", "cards", "local_rank", "messages"),
    [
        ("cuda", 0, 0, ("'cuda", "which has: cpu;")),
        ("cuda:2", 2, 0, ("'cuda:2'", "cuda:0-1, cpu")),
        (None, 2, 5, ("local rank 5", "cuda:0-1")),
        ("mps", 1, 0, ("'mps'", "which has: cuda, cpu")),
        ("tpu", 0, 0, ("'tpu'", "which has: cpu")),
        ("cuda:x", 1, 0, ("'cuda:x'", "leave --device out")),
        ("cpu:1", 0, 0, ("'cpu:1'", "cpu")),
    ],
)
def test_devices_that_are_not_here_are_named(
    pretend: Callable[..., None],
    name: str | None,
    cards: int,
    local_rank: int,
    messages: tuple[str, ...],
) -> None:
    pretend(cuda=cards)
    with pytest.raises(UsageError) as error:
        choose_device(name, local_rank)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("device", "hardware", "dtype", "reason"),
    [
        (CPU, {"amx_bf16": True}, torch.bfloat16, "AMX-BF16"),
        (CPU, {"avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
        (CPU, {"avx2": True}, torch.float32, "neither AMX-BF16 nor AVX512-BF16"),
        (CUDA, {"cuda": 1, "capability": (12, 0)}, torch.bfloat16, "sm120"),
        (CUDA, {"cuda": 1, "capability": (8, 0)}, torch.bfloat16, "sm80"),
        (CUDA, {"cuda": 1, "capability": (7, 5)}, torch.float32, "sm75 has no bfloat16"),
        (torch.device("mps"), {"mps": True}, torch.float32, "mps"),
    ],
)
def test_dtype_by_capability(
    pretend: Callable[..., None],
    device: torch.device,
    hardware: dict[str, bool],
    dtype: torch.dtype,
    reason: str,
) -> None:
    pretend(**hardware)
    chosen, why = choose_dtype(device, None)
    assert chosen == dtype
    assert reason in why


def test_a_forced_dtype_wins(pretend: Callable[..., None]) -> None:
    pretend(amx_bf16=True)
    assert choose_dtype(CPU, "float32") == (torch.float32, "forced")
    assert choose_dtype(CPU, "float16") == (torch.float16, "forced")
    with pytest.raises(UsageError, match="'int8' is not one of: bfloat16, float32, float16"):
        choose_dtype(CPU, "int8")


def test_build_runtime_puts_it_together(
    pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(cuda=8, capability=(9, 0))
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    runtime = build_runtime()
    assert (runtime.rank, runtime.local_rank, runtime.world_size) == (9, 1, 16)
    assert runtime.device == torch.device("cuda", 1)
    assert runtime.device_name == "card 1"
    assert runtime.compute_dtype == torch.bfloat16
    assert not runtime.is_master


def test_this_machines_cpu() -> None:
    runtime = build_runtime("cpu", "float32")
    assert runtime.is_master
    assert runtime.device_name
    runtime.synchronize()
    runtime.reset_peak_memory()
    before = runtime.peak_memory_bytes()
    ballast = torch.ones(64 * 2**20 // 4)
    assert runtime.peak_memory_bytes() >= max(before, ballast.nbytes)
    assert runtime.peak_memory_bytes() < runtime.total_memory_bytes()


def test_memory_and_synchronisation_reach_the_cuda_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def record(name: str, result: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda device: calls.append((name, device)) or result)

    record("synchronize")
    record("reset_peak_memory_stats")
    record("max_memory_allocated", 123)
    runtime = Runtime(torch.device("cuda", 3), torch.bfloat16, "card", "forced")
    runtime.synchronize()
    runtime.reset_peak_memory()
    assert runtime.peak_memory_bytes() == 123
    assert [name for name, _ in calls] == [
        "synchronize",
        "reset_peak_memory_stats",
        "max_memory_allocated",
    ]
    assert {device for _, device in calls} == {torch.device("cuda", 3)}


def test_cpu_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast   CPU @ 3 GHz\nmodel name\t: other\n")
    assert cpu_name(cpuinfo) == "Fast CPU @ 3 GHz"
    assert cpu_name(tmp_path / "missing")


def test_compiled_code_is_kept_apart_for_each_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime = build_runtime("cpu", "float32")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    places = []
    for kind in ("AVX2", "AVX512"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda kind=kind: kind)
        prepare_process(runtime)
        prepare_process(runtime)  # changes nothing more
        places.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert places[0] != places[1]
    assert [place.parent for place in places] == [tmp_path, tmp_path]
    assert all(torch.__version__ in place.name for place in places)


CTRL_C = """
import os, signal, subprocess, threading, time
from archerchat.runtime import StopRequest
told = []
stop = StopRequest(lambda: told.append(time.monotonic()) or "stopping")
with stop.listening():
    child = subprocess.Popen(["sleep", "3"])
    threading.Timer(0.2, os.killpg, [0, signal.SIGINT]).start()  # as a terminal does
    began = time.monotonic()
    child.wait()  # for three seconds
    assert stop.asked
    assert told[0] - began < 2, told[0] - began
assert child.returncode == 0, child.returncode
signal.raise_signal(signal.SIGINT)
"""


def test_ctrl_c_is_told_at_once_and_does_not_kill_a_compiler() -> None:
    """A killed one would leave half a file in torch's cache, and every later run would fail."""
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C], start_new_session=True, capture_output=True, text=True
    )
    assert done.stderr.startswith("\nstopping\n"), done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")  # afterwards it is Python's again
