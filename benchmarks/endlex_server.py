"""How fast Endlex's server takes points in, answers charts, and stays awake meanwhile.

    python benchmarks/endlex_server.py
    python benchmarks/endlex_server.py --points 1000000 --upload-gib 0.1

A real server runs on a free port with its data in a temporary directory; this process is the
client, on the same machine, and its time counts. Measured are: points a second over HTTP in 1 MiB
batches of records with 10 scalars; the server's time (its Server-Timing header) and the answer's
bytes for series of 100k and of 1M points brought down to 2,000, the median of several; and the 99th
percentile of `/health`, asked every 10 ms while charts are read, and while a checkpoint is
uploaded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode, urlsplit

from endlex.protocol import METRICS, PART_BYTES, PROTOCOL, SESSION
from endlex_serving import running_server
from measuring import percentile

BATCH_BYTES = 2**20
SCALARS = 10
HEALTH_EVERY = 0.01
METRIC = "metric/0"


@dataclass(frozen=True)
class Figures:
    """What the last line has."""

    ingest_points_per_second: float
    series_100k_ms: float
    series_100k_bytes: int
    series_1m_ms: float
    health_p99_ms: float


class Client:
    """One connection to the server, kept alive."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **query: Any
    ) -> tuple[bytes, http.client.HTTPResponse]:
        """Return an answer's body and the answer; anything but 2xx ends the benchmark."""
        target = f"{path}?{urlencode(query)}" if query else path
        self._connection.request(method, target, body)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {content[:500]!r}")
        return content, answer


def main() -> int:
    options = parse_options()
    scratch = TemporaryDirectory(dir=options.directory)
    with scratch as folder, running_server(Path(folder) / "server") as url:
        figures, details = measure(url, options)
    print_table(figures, details)
    print(json.dumps(asdict(figures)))
    return 0


def measure(url: str, options: argparse.Namespace) -> tuple[Figures, dict[str, float]]:
    rate = ingest(url, "benchmark1", options.points)
    ingest(url, "benchmark2", 100_000 * SCALARS)
    small_ms, small_bytes = read_series(url, "benchmark2", options.repeats)
    large_ms, _ = read_series(url, "benchmark1", options.repeats)
    idle = health_while(url, lambda: time.sleep(2))
    reading = health_while(url, lambda: read_all(url, options.reads))
    size = int(options.upload_gib * 2**30)
    uploading = health_while(url, lambda: upload(url, "benchmark1", size))
    figures = Figures(
        ingest_points_per_second=round(rate),
        series_100k_ms=round(small_ms, 2),
        series_100k_bytes=small_bytes,
        series_1m_ms=round(large_ms, 2),
        health_p99_ms=round(max(reading, uploading), 2),
    )
    details = {"idle": idle, "during reads": reading, "during the upload": uploading}
    return figures, details


