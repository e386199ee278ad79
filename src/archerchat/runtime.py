"""Where a run computes: device, compute dtype, its place among the ranks; and what may stop it.

A `Runtime` is built once at start-up and passed to whatever needs it; nothing else asks which
device there is. `distributed` reads the place among the ranks and builds process groups.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from archerchat.distributed import Place, read_place
from archerchat.errors import MemoryExceededError, UsageError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for the two settings of `mallopt`."""
KEPT_BYTES = 2**31 - 1
"""Blocks up to this size, and so much free memory at the heap's end, are kept."""
STOPPING = b"\nstopping after this step, with a checkpoint; a second signal ends at once, without\n"
SAME_REQUEST_SECONDS = 2.0
COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps compiled code."""
T = TypeVar("T")
DEVICE_TYPES = ("cuda", "mps", "cpu")
"""Best first."""


@dataclass(frozen=True)
class Runtime(Place):
    """Describe one rank's device and what it computes in."""

    device: torch.device
    compute_dtype: torch.dtype
    device_name: str
    dtype_reason: str
    """Why this dtype, for the line that start-up prints."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def median_seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Return how long `work` takes, after three calls that compile and warm up."""
        seconds = []
        for n in range(3 + rounds):
            began = time.perf_counter()
            work()
            self.synchronize()
            if n >= 3:
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def peak_memory_bytes(self) -> int:
        """Return the most memory that tensors took since the last reset.

        On CPUs that is the process's peak resident size since it started, on MPS what the
        driver holds now: neither keeps a peak that can be reset.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return _peak_resident_bytes()

    def reset_peak_memory(self) -> None:
        """Count CUDA's peak from here on; does nothing elsewhere."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def total_memory_bytes(self) -> int:
        """Return how much memory the device has; on CPUs and MPS the machine's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def build_runtime(device: str | None = None, dtype: str | None = None) -> Runtime:
    """Choose the device and the compute dtype of this process.

    Args:
        device: "cuda", "cuda:1", "mps" or "cpu"; None takes the best one here. Without an
            index, each local rank gets its own CUDA device.
        dtype: "bfloat16", "float32" or "float16"; None takes bfloat16 where the hardware
            multiplies it fast, else float32.

    Raises:
        UsageError: the device or dtype is unknown or not here, or torchrun's variables are broken.
    """
    place = read_place(os.environ)
    chosen = choose_device(device, place.local_rank)
    compute_dtype, reason = choose_dtype(chosen, dtype)
    return Runtime(
        device=chosen,
        compute_dtype=compute_dtype,
        device_name=_device_name(chosen),
        dtype_reason=reason,
        **asdict(place),
    )


def prepare_process(runtime: Runtime) -> None:
    """Set what is global to the process and makes long runs faster; call it once, at start-up.

    On CUDA, float32 products may use TF32. On CPUs with glibc, large blocks are kept instead of
    being returned to the system after each use: faulting their pages in again took a sixth of a
    training step (docs/LOG.md, 2026-11-20). Compiled code goes into a directory of its own for
    each kind of processor: code for another one, from a shared home, corrupts memory.
    """
    cache = Path(os.environ.get(COMPILED_CODE) or Path(tempfile.gettempdir()) / "torchinductor")
    kind = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
    name = f"{getpass.getuser()}-{torch.__version__}-{kind}"
    if cache.name != name:
        os.environ[COMPILED_CODE] = str(cache / name)
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)  # streams, events and graphs are the current one's
        torch.set_float32_matmul_precision("high")
    elif runtime.device.type == "cpu" and sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another C library: it has no such setting
            return
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def choose_device(requested: str | None, local_rank: int = 0) -> torch.device:
    """Return the requested device, or the best one of this machine.

    Raises:
        UsageError: it is unknown or not here; the message lists what is.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    best = next(kind for kind in DEVICE_TYPES if counts[kind])
    name = requested or best
    match = re.fullmatch(r"(cuda|mps|cpu)(?::(\d+))?", name)
    kind = match[1] if match else ""
    number = match[2] if match else None
    default = local_rank if kind == "cuda" else 0
    index = default if number is None else int(number)
    if index >= counts.get(kind, 0):
        here = ", ".join(f"{kind}:0-{n - 1}" if n > 1 else kind for kind, n in counts.items() if n)
        by_rank = kind == "cuda" and number is None and local_rank > 0
        wanted = f"{name} for local rank {local_rank}" if by_rank else name
        raise UsageError(
            f"device {wanted!r} is not on this machine, which has: {here}; leave --device out to "
            "get the best one"
        )
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)


def training_dtype(capability: tuple[int, int]) -> torch.dtype:
    """Return what to train in: bfloat16 where tensor cores multiply it (sm80), else float32."""
    return torch.bfloat16 if capability >= (8, 0) else torch.float32


def choose_dtype(device: torch.device, requested: str | None) -> tuple[torch.dtype, str]:
    """Return the compute dtype and the reason for it.

    Raises:
        UsageError: the name is unknown.
    """
    if requested is not None:
        if requested not in DTYPES:
            raise UsageError(f"dtype {requested!r} is not one of: {', '.join(DTYPES)}")
        return DTYPES[requested], "forced"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = training_dtype((major, minor))
        if dtype == torch.bfloat16:
            return dtype, f"CUDA sm{major}{minor} has bfloat16 tensor cores"
        return dtype, f"CUDA sm{major}{minor} has no bfloat16 tensor cores (sm80 has)"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for flag, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
            if capabilities.get(flag):
                return torch.bfloat16, f"CPU has {name}"
        return torch.float32, "CPU has neither AMX-BF16 nor AVX512-BF16"
    return torch.float32, f"{device.type}: bfloat16 only if forced"


def describe_hardware(runtime: Runtime) -> dict[str, str | int]:
    """Return what may change a run's last bits from one machine to the next."""
    return {
        "device": runtime.device_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    return cpu_name(Path("/proc/cpuinfo"))


def cpu_name(cpuinfo: Path) -> str:
    """Return the processor's model name from Linux's `cpuinfo`, else what Python knows."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown CPU"


def _peak_resident_bytes() -> int:
    import resource  # POSIX only, and nothing else here is

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Stopped(BaseException):
    """Leave interruptible work; a base exception, so that no handler on the way takes it."""


class StopRequest:
    """Whether the user, or the system, asked the loop to end.

    Signals within `SAME_REQUEST_SECONDS` are one request: schedulers and terminals send several.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at >= SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        self.asked, self._asked_at = True, time.monotonic()
        with suppress(OSError):  # not `print`: the signal may have come in the middle of one
            os.write(sys.stderr.fileno(), STOPPING)
        if self._interruptible:
            raise _Stopped

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Do long work that changes nothing, or leave it at the first request: then None."""
        try:  # no context manager: its own calls would be places for the signal to arrive
            self._interruptible = True
            return work()
        except _Stopped:
            return None
        finally:
            self._interruptible = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests; outside the main thread there are none to take."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn running out of memory into advice.

    Raises:
        MemoryExceededError: instead of torch's error, on accelerators and on CPUs.
    """
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; CPUs raise nothing more special
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise MemoryExceededError(
            "out of memory: lower --device-batch-size (`archerchat plan` estimates what fits; "
            "`pretrain --extend` accepts another one for a run that has begun). With one row, "
            "--activation-checkpointing and --optimizer-state bfloat16 save more. Checkpoints are "
            "intact"
        ) from error
