"""Frame times of Endlex's pages with many long runs, in headless Chromium.

Starts a server on a free port and an empty data directory, sends it RUNS runs of POINTS points
(through the same journal requests as a shipper's), opens the comparison of all of them and one
run's page, and zooms and pans the first charts with real mouse and keyboard events. Each frame's
time is the distance between two callbacks of requestAnimationFrame while the input continues.

    python benchmarks/endlex_page.py                     20 runs of 1,000,000 points
    python benchmarks/endlex_page.py --points 20000      a quick look
    python benchmarks/endlex_page.py --runs 50 --metrics 300 --points 100000   many of both

Needs the extra endlex[server], Playwright's Python package and a Chromium on PATH. The last line
is JSON; `p95_frame_ms` is the worse of the two pages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex_serving import running_server
from measuring import percentile

SESSION = "000001-abcdef012345"
METRICS = ("train/loss", "train/mfu")
BATCH_BYTES = 4 * 2**20
PAN_PIXELS = 240

RECORD_FRAMES = """
() => {
  window.frameTimes = [];
  window.recording = true;
  let last = performance.now();
  const tick = (now) => {
    window.frameTimes.push(now - last);
    last = now;
    if (window.recording) requestAnimationFrame(tick);
  };
  requestAnimationFrame((now) => ((last = now), requestAnimationFrame(tick)));
}
"""


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as directory, running_server(Path(directory)) as url:
        began = time.perf_counter()
        sizes = (options.points, options.metrics)
        runs = [load_run(url, number, *sizes) for number in range(options.runs)]
        seconds = time.perf_counter() - began
        print(f"loaded {options.runs} runs of {options.points:,} points in {seconds:.0f} s")
        result = measure(url, runs, options.seconds)
    asked = {"runs": options.runs, "points": options.points, "metrics": options.metrics}
    print(json.dumps({**result, **asked}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--points", type=int, default=1_000_000, help="of each metric of a run")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--metrics", type=int, default=0, help="more of them, of 100 points each")
    parser.add_argument("--seconds", type=float, default=8.0, help="of panning and of zooming")
    return parser.parse_args()


# ---- loading


def load_run(url: str, number: int, points: int, metrics: int) -> str:
    """Send one run whole and return its id."""
    run = f"benchrun{number:02d}"
    offset = 0
    for body in iter_batches(run, number, points, metrics):
        crc = f"{zlib.crc32(body):08x}"
        address = f"{url}/api/v1/runs/{run}/sessions/{SESSION}/journal?offset={offset}&crc={crc}"
        request = urllib.request.Request(address, data=body, method="POST")
        with urllib.request.urlopen(request) as answer:
            offset = json.load(answer)["offset"]
    return run


def iter_batches(run: str, number: int, points: int, metrics: int) -> Iterator[bytes]:
    """Yield the run's journal in pieces of whole lines: noisy losses with a few spikes."""
    draw = random.Random(number)
    session: dict[str, Any] = {"type": "session", "session": SESSION, "seq": 0, "time": 1.7e9}
    session |= {"protocol": 2, "run": run, "project": "benchmark", "name": f"run {number}"}
    session |= {"config": {"seed": number}, "tags": [], "group": None, "notes": "", "host": "here"}
    session |= {"pid": 1, "rank": 0, "kind": "trainer"}
    lines = [json.dumps(session)]
    head = {"type": "metrics", "session": SESSION, "seq": 0, "time": 1.7e9}
    for step in range(100 if metrics else 0):
        many = {f"layer{n // 50}/norm{n % 50:02d}": draw.gauss(n, 1) for n in range(metrics)}
        lines.append(json.dumps({**head, "step": step * points // 100, "values": many}))
    size = 0
    first, second = METRICS
    for step in range(points):
        loss = 2.5 + 6 * math.exp(-6 * step / points) + draw.gauss(0, 0.1) - 0.02 * number
        loss += 3 if draw.random() < 5 / points else 0
        mfu = draw.gauss(0.4, 0.01)
        line = (
            f'{{"type":"metrics","session":"{SESSION}","seq":{step + 1},"time":{1.7e9 + step},'
            f'"step":{step},"values":{{"{first}":{loss:.5f},"{second}":{mfu:.5f}}}}}'
        )
        lines.append(line)
        size += len(line)
        if size > BATCH_BYTES:
            yield ("\n".join(lines) + "\n").encode()
            lines, size = [], 0
    if lines:
        yield ("\n".join(lines) + "\n").encode()


# ---- measuring


def measure(url: str, runs: list[str], seconds: float) -> dict[str, Any]:
    """Open both pages in a browser, move their charts, and return the figures."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise SystemExit("no chromium on PATH: apt-get install chromium")
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    pages = {"compare": f"{url}/compare?runs={','.join(runs)}", "run": f"{url}/runs/{runs[0]}"}
    result: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=sandbox)
        for name, address in pages.items():
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(address)
            wait_for_data(page)
            before = count_draws(page)
            frames = move_charts(page, seconds)
            result[name] = {**summarize(frames), "draws": count_draws(page) - before}
            print(f"{name}: {result[name]}")
            page.close()
        browser.close()
    worst = max(figures["p95_ms"] for figures in result.values())
    return {"p95_frame_ms": worst, **result}


def wait_for_data(page: Any) -> None:
    page.wait_for_function(
        "() => (window.endlexCharts || []).some((chart) => chart.built) &&"
        " endlexCharts.filter((chart) => chart.built)"
        ".every((chart) => chart.lines.every((line) => line.x.length > 0))",
        timeout=120_000,
    )


def count_draws(page: Any) -> int:
    """Return how often the moved chart was drawn: frames in which nothing moves are free."""
    return int(page.evaluate("() => endlexCharts.find((chart) => chart.built).draws"))


def move_charts(page: Any, seconds: float) -> list[float]:
    """Zoom by a drag, pan with the mouse, zoom with keys; return the frames' times in ms."""
    body = page.locator(".chart-body").first
    box = body.bounding_box()
    left, top, width = box["x"] + 70, box["y"] + 80, box["width"] - 100
    frames: list[float] = []
    page.evaluate(RECORD_FRAMES)
    # A first zoom to a tenth, as people do it: press, drag, release.
    page.mouse.move(left + width * 0.4, top)
    page.mouse.down()
    page.mouse.move(left + width * 0.5, top, steps=10)
    page.mouse.up()
    end = time.monotonic() + seconds
    page.keyboard.down("Shift")
    while time.monotonic() < end:
        for direction in (1, -1):
            page.mouse.move(left + width / 2, top)
            page.mouse.down()
            page.mouse.move(left + width / 2 + direction * PAN_PIXELS, top, steps=30)
            page.mouse.up()
    page.keyboard.up("Shift")
    end = time.monotonic() + seconds
    page.keyboard.down("Control")
    while time.monotonic() < end:
        for wheel in (-60, -60, -60, 60, 60, 60):
            for _ in range(6):
                page.mouse.wheel(0, wheel)
    page.keyboard.up("Control")
    frames = page.evaluate("() => ((window.recording = false), window.frameTimes)")
    return frames


def summarize(frames: list[float]) -> dict[str, float]:
    return {
        "frames": len(frames),
        "median_ms": round(percentile(frames, 0.5), 2),
        "p95_ms": round(percentile(frames, 0.95), 2),
        "max_ms": round(max(frames), 2),
    }


if __name__ == "__main__":
    main()