def batches(run: str, session: str, points: int) -> Iterator[bytes]:
    """Yield a journal of `points` values in batches, made before the clock runs."""
    head = {"type": SESSION, "session": session, "seq": 0, "time": 1.7e9, "protocol": PROTOCOL}
    about = {"run": run, "project": "benchmark", "name": run, "config": {}}
    lines = [json.dumps(head | about).encode() + b"\n"]
    size = 0
    names = [f"metric/{i}" for i in range(SCALARS)]
    for step in range(points // SCALARS):
        values = {name: (step * 7919 + i * 104729) % 1000003 / 997 for i, name in enumerate(names)}
        record = {"type": METRICS, "session": session, "seq": step + 1, "time": 1.7e9 + step / 8}
        line = json.dumps(record | {"step": step, "values": values}).encode() + b"\n"
        if size + len(line) > BATCH_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield b"".join(lines)


def ingest(url: str, run: str, points: int) -> float:
    """Send a journal batch by batch, as a shipper does; return points a second."""
    session = "000001-benchmark"
    path = f"/api/v1/runs/{run}/sessions/{session}/journal"
    prepared = list(batches(run, session, points))
    client = Client(url)
    offset = 0
    began = time.perf_counter()
    for body in prepared:
        content, _ = client.ask("POST", path, body, offset=offset, crc=f"{zlib.crc32(body):08x}")
        offset = json.loads(content)["offset"]
    return points / (time.perf_counter() - began)


def read_series(url: str, run: str, repeats: int) -> tuple[float, int]:
    """Return the server's median time for one series, in ms, and the bytes of its answer."""
    client = Client(url)
    times = []
    for _ in range(repeats):
        content, answer = client.ask(
            "GET", f"/api/v1/runs/{run}/series", metric=METRIC, points=2000
        )
        times.append(float((answer.getheader("Server-Timing") or "").split("dur=")[1]))
    return median(times), len(content)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` to `work(count - 1)` at the same time, and wait for all."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_all(url: str, reads: int) -> None:
    """Read what a page with many charts does, and the run list, over four connections."""

    def read(number: int) -> None:
        client = Client(url)
        for i in range(reads):
            metric = f"metric/{(number + i) % SCALARS}"
            x = "time" if i % 2 else "step"
            client.ask("GET", "/api/v1/runs/benchmark1/series", metric=metric, x=x)
            client.ask("GET", "/api/v1/runs", q="project:benchmark metric/0>1")
            client.ask("GET", "/api/v1/runs/benchmark1")

    in_threads(4, read)


def upload(url: str, run: str, size: int) -> None:
    """Send a checkpoint of one file over two connections, part by part, and have it published."""
    block = os.urandom(PART_BYTES)
    count = max(1, size // PART_BYTES)
    whole = hashlib.sha256()
    listed: list[dict[str, Any]] = []

    def part_of(number: int) -> bytes:
        return number.to_bytes(8, "little") + block[8:]

    for number in range(count):
        part = part_of(number)
        whole.update(part)
        listed.append({"sha256": hashlib.sha256(part).hexdigest(), "bytes": len(part)})

    def send(first: int) -> None:
        client = Client(url)
        for number in range(first, count, 2):
            path = f"/api/v1/parts/{listed[number]['sha256']}"
            client.ask("PUT", path, part_of(number), offset=0)

    in_threads(2, send)
    file = {"path": "model", "bytes": count * PART_BYTES, "sha256": whole.hexdigest()}
    publish(url, run, file | {"parts": listed})


def publish(url: str, run: str, file: dict[str, Any]) -> None:
    """Send the manifest of a checkpoint that is one file, until the server has verified it."""
    manifest = {"protocol": PROTOCOL, "name": "benchmark", "step": 1, "created": 1.7e9}
    body = json.dumps(manifest | {"aliases": [], "metadata": {}, "files": [file]}).encode()
    client = Client(url)
    state = ""
    while state != "published":
        content, _ = client.ask("PUT", f"/api/v1/runs/{run}/checkpoints/benchmark", body)
        state = json.loads(content)["state"]
        time.sleep(0.1)


def health_while(url: str, work: Callable[[], None]) -> float:
    """Return the 99th percentile of /health in ms while `work` runs.

    The asking process is another one: in this one the workers would hold it up, and their waits
    would be counted as the server's.
    """
    command = [sys.executable, __file__, "--probe", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as prober:
        assert prober.stdout is not None
        prober.stdout.readline()  # it has begun
        work()
        answer, _ = prober.communicate(b"stop\n", timeout=30)
    return percentile(json.loads(answer), 0.99)


def probe(url: str) -> None:
    """Ask /health until a line comes in, then print the times in ms."""
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    client = Client(url)
    client.ask("GET", "/health")
    print("begun", flush=True)
    times = []
    while not stop.is_set():
        began = time.perf_counter()
        client.ask("GET", "/health")
        times.append((time.perf_counter() - began) * 1000)
        time.sleep(HEALTH_EVERY)
    print(json.dumps(times))


def print_table(figures: Figures, details: dict[str, float]) -> None:
    rows = [
        ("ingest", f"{figures.ingest_points_per_second:,.0f} points/s"),
        ("series of 100k points", f"{figures.series_100k_ms:.1f} ms"),
        ("its answer", f"{figures.series_100k_bytes:,} bytes"),
        ("the long series", f"{figures.series_1m_ms:.1f} ms"),
        *((f"/health p99 {when}", f"{value:.1f} ms") for when, value in details.items()),
    ]
    for name, value in rows:
        print(f"{name:32} {value:>20}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=1_000_000 * SCALARS, help="of the ingest")
    parser.add_argument("--upload-gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=9, help="reads of each series")
    parser.add_argument("--reads", type=int, default=40, help="rounds of reads by each connection")
    parser.add_argument("--directory", type=Path, default=None, help="where the data goes")
    parser.add_argument("--probe", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.points < 100 * SCALARS:
        parser.error(f"--points {options.points}: at least {100 * SCALARS}")
    return options


if __name__ == "__main__":
    given = parse_options()
    if given.probe is not None:
        probe(given.probe)
        sys.exit(0)
    sys.exit(main())
