"""Sensors that are there are read; one that fails is left out, and stops nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from endlex.client.directories import claim_directory
from endlex.client.shipper.system_stats import SystemRecorder, sensors, take_sample
from endlex.reading import end_status, read_journal


class Nvml:
    """Two cards; the second one does not tell its power."""

    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, card: int) -> Any:
        return SimpleNamespace(gpu=90 + card)

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:
        return SimpleNamespace(used=25, total=100)

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:
        if card:
            raise RuntimeError("not supported")
        return 300_000

    def nvmlDeviceGetTemperature(self, card: int, kind: int) -> int:
        return 60


class Psutil:
    """A machine that sends 1,000 bytes between any two looks."""

    sent = 0

    def cpu_percent(self, interval: None) -> float:
        return 12.5

    def virtual_memory(self) -> Any:
        return SimpleNamespace(percent=40.0, total=100, available=60)

    def net_io_counters(self, pernic: bool) -> Any:
        self.sent += 1000
        count = SimpleNamespace(bytes_sent=self.sent, bytes_recv=0)
        return {"eth0": count, "lo": SimpleNamespace(bytes_sent=10**9, bytes_recv=10**9)}


def use(monkeypatch: pytest.MonkeyPatch, **libraries: Any) -> None:
    for name in ("psutil", "pynvml"):
        monkeypatch.setitem(sys.modules, name, libraries.get(name))  # None: it is not installed


def test_without_libraries_there_are_disks_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    (tmp_path / "home").mkdir()
    values = take_sample(sensors(tmp_path))
    assert values["system/disk_free_bytes"] > 0
    assert values["system/home_free_bytes"] > 0
    assert values["system/load"] >= 0
    assert len(values) == 3


def test_what_the_libraries_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, psutil=Psutil(), pynvml=Nvml())
    found = sensors(tmp_path)
    take_sample(found)
    values = take_sample(found)
    assert values["system/cpu_percent"] == 12.5
    assert (values["system/memory_percent"], values["system/memory_bytes"]) == (40.0, 40)
    assert values["system/net_sent_bytes_per_second"] > 0
    assert values["system/net_received_bytes_per_second"] == 0
    assert values["system/gpu.0/utilization_percent"] == 90
    assert values["system/gpu.1/utilization_percent"] == 91
    assert values["system/gpu.0/power_watts"] == 300
    assert "system/gpu.1/power_watts" not in values
    assert values["system/gpu.1/memory_percent"] == 25
    assert values["system/gpu.1/temperature_c"] == 60


def test_no_driver_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("driver not loaded")

    broken = Nvml()
    broken.nvmlInit = no_driver  # type: ignore[method-assign]
    use(monkeypatch, pynvml=broken)
    assert not any("gpu" in name for name in take_sample(sensors(tmp_path)))


def test_a_network_that_may_not_be_read_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pernic: bool) -> None:
        raise PermissionError("/proc/net/dev")

    closed = Psutil()
    closed.net_io_counters = refuse  # type: ignore[method-assign, assignment]
    use(monkeypatch, psutil=closed)
    (tmp_path / "home").mkdir()
    values = take_sample(sensors(tmp_path))
    assert values["system/cpu_percent"] == 12.5
    assert not any("net" in name for name in values)


def test_the_real_libraries_if_they_are_here(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    values = take_sample(sensors(tmp_path))
    assert all(value >= 0 for value in values.values())


def test_samples_are_a_session_of_kind_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    use(monkeypatch, psutil=Psutil())
    owner = claim_directory(tmp_path, "abcdefgh", "p", "d4")
    recorder = SystemRecorder(tmp_path, owner, seconds=0.01)
    until(lambda: recorder.path.read_bytes().count(b"metrics") > 3)
    recorder.finish()
    start, *samples, end = read_journal(recorder.path)
    assert (start["kind"], start["run"], start["config"]) == ("system", "abcdefgh", {})
    assert all(sample["values"]["system/cpu_percent"] == 12.5 for sample in samples)
    assert [s["step"] for s in samples] == sorted(s["step"] for s in samples)
    assert end["type"] == "finish"
    assert end_status(recorder.path) == "finished"


def test_a_disk_that_fails_ends_the_samples_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any, capfd: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    owner = claim_directory(tmp_path, "abcdefgh", "p", "d4")
    recorder = SystemRecorder(tmp_path, owner, seconds=0.01)
    monkeypatch.setattr(recorder._journal, "append", fail)
    until(lambda: not recorder._thread.is_alive())
    recorder.finish()
    out = capfd.readouterr().out
    assert "system metrics end: OSError" in out
    assert "the end of the system metrics is not recorded" in out
