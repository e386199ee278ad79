"""`archerchat doctor`: describe this machine, what will run on it and why, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from archerchat.config import DeviceConfig
from archerchat.console import bytes_text
from archerchat.home import Home
from archerchat.inference.loading import can_pack
from archerchat.model.attention import BACKENDS, choose_backend
from archerchat.planning.gpus import find_gpu
from archerchat.planning.peak_flops import measure_peak
from archerchat.runtime import Runtime, build_runtime, dtype_name
from archerchat.training.telemetry import describe_environment

REQUIRED = """
endlex huggingface-hub jinja2 markdown-it-py matplotlib numpy pyarrow pyyaml rich rustbpe
safetensors scipy tiktoken torch tyro
"""
OPTIONAL = "triton flash-attn flash-attn-3 psutil nvidia-ml-py lm-eval"
LEAST_FREE_BYTES = 10 * 2**30


@dataclass(frozen=True)
class DoctorConfig(DeviceConfig):
    """Describe this machine, what will run on it and why, and what is missing."""

    json: bool = False
    """Print one JSON object, for a bug report."""


def doctor(config: DoctorConfig, home: Home) -> None:
    """Print the results of `examine`."""
    report = examine(config, home)
    if config.json:
        print(json.dumps(report))
        return
    missing = report.pop("missing")
    versions = [f"{name} {version}" for name, version in report["packages"].items() if version]
    for title, facts in (report | {"packages": {"": ", ".join(versions)}}).items():
        print(title)
        for name, value in facts.items():
            is_size = name.endswith("_bytes") and value is not None
            label = name.removesuffix("_bytes").replace("_", " ")
            print(f"  {label:17} {bytes_text(value) if is_size else value or '-'}")
    print("missing" if missing else "nothing is missing")
    for what, remedy in missing:
        print(f"  {what}: {remedy}")


def examine(config: DoctorConfig, home: Home) -> dict[str, Any]:
    """Return each section's facts by name, and `missing` as pairs of a thing and its remedy."""
    runtime, machine = build_runtime(config.device, config.dtype), describe_environment()
    del machine["command"]
    packages = {name: _version(name) for name in f"{REQUIRED} {OPTIONAL}".split()}
    report = {
        "machine": machine | {"driver": _driver(), "compiler": _compiler()},
        "device": _describe_device(runtime),
        "choices": _describe_choices(runtime, packages),
        "backends": {name: _state(runtime, name) for name in BACKENDS},
        "packages": packages,
        "home": _describe_home(home),
    }
    return report | {"missing": _missing(report, runtime)}


def _describe_device(runtime: Runtime) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": runtime.device_name, "type": runtime.device.type}
    if runtime.device.type == "cuda":
        gpu = find_gpu(runtime.device_name)
        published = gpu and gpu.flops_per_second(runtime.compute_dtype)
        facts["capability"] = "sm{}{}".format(*torch.cuda.get_device_capability(runtime.device))
        facts["published"] = f"{published / 1e12:.0f} TFLOP/s" if published else None
        facts["free_bytes"] = torch.cuda.mem_get_info(runtime.device)[0]
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        facts["free_bytes"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["memory_bytes"], rate = runtime.total_memory_bytes(), measure_peak(runtime)
    product = f"{'x'.join(map(str, rate.shape))} {rate.dtype}"
    return facts | {"measured": f"{rate.flops_per_second / 1e12:.3g} TFLOP/s, {product}"}


def _describe_choices(runtime: Runtime, packages: dict[str, str | None]) -> dict[str, str]:
    device, dtype = runtime.device, runtime.compute_dtype
    works = _compiler() and (device.type != "cuda" or packages["triton"])
    plain = "packed bfloat16 matrices" if can_pack(device, dtype) else "plain steps"
    return {
        "dtype": f"{dtype_name(dtype)}: {runtime.dtype_reason}",
        "attention": ": ".join(choose_backend(device, dtype)),
        "training": "compiled" if works else "uncompiled: no working compiler",
        "decoding": "CUDA graphs, read one step late" if device.type == "cuda" else plain,
    }


def _describe_home(home: Home) -> dict[str, Any]:
    existing = next(p for p in (home.root, *home.root.absolute().parents) if p.exists())
    facts = {"path": str(home.root), "free_bytes": shutil.disk_usage(existing).free}
    kept = {"data": "*/*.parquet", "tokenizers": "*/tokenizer.json", "checkpoints": "*/*/step_*"}
    for folder, pattern in kept.items():
        paths = (home.root / folder).glob(pattern)
        names = {path.parent.relative_to(home.root / folder).as_posix() for path in paths}
        facts[folder] = ", ".join(sorted(names)) or None
    return facts


def _missing(report: dict[str, Any], runtime: Runtime) -> list[tuple[str, str]]:
    machine, packages, home = report["machine"], report["packages"], report["home"]
    blind = machine["driver"] is not None and not torch.cuda.is_available()
    without_triton = runtime.device.type == "cuda" and packages["triton"] is None
    checks = [(packages[n] is None, f"package {n}", f"pip install {n}") for n in REQUIRED.split()]
    checks += [
        (blind, "a torch that uses the GPU", "bash runs/quickstart.sh, without this .venv"),
        (machine["compiler"] is None, "a C++ compiler, to compile steps", "apt-get install g++"),
        (without_triton, "Triton, to compile steps", "pip install triton"),
        (home["free_bytes"] < LEAST_FREE_BYTES, "free disk space", "export ARCHERCHAT_HOME=DIR"),
        (home["data"] is None, "text", "archerchat data build stdlib"),
        (home["tokenizers"] is None, "a tokenizer", "archerchat tokenizer train"),
        (home["checkpoints"] is None, "a model", "bash runs/quickstart.sh"),
    ]
    return [(what, remedy) for lacking, what, remedy in checks if lacking]


def _state(runtime: Runtime, backend: str) -> str:
    try:
        choose_backend(runtime.device, runtime.compute_dtype, backend)
    except ValueError as error:
        return str(error).removeprefix(f"attention backend {backend!r} ").split("; ")[0]
    return "works"


def _version(name: str) -> str | None:
    """Return a package's version; "here" if it is imported from its sources."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "here" if importlib.util.find_spec(name.replace("-", "_")) else None


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(words, text=True, timeout=60).split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
