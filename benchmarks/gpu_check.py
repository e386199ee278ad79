"""Run every part of the check on a card within eight minutes, and say what it found.

The most telling parts come first, each in a process of its own with a limit; time that a part
leaves over goes to the next. A part that fails leaves its last lines in the result, and the next
one runs. `benchmarks/gpu.sh` starts this.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_common import BUNDLE, CRASHED, DRY_RUN, LENGTH, Rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAST_LINES = 30
WORKERS = 8
"""Processes that share the card in the tests."""
COMPILING = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""Each of them would otherwise start a compiler per core."""
SCALE = 3 if DRY_RUN else 1
"""A rehearsal shares two cores with others."""
Figures = Mapping[str, Mapping[str, Any]]
"""A part's rows by name."""


@dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    seconds: int
    script: str = ""
    """A script in this folder, with its flags; empty for pytest."""


PARTS = (
    Part("machine", 20, "gpu_common.py"),
    Part("tests", 150, ""),
    Part("speed", 160, "gpu_speed.py"),
    Part("anatomy", 40, "gpu_speed.py --anatomy"),
    Part("decode", 50, "gpu_decode.py"),
    Part("learning", 60, "gpu_learning.py"),
)


def pytest_words() -> list[str]:
    """Run the files that hold tests for a card; in a rehearsal their parameters for CPUs."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8") and path.name != "test_gpu_check.py"
    )
    chosen = ["-m", "gpu"]
    if DRY_RUN:
        chosen = ["-m", "not slow and not gpu", "-k", "cpu"]
    elif importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", str(WORKERS), "--dist", "worksteal"]  # each compiles much
    return ["-m", "pytest", "-vv", "-rfE", "--tb=short", "--color=no", *chosen, *files]


def run_process(words: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run Python, its output in `log`; return its exit status, None where time ran out."""
    extra = {"ARCHERCHAT_SHARED": str(BUNDLE / "shared")} if BUNDLE.is_dir() else {}
    if "pytest" in words:
        extra |= COMPILING
    with log.open("a") as output:
        try:
            return subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | extra,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def count_tests(lines: Sequence[str]) -> dict[str, int]:
    """Count how the tests ended that did, also where pytest was stopped."""
    # `NAME PASSED [ 5%]`, by xdist `[gw0] [ 5%] PASSED NAME`; the summary's lines begin otherwise.
    pattern = re.compile(r"(?:^tests/.*|^\[gw\d+\].*) (PASSED|FAILED|SKIPPED|ERROR)\b")
    found = (pattern.match(line) for line in lines)
    return dict(Counter(match[1].lower() for match in found if match))


def run_part(part: Part, folder: Path, until: float) -> dict[str, Any]:
    """Run one part; a script that an error ended is started again for its other rows."""
    log, path = folder / "log.txt", folder / f"{part.name}.jsonl"
    begin = log.stat().st_size
    if not part.script:
        status = run_process(pytest_words(), log, until - time.time())
    else:
        rows = Rows(path, until)
        while True:
            before = len(rows.read())
            words = [*part.script.split(), str(path), "--until", str(until)]
            words[0] = str(HERE / words[0])
            status = run_process(words, log, until - time.time())
            if status in (0, None) or len(rows.read()) == before:
                break
        failed = any("error" in row for row in rows.read().values())
        status = CRASHED if status == 0 and failed else status
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    result: dict[str, Any] = {"status": "ok" if status == 0 else "out of time"}
    if status is not None and status != 0:
        result["status"] = f"failed ({status})"
    if part.script:
        result["rows"] = Rows(path, 0).read()
    else:
        result["rows"] = {"pytest": count_tests(lines)}
    if status != 0:
        result["last_lines"] = lines[-LAST_LINES:]
    return result


