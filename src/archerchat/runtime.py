"""Where a run computes (device, compute dtype, place among the ranks), and how it is stopped.

A `Runtime` is built once at start-up and passed on; nothing else chooses a device.
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

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of two settings of glibc's `mallopt`."""
KEPT_BYTES = 2**31 - 1
"""Largest blocks, and most free memory at the end of the heap, for glibc to keep."""
SAME_REQUEST_SECONDS = 2.0
COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable for torch's directory of compiled code."""
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime(Place):
    """One rank's device and compute dtype."""

    device: torch.device
    compute_dtype: torch.dtype
    device_name: str
    dtype_reason: str
    """Reason for the dtype, which is printed at start-up."""

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def median_seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Return the median time of `work`, after three calls that compile and warm up."""
        seconds = []
        for _ in range(3 + rounds):
            began = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[3:])

    def peak_memory_bytes(self) -> int:
        """Return the most memory that tensors took since the last reset.

        On CPUs it is the process's peak resident size, on MPS what the driver holds now.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        import resource  # POSIX only, and nothing else here is

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_peak_memory(self) -> None:
        """Restart the measurement of CUDA's peak; does nothing elsewhere."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def total_memory_bytes(self) -> int:
        """Return the device's memory; for CPUs and MPS, the machine's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def build_runtime(device: str | None = None, dtype: str | None = None) -> Runtime:
    """Choose the device and the compute dtype of this process.

    Args:
        device: "cuda", "cuda:1", "mps" or "cpu"; None means the best one here. Without an
            index, each local rank gets its own CUDA device.
        dtype: a key of `DTYPES`; None means bfloat16 if the hardware multiplies it fast, else
            float32.

    Raises:
        UsageError: the device or dtype is unknown or not here, or torchrun's variables are broken.
    """
    place = read_place(os.environ)
    chosen = choose_device(device, place.local_rank)
    compute_dtype, reason = choose_dtype(chosen, dtype)
    return Runtime(chosen, compute_dtype, _device_name(chosen), reason, **asdict(place))


def prepare_process(runtime: Runtime) -> None:
    """Apply process-wide settings that make long runs faster; call it once, at start-up.

    On CUDA, float32 products may use TF32. On CPUs, glibc keeps large blocks instead of returning
    them to the system: getting their pages back took a sixth of a training step (docs/LOG.md,
    2026-11-20). Each kind of processor gets its own directory of compiled code, because code for
    another one, from a shared home, corrupts memory.
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
    counts = {  # the best first
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    name = requested or next(kind for kind in counts if counts[kind])
    match = re.fullmatch(r"(cuda|mps|cpu)(?::(\d+))?", name)
    kind, number = match.groups() if match else ("", None)
    by_rank = kind == "cuda" and number is None
    index = local_rank if by_rank else int(number or 0)
    if index >= counts.get(kind, 0):
        here = ", ".join(f"{kind}:0-{n - 1}" if n > 1 else kind for kind, n in counts.items() if n)
        wanted = f"{name} for local rank {local_rank}" if by_rank and local_rank else name
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
    """Return the facts that may change the last bits of a run's results."""
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
    """Return the processor's model name from Linux's `cpuinfo`, or Python's name for it."""
    with suppress(OSError):
        text = cpuinfo.read_text(errors="replace")
        if match := re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE):
            return " ".join(match[1].split())
    return platform.processor() or platform.machine() or "unknown CPU"


class _Stopped(BaseException):
    """Leave interruptible work; a BaseException, so that no other handler catches it."""


class StopRequest:
    """Remember whether the user or the system asked the loop to end.

    Signals within `SAME_REQUEST_SECONDS` count as one, since schedulers and terminals send several.

    Args:
        describe: returns what to print at the first request.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self.asked, self._describe = False, describe
        self._asked_at = 0.0
        self._interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at >= SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        self.asked, self._asked_at = True, time.monotonic()
        with suppress(OSError):  # not `print`: the signal may have come in the middle of one
            os.write(sys.stderr.fileno(), f"\n{self._describe()}\n".encode())
        if self._interruptible:
            raise _Stopped

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Do long work that changes nothing; the first request interrupts it and returns None."""
        try:  # no context manager: its own calls would be places for the signal to arrive
            self._interruptible = True
            return work()
        except _Stopped:
            return None
        finally:
            self._interruptible = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests; only the main thread can.

        Meanwhile the main thread blocks Ctrl-C, and so do the programs that it starts: a compiler
        that died of it would leave half a file in torch's cache. Another thread receives it, and
        wakes the main thread, which may be waiting, so that it is told at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        main, (arrived, written) = threading.get_ident(), os.pipe()

        def wake() -> None:
            while number := os.read(arrived, 1):
                if number[0] == signal.SIGINT:
                    signal.pthread_kill(main, signal.SIGURG)
            os.close(arrived)

        threading.Thread(target=wake, name="signals", daemon=True).start()
        os.set_blocking(written, False)
        before_fd = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        handlers = {signal.SIGURG: _ignore, signal.SIGINT: self._ask, signal.SIGTERM: self._ask}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            os.close(written)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Interrupt what the main thread waits for, and nothing more."""


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn torch's errors about memory, of any device, into a MemoryExceededError with advice."""
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
