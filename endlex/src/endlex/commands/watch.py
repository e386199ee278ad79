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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from endlex.client.transport import Unreachable, quoted
from endlex.commands.rendering import format_age, format_number, printable
from endlex.commands.targets import find_server, is_run_directory, load_run
from endlex.protocol import EndlexError, UsageError
from endlex.reading import read_points, session_files, session_status

PLOTS = 4
ENDED = ("finished", "failed", "interrupted", "crashed")
PREFERRED = ("train/loss", "loss", "val/bpb", "val/loss", "train/tokens_per_second", "train/mfu")
PLOT_ROWS = 12


Look = dict[str, Any]
"""A run at one moment, as `GET /runs/RUN` answers."""


def _look(text: str, url: str | None) -> Look:
    run = load_run(text, url)
    sessions = session_files(Path(text)) if is_run_directory(Path(text)) else []
    if any(session_status(path) == "running" for path in sessions):
        run["status"] = "running"  # whichever session it is
    return run


def _series(text: str, url: str | None, name: str, width: int) -> tuple[list[float], list[float]]:
    """Return the steps and values of a metric, about `width` of them at most."""
    if is_run_directory(Path(text)):
        points = read_points(Path(text)).get(name, {})
        steps = sorted(step for step, (_, value) in points.items() if math.isfinite(value))
        stride = max(1, len(steps) // max(1, width))
        kept = steps[::-stride][::-1]
        return [float(step) for step in kept], [points[step][1] for step in kept]
    query = {"metric": name, "x": "step", "points": width}
    found = find_server(url).get(quoted("runs", text, "series"), query)["series"]
    found = found.get(name, {"x": [], "y": []})
    pairs = zip(found["x"], found["y"], strict=True)
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def watch(run: str, metric: Sequence[str], every: float, once: bool, url: str | None) -> int:
    """Show a run until it ends, or until Ctrl-C."""
    plotext = _import_plotext() if sys.stdout.isatty() else None
    if not is_run_directory(Path(run)):
        run = find_server(url).run(run).id
    printed = None
    with suppress(KeyboardInterrupt):
        while True:
            try:
                look = _look(run, url)
                names = _choose(look, metric)
                if plotext is not None:
                    _draw(plotext, look, names, partial(_series, run, url))
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
    try:
        plotext = importlib.import_module("plotext")
        if hasattr(plotext, "clear_figure"):
            return plotext
        raise EndlexError("this version of plotext is another one: pip install 'endlex[watch]'")
    except ModuleNotFoundError as error:
        if error.name != "plotext":
            raise
        raise EndlexError(
            "plots need plotext, which is not installed here: pip install 'endlex[watch]'; "
            "without it, `endlex watch RUN | cat` prints lines"
        ) from error


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
    return printable(f"{look['project']}/{look['name']} {look['run']}")


def _line(look: Look, names: Sequence[str]) -> str:
    last = {m["name"]: m for m in look["metrics"]}
    step = max((last[name]["last_step"] for name in names), default=0)
    values = "  ".join(f"{printable(n)} {format_number(last[n]['last'])}" for n in names)
    return f"{_title(look)}  {look['status']}  step {step:,}  {values}"


def _draw(
    plotext: Any,
    look: Look,
    names: Sequence[str],
    read: Callable[[str, int], tuple[list[float], list[float]]],
) -> None:
    """Draw one plot per metric, as many as fit below one another."""
    columns, lines = shutil.get_terminal_size()
    fitting = max(1, (lines - 2) // PLOT_ROWS)
    last = {m["name"]: m for m in look["metrics"]}
    figure = [f"{_title(look)}  {look['status']}, updated {format_age(look['updated'])}"]
    for name in names[:fitting]:
        x, y = read(name, columns)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plotsize(columns, min(PLOT_ROWS + 4, (lines - 2) // min(fitting, len(names))))
        if x:
            plotext.plot(x, y, marker="braille")
        plotext.title(f"{printable(name)}  {format_number(last[name]['last'])}")
        figure.append(plotext.build())
    sys.stdout.write("\x1b[2J\x1b[H" + "\n".join(figure) + "\n")
    sys.stdout.flush()
