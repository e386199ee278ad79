"""`endlex watch`: plot a run in the terminal while it is going; when piped, print lines.

A run of the server is polled, and so is a run's directory on this machine: no server is needed to
watch a run beside its trainer. Plots are drawn by plotext, the extra `endlex[watch]`.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from endlex.api import Api
from endlex.client.transport import Unreachable, quoted
from endlex.commands.rendering import format_age, format_number, printable
from endlex.commands.targets import is_run_directory, load_run
from endlex.protocol import EndlexError, UsageError
from endlex.reading import read_points

PLOTS = 4
ENDED = ("finished", "failed", "interrupted", "crashed")
PREFERRED = ("train/loss", "loss", "val/bpb", "val/loss", "train/tokens_per_second", "train/mfu")
PLOT_ROWS = 12

Look = dict[str, Any]
"""A run at one moment, as `GET /runs/RUN` answers."""


def watch(run: str, metric: Sequence[str], every: float, once: bool, url: str | None) -> int:
    """Show a run until it ends, or until Ctrl-C."""
    plotext = _import_plotext() if sys.stdout.isatty() else None
    is_here = is_run_directory(Path(run))
    if not is_here:
        run = Api(url).run(run).id
    printed = None
    with suppress(KeyboardInterrupt):
        while True:
            try:
                look = load_run(run, url)
                if is_here and any(one["status"] == "running" for one in look["sessions"]):
                    look["status"] = "running"  # whichever session it is
                names = _choose(look, metric)
                if plotext is not None:
                    _draw(plotext, look, names, run, url)
                elif (line := _line(look, names)) != printed:
                    print(line, flush=True)
                    printed = line
                if once or look["status"] in ENDED:
                    return 0
            except Unreachable as error:  # the server may come back; the first look must succeed
                if once or (printed is None and plotext is None):
                    raise
                print(f"{error}; trying again", file=sys.stderr)
            time.sleep(every)
    print()
    return 0


def _import_plotext() -> Any:
    plotext = None
    with suppress(ModuleNotFoundError):
        plotext = importlib.import_module("plotext")
    if not hasattr(plotext, "clear_figure"):  # it is not there, or another version
        raise EndlexError(
            "plots need plotext 5, which is not installed here: pip install 'endlex[watch]'; "
            "without it, `endlex watch RUN | cat` prints lines"
        )
    return plotext


def _choose(look: Look, wanted: Sequence[str]) -> list[str]:
    """Return which metrics to show: those asked for, else the usual ones, else the first."""
    there = [m["name"] for m in look["metrics"]]
    unknown = [name for name in wanted if name not in there]
    if unknown and look["status"] in ENDED:
        raise UsageError(f"the run has no metric {', '.join(unknown)}; it has {', '.join(there)}")
    if wanted:
        return [name for name in wanted if name in there]
    usual = [name for name in PREFERRED if name in there]
    rest = [name for name in there if name not in usual and not name.startswith("system/")]
    return (usual + rest)[:PLOTS]


def _title(look: Look) -> str:
    return printable(f"{look['project']}/{look['name']} {look['run']}") + f"  {look['status']}"


def _line(look: Look, names: Sequence[str]) -> str:
    last = {m["name"]: m for m in look["metrics"]}
    step = max((last[name]["last_step"] for name in names), default=0)
    values = "  ".join(f"{printable(n)} {format_number(last[n]['last'])}" for n in names)
    return f"{_title(look)}  step {step:,}  {values}"


def _draw(plotext: Any, look: Look, names: Sequence[str], run: str, url: str | None) -> None:
    """Draw one plot per metric, as many as fit below one another."""
    columns, lines = shutil.get_terminal_size()
    names = names[: max(1, (lines - 2) // PLOT_ROWS)]
    last = {m["name"]: m for m in look["metrics"]}
    figure = [f"{_title(look)}, updated {format_age(look['updated'])}"]
    for name in names:
        x, y = _series(run, url, name, columns)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plotsize(columns, min(PLOT_ROWS + 4, (lines - 2) // len(names)))
        if x:
            plotext.plot(x, y, marker="braille")
        plotext.title(f"{printable(name)}  {format_number(last[name]['last'])}")
        figure.append(plotext.build())
    print("\x1b[2J\x1b[H" + "\n".join(figure), flush=True)


def _series(run: str, url: str | None, name: str, width: int) -> tuple[list[float], list[float]]:
    """Return the steps and values of a metric, about `width` of them at most."""
    if is_run_directory(Path(run)):
        points = read_points(Path(run)).get(name, {})
        steps = sorted(step for step, (_, value) in points.items() if math.isfinite(value))
        kept = steps[:: -max(1, len(steps) // max(1, width))][::-1]
        return [float(step) for step in kept], [points[step][1] for step in kept]
    query = {"metric": name, "x": "step", "points": width}
    found = Api(url).get(quoted("runs", run, "series"), query)["series"]
    found = found.get(name, {"x": [], "y": []})
    known = [pair for pair in zip(found["x"], found["y"], strict=True) if None not in pair]
    return [x for x, _ in known], [y for _, y in known]
