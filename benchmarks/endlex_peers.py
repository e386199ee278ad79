"""Endlex beside trackio, wandb offline, TensorBoard and MLflow, each on this machine alone.

    pip install trackio wandb tensorboard mlflow
    python benchmarks/endlex_peers.py

For each tool, in processes of its own, with what it does by default and no server elsewhere:

    log()    10 scalars per call, a call every 5 ms: median, p99 and longest
    lost     calls, of 1,000 at full speed, that are not on the disk when the process is killed
             (SIGKILL) right behind the last one, and cannot be read from there
    stored   points per second from the first of 10,000 calls (or of those that 30 s allow) until
             `finish` returns: 100,000 points
    chart    until one metric of them is there as arrays, read by the tool's own means

Endlex's `stored` and `chart` go by its server: until it has acknowledged every point, and as a
chart asks for it. wandb reads nothing back offline. A tool that is not installed is left out. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from endlex_serving import running_server
from measuring import percentile

SCALARS = 10
PACE_SECONDS = 0.005
BURST_SECONDS = 30.0
"""After which a burst ends, however many of its calls were made."""

TRAINER = """
import json, os, signal, sys, time
folder, mode, steps, pace = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
{setup}
taken = []
began = time.perf_counter()
for step in range(steps):
    values = {{f"train/metric_{{i}}": (step + 1) / (i + 3) for i in range({scalars})}}
    if pace:
        time.sleep(pace)
    start = time.perf_counter()
    log(values, step)
    taken.append(time.perf_counter() - start)
    if mode == "burst" and time.perf_counter() - began > {longest}:
        break
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
finish()
print(json.dumps([taken, time.perf_counter() - began]))
"""

SETUPS = {
    "endlex": """
import endlex
run = endlex.init("peers", "run", directory=folder + "/run")
def log(values, step): run.log(values, step=step)
finish = run.finish
""",
    "trackio": """
import trackio
trackio.init(project="peers", name="run", embed=False)
def log(values, step): trackio.log(values, step=step)
finish = trackio.finish
""",
    "wandb": """
import wandb
run = wandb.init(project="peers", mode="offline", dir=folder)
def log(values, step): run.log(values, step=step)
finish = run.finish
""",
    "tensorboard": """
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter(folder)
def log(values, step):
    for name, value in values.items():
        writer.add_scalar(name, value, step)
finish = writer.close
""",
    "mlflow": """
import mlflow
mlflow.set_tracking_uri("sqlite:///" + folder + "/mlflow.db")
mlflow.start_run()
def log(values, step): mlflow.log_metrics(values, step=step)
finish = mlflow.end_run
""",
}
"""What each tool's own documentation says to write."""

READERS = {
    "endlex": """
import endlex
found = {r["step"] for r in endlex.read_run(folder + "/run") if r["type"] == "metrics"}
""",
    "trackio": """
import glob, sqlite3
found = set()
for path in glob.glob(folder + "/*.db"):
    found |= {step for (step,) in sqlite3.connect(path).execute("SELECT step FROM metrics")}
""",
    "wandb": """
import pathlib
from endlex.importers.wandb import _items, _iter_messages
(path,) = pathlib.Path(folder).rglob("*.wandb")
found = {int(_items(r.history.item)["_step"]) for r in _iter_messages(path)
         if r.WhichOneof("record_type") == "history"}
""",
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(folder, {"scalars": 0}).Reload()
steps = [{e.step for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]]
found = set.intersection(*steps) if steps else set()
""",
    "mlflow": """
import sqlite3
database = sqlite3.connect(folder + "/mlflow.db")
rows = database.execute("SELECT step, count(*) FROM metrics GROUP BY step")
found = {step for step, count in rows if count == 10}
""",
}
"""By tool, a program that sets `found` to the steps that are on the disk in `folder`."""

CHARTS = {
    "trackio": """
from trackio.sqlite_storage import SQLiteStorage
began = time.perf_counter()
rows = SQLiteStorage.get_logs("peers", "run")
points = [(row["step"], row["train/metric_0"]) for row in rows]
""",
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
began = time.perf_counter()
events = EventAccumulator(folder, {"scalars": 0}).Reload()
points = [(e.step, e.value) for e in events.Scalars("train/metric_0")]
""",
    "mlflow": """
import mlflow
mlflow.set_tracking_uri("sqlite:///" + folder + "/mlflow.db")
client = mlflow.MlflowClient()
began = time.perf_counter()
(run,) = client.search_runs(["0"])
points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/metric_0")]
""",
}

LIBRARIES = {"tensorboard": "torch"}


