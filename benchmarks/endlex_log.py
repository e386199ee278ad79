"""How long a trainer waits in `run.log`, with the server there, gone, and never answering.

    python benchmarks/endlex_log.py
    python benchmarks/endlex_log.py --steps 500

For each of the three a trainer runs in a process of its own, with a shipper beside it as always:
it logs 10 scalars every 5 ms, as a step of training would, and times each call. `on` is a real
`endlex serve` on this machine, `off` a port where nobody listens, `black_hole` a server that
accepts connections and never answers. `bare` is what the same lines cost without Endlex:
`json.dumps` and one `os.write` to an append-only file. `nothing` times an empty call, and so what
the machine takes from any program: where its p99 comes near the others', they are those of a busy
machine. No call is left out, the first included. The last line is one JSON object whose figures are
the worst of the three.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from endlex_serving import running_server
from measuring import percentile

SCALARS = 10
PACE_SECONDS = 0.005
MODES = ("on", "off", "black_hole")
BASELINES = ("nothing", "bare")

TRAINER = """
import json, os, sys, time
kind, directory, steps, pace, scalars = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
if kind == "nothing":
    def log(values, step):
        pass
elif kind == "bare":
    os.makedirs(directory)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    file = os.open(os.path.join(directory, "bare.jsonl"), flags)
    def log(values, step):
        record = {"type": "metrics", "time": time.time(), "step": step, "values": values}
        os.write(file, (json.dumps(record) + "\\n").encode())
else:
    import endlex
    run = endlex.init("benchmark", kind, directory=directory)
    def log(values, step):
        run.log(values, step=step)
taken = []
for step in range(int(steps)):
    values = {f"train/metric_{i}": (step + 1) / (i + 3) for i in range(int(scalars))}
    time.sleep(pace)
    began = time.perf_counter()
    log(values, step)
    taken.append(time.perf_counter() - began)
began = time.perf_counter()
if kind not in ("nothing", "bare"):
    run.finish()
print(json.dumps([taken, time.perf_counter() - began]))
"""


@dataclass(frozen=True)
class Figures:
    """Durations of the calls of `log` in one mode, and of `finish`."""

    median_us: float
    p99_us: float
    max_ms: float
    finish_s: float
    """Duration of `run.finish`, which waits up to 4 s for a server that does not answer."""


def figures(seconds: list[float], finish: float) -> Figures:
    return Figures(
        round(median(seconds) * 1e6, 1),
        round(percentile(seconds, 0.99) * 1e6, 1),
        round(max(seconds) * 1e3, 3),
        round(finish, 2),
    )


def train(mode: str, url: str | None, directory: Path, steps: int) -> Figures:
    """Run a trainer to its end; its shipper is ended with it."""
    command = [sys.executable, "-c", TRAINER, mode, directory / mode, steps, PACE_SECONDS, SCALARS]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENDLEX_")}
    if url is not None:
        environment["ENDLEX_URL"] = url
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the trainer of mode {mode} failed:\n{done.stderr}")
    if mode not in BASELINES:
        from endlex.client.shipper.control import stop_shipper

        stop_shipper(directory / mode, seconds=1.0)
    return figures(*json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def server(mode: str, directory: Path) -> Iterator[str]:
    """The URL of what a mode's trainer talks to."""
    if mode == "on":
        with running_server(directory / "server") as url:
            yield url
        return
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if mode == "off":
            listening.close()
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description="Time log() with the server on, off, and mute.")
    parser.add_argument("--steps", type=int, default=3000, help="calls a mode (3000: 15 s)")
    steps = parser.parse_args().steps
    modes = list(MODES)
    if importlib.util.find_spec("uvicorn") is None:
        print("SKIPPED: mode `on` needs the server: pip install 'endlex[server]'", file=sys.stderr)
        modes.remove("on")
    found = {}
    print(f"{'server':12} {'median us':>10} {'p99 us':>10} {'max ms':>10} {'finish s':>10}")
    with TemporaryDirectory() as name:
        for mode in (*BASELINES, *modes):
            with contextlib.ExitStack() as stack:
                url = None
                if mode not in BASELINES:
                    url = stack.enter_context(server(mode, Path(name)))
                found[mode] = f = train(mode, url, Path(name), steps)
            line = f"{mode:12} {f.median_us:10.1f} {f.p99_us:10.1f} {f.max_ms:10.3f}"
            print(f"{line} {f.finish_s:10.2f}", flush=True)
    worst = {
        key: max(asdict(found[mode])[key] for mode in modes)
        for key in ("median_us", "p99_us", "max_ms")
    }
    print(json.dumps({**worst, "modes": {mode: asdict(f) for mode, f in found.items()}}))


if __name__ == "__main__":
    main()
