"""How the machine is: sampled by the shipper, never by the trainer, into a session of its own.

psutil (extra `endlex[system]`) gives processors, memory and network, and pynvml (nvidia-ml-py)
NVIDIA cards, where they are installed. A sensor that fails is left out from then on.

    system/cpu_percent  system/memory_percent  system/memory_bytes  system/load
    system/disk_free_bytes  system/home_free_bytes
    system/net_sent_bytes_per_second  system/net_received_bytes_per_second
    system/gpu.0/utilization_percent  memory_bytes  memory_percent  power_watts  temperature_c
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endlex.client.directories import RunFile, session_start
from endlex.client.journal import Journal
from endlex.client.shipper.control import say
from endlex.protocol import FINISH, METRICS, SYSTEM

SAMPLE_SECONDS = 10.0
FIRST_SECONDS = 1.0  # rates need some time before the first sample

Sensor = Callable[[], dict[str, float]]


def sensors(directory: Path) -> list[Sensor]:
    """Return what can be measured with the libraries that are here, and on this disk."""
    found: list[Sensor] = [
        lambda: {
            "system/disk_free_bytes": shutil.disk_usage(directory).free,
            "system/home_free_bytes": shutil.disk_usage(Path.home()).free,
        },
        lambda: {"system/load": os.getloadavg()[0]},
    ]
    with contextlib.suppress(Exception):  # not installed, or broken
        psutil = importlib.import_module("psutil")
        found += [lambda: _machine(psutil), _network(psutil)]
    with contextlib.suppress(Exception):  # likewise, or no driver, or no card
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            found += _card_sensors(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index)
    return found


def _machine(psutil: Any) -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(None),
        "system/memory_percent": memory.percent,
        "system/memory_bytes": memory.total - memory.available,
    }


def _network(psutil: Any) -> Sensor:
    """Return a sensor of all interfaces but the loopback one, for the time between two calls."""
    last = 0.0, 0, 0

    def measure() -> dict[str, float]:
        nonlocal last
        interfaces = psutil.net_io_counters(pernic=True).items()
        counts = [count for name, count in interfaces if not name.startswith("lo")]
        sent, received = sum(c.bytes_sent for c in counts), sum(c.bytes_recv for c in counts)
        before, last = last, (time.monotonic(), sent, received)
        seconds, sent, received = (now - then for now, then in zip(last, before, strict=True))
        return {
            "system/net_sent_bytes_per_second": sent / max(seconds, 1e-3),
            "system/net_received_bytes_per_second": received / max(seconds, 1e-3),
        }

    return measure


def _card_sensors(nvml: Any, card: Any, index: int) -> list[Sensor]:
    """Return one sensor per figure: cards differ in what they support."""
    prefix, kind = f"system/gpu.{index}/", nvml.NVML_TEMPERATURE_GPU

    def memory() -> dict[str, float]:
        info = nvml.nvmlDeviceGetMemoryInfo(card)
        share = 100 * info.used / info.total
        return {f"{prefix}memory_bytes": info.used, f"{prefix}memory_percent": share}

    return [
        lambda: {f"{prefix}utilization_percent": nvml.nvmlDeviceGetUtilizationRates(card).gpu},
        memory,
        lambda: {f"{prefix}power_watts": nvml.nvmlDeviceGetPowerUsage(card) / 1000},
        lambda: {f"{prefix}temperature_c": nvml.nvmlDeviceGetTemperature(card, kind)},
    ]


def take_sample(sensors: list[Sensor]) -> dict[str, float]:
    """Return values by metric name; a sensor that fails is taken off the list."""
    values = dict[str, float]()
    for sensor in list(sensors):
        try:
            values |= {name: float(value) for name, value in sensor().items()}
        except Exception:
            sensors.remove(sensor)
    return values


class SystemRecorder:
    """A thread that writes samples to a session of kind "system" until it is stopped."""

    def __init__(self, directory: Path, owner: RunFile, *, seconds: float = SAMPLE_SECONDS) -> None:
        self._directory, self._seconds = directory, seconds
        self._journal = Journal(directory, session_start(owner, SYSTEM))
        self.path = self._journal.path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system stats", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began, wait = time.monotonic(), min(FIRST_SECONDS, self._seconds)
        try:
            found = sensors(self._directory)
            take_sample(found)  # rates count from here
            while not self._stop.wait(wait):
                step = round(time.monotonic() - began)
                self._journal.append(METRICS, {"step": step, "values": take_sample(found)})
                wait = self._seconds
        except Exception as error:  # a full disk, or a library that does what none should
            say(f"system metrics end: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """End the session; a sensor that hangs is left behind."""
        self._stop.set()
        self._thread.join(2.0)
        try:
            if not self._thread.is_alive():
                self._journal.append(FINISH, {"status": "finished"})
            self._journal.close()
        except OSError as error:
            say(f"the end of the system metrics is not recorded: {error}")