@dataclass(frozen=True)
class Figures:
    """Figures of one tool; None where it offers no way to measure one."""

    version: str
    log_median_us: float
    log_p99_us: float
    log_max_ms: float
    lost_calls: int
    points_per_second: int
    chart_ms: float | None


def run_python(code: str, folder: Path, *words: object, url: str | None = None) -> str:
    """Run a script in a process of its own, and return what it printed last."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENDLEX_", "WANDB_"))}
    environment = kept | {"TRACKIO_DIR": str(folder), "WANDB_SILENT": "true"}
    environment |= {"HF_HUB_OFFLINE": "1", "GIT_PYTHON_REFRESH": "quiet"}
    environment |= {"ENDLEX_URL": url} if url else {}
    command = [sys.executable, "-c", code, str(folder), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, -9):
        raise RuntimeError(f"{folder.name} failed:\n{done.stderr[-3000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def train(tool: str, folder: Path, mode: str, steps: int, pace: float, url: str | None) -> str:
    """Run a trainer; return the JSON of its calls' seconds and of all of it."""
    code = TRAINER.format(setup=SETUPS[tool], scalars=SCALARS, longest=BURST_SECONDS)
    return run_python(code, folder, mode, steps, pace, url=url)


def count_found(tool: str, folder: Path) -> int:
    """Return how many of a killed trainer's calls can be read from the disk."""
    head = "import sys\nfolder = sys.argv[1]\n"
    return int(run_python(f"{head}{READERS[tool]}\nprint(len(found))", folder))


def time_chart(tool: str, folder: Path, points: int, url: str | None) -> float | None:
    """Return how many milliseconds one metric takes; None where the tool reads nothing back."""
    if tool == "endlex":
        run = json.loads((folder / "run" / "run.json").read_text())["run"]
        path = f"{url}/api/v1/runs/{run}/series?metric=train/metric_0&points=2000"
        took = []
        for _ in range(5):
            began = time.perf_counter()
            with urlopen(path) as answer:
                assert json.loads(answer.read())["series"]["train/metric_0"]["x"]
            took.append(time.perf_counter() - began)
        return round(min(took) * 1000, 2)
    if tool not in CHARTS:
        return None
    head = "import sys, time\nfolder = sys.argv[1]\n"
    tail = "\ntook = time.perf_counter() - began\nprint(took, len(points))"
    seconds, found = run_python(head + CHARTS[tool] + tail, folder).split()
    if int(found) != points:
        raise RuntimeError(f"{tool} gave {found} of {points} points")
    return round(float(seconds) * 1000, 2)


def measure(tool: str, folder: Path, calls: int, url: str | None) -> Figures:
    """Take a tool's figures, one after the other."""
    taken = json.loads(train(tool, folder / "paced", "paced", calls, PACE_SECONDS, None))[0]
    train(tool, folder / "killed", "kill", 1000, 0.0, None)
    made, seconds = json.loads(train(tool, folder / "burst", "burst", 10 * calls, 0.0, url))
    chart = time_chart(tool, folder / "burst", len(made), url)
    return Figures(
        importlib.metadata.version(tool),
        round(median(taken) * 1e6, 1),
        round(percentile(taken, 0.99) * 1e6, 1),
        round(max(taken) * 1e3, 2),
        1000 - count_found(tool, folder / "killed"),
        round(len(made) * SCALARS / seconds),
        chart,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="paced calls; ten times in a burst")
    parser.add_argument("--tool", action="append", choices=tuple(SETUPS), help="only these")
    options = parser.parse_args()
    found: dict[str, Figures] = {}
    show: Callable[..., None] = lambda *cells: print(  # noqa: E731
        "{:12} {:10} {:>10} {:>10} {:>8} {:>6} {:>12} {:>10}".format(*cells), flush=True
    )
    show("tool", "version", "median us", "p99 us", "max ms", "lost", "points/s", "chart ms")
    with TemporaryDirectory() as name, ExitStack() as stack:
        url = stack.enter_context(running_server(Path(name) / "server"))
        for tool in options.tool or SETUPS:
            needed = ("endlex", tool, LIBRARIES.get(tool, tool))
            if missing := [one for one in needed if importlib.util.find_spec(one) is None]:
                print(f"{tool:12} left out: {missing[0]} is not installed", flush=True)
                continue
            is_endlex = tool == "endlex"
            f = measure(tool, Path(name) / tool, options.calls, url if is_endlex else None)
            found[tool] = f
            chart = "-" if f.chart_ms is None else f.chart_ms
            row = (f.log_median_us, f.log_p99_us, f.log_max_ms, f.lost_calls)
            show(tool, f.version, *row, f"{f.points_per_second:,}", chart)
    print(json.dumps({tool: asdict(figures) for tool, figures in found.items()}))


if __name__ == "__main__":
    main()