def judge(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compare with what is asked for; a bar whose figures are missing is not met."""

    def get(part: str, row: str, figure: str) -> float:
        value = results.get(part, {}).get("rows", {}).get(row, {}).get(figure)
        return float("nan") if value is None else float(value)

    windows = [
        (row["mfu"], row["tokens_per_second"], row["peak_bytes"] / row["planned_bytes"])
        for name, row in results.get("speed", {}).get("rows", {}).items()
        if name.startswith("d12 windows") and "eager" not in name and "error" not in row
    ]
    mfu, rate, memory = max(windows, default=(float("nan"),) * 3)
    runs = results.get("learning", {}).get("rows", {})
    apart = [
        get("learning", run, "val_bpb") - get("learning", run, "val_bpb_reference") for run in runs
    ]
    full, long = get("speed", "d12 full sdpa", "tokens_per_second"), "tokens_per_second"
    values = {
        f"windows over full attention, {LENGTH} tokens": (rate / full, 1.15, None),
        f"windows over full attention, {4 * LENGTH} tokens": (
            get("speed", "d12 8k windows best", long) / get("speed", "d12 8k full sdpa", long),
            1.5,
            None,
        ),
        "depth 12, share of the measured product rate": (mfu, 0.55, None),
        "decoding one row, share of memory bandwidth": (
            get("decode", "decode 1 compiled", "bandwidth_share"),
            0.60,
            None,
        ),
        "peak memory over what plan says": (memory, 0.90, 1.10),
        "bits per byte over the reference's": (
            sum(apart) / len(apart) if apart else float("nan"),
            -0.03,
            0.03,
        ),
    }
    return {
        name: {
            "value": None if value != value else round(value, 4),
            "least": least,
            "most": most,
            "met": value >= least and (most is None or value <= most),
        }
        for name, (value, least, most) in values.items()
    }


def short(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3g}"


def print_results(console: Console, result: Mapping[str, Any]) -> None:
    for name, part in result["parts"].items():
        table = Table(
            "row", "figures", title=f"{name}: {part['status']}, {part['seconds']} s",
            title_justify="left",
        )  # fmt: skip
        for row, figures in part["rows"].items():
            table.add_row(row, ", ".join(f"{k} {short(v)}" for k, v in figures.items()))
        console.print(table)
        for line in part.get("last_lines", ()):
            console.print(f"    {line}", markup=False, highlight=False)
    table = Table("bar", "value", "least", "most", "met")
    for bar, verdict in result["bars"].items():
        cells = (short(verdict[key]) if verdict[key] is not None else "" for key in
                 ("value", "least", "most"))  # fmt: skip
        table.add_row(bar, *cells, "yes" if verdict["met"] else "no")
    console.print(table)


def describe_machine() -> dict[str, Any]:
    """Return what `archerchat doctor --json` says, or why it says nothing."""
    words = [sys.executable, "-m", "archerchat.cli", "doctor", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
        return report
    except ValueError:
        return {"error": (done.stdout + done.stderr).splitlines()[-LAST_LINES:]}


def as_json(value: Any) -> Any:
    """Replace what JSON has no word for."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def write_results(result: dict[str, Any], folder: Path) -> str:
    """Judge what there is so far, and keep it in case the machine goes; return it as JSON."""
    result["bars"] = judge(result["parts"])
    result["failed"] = [
        name
        for name, part in result["parts"].items()
        if part["status"].startswith(("failed", "out of time"))
    ]
    with (folder / "table.txt").open("w") as file:
        print_results(Console(file=file, width=160), result)
    text = json.dumps(as_json(result))
    (folder / "result.json").write_text(text + "\n")
    return text


def run_all(folder: Path, console: Console) -> dict[str, Any]:
    """Run the parts in order; at most eight files come of it."""
    started = until = time.time()
    result: dict[str, Any] = {"dry_run": DRY_RUN, "doctor": describe_machine(), "parts": {}}
    for part in PARTS:
        (folder / f"{part.name}.jsonl").unlink(missing_ok=True)
    (folder / "log.txt").write_text("")
    for part in PARTS:
        until, began = until + SCALE * part.seconds, time.time()
        if part.name == "learning" and not BUNDLE.is_dir():
            done = {"status": "skipped: benchmarks/gpu_bundle.sh gathers its data", "rows": {}}
        else:
            done = run_part(part, folder, until)
        now = time.time()
        result["parts"][part.name] = {**done, "seconds": round(now - began, 1)}
        result["seconds"] = round(now - started, 1)
        write_results(result, folder)
        console.print(f"{part.name}: {done['status']}, {now - began:.1f} s", highlight=False)
    return result


def main() -> int:
    console = Console(width=160)
    with tempfile.TemporaryDirectory(prefix="archerchat-gpu-") as temporary:
        folder = Path(os.environ.get("OUT") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run_all(folder, console)
        print_results(console, result)
        print(write_results(result, folder))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
