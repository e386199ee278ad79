"""`endlex watch`: plot a run in the terminal while it goes on, or print a line a look on a pipe.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endlex.api import Api, ServerUnreachable, run_path
from endlex.commands.rendering import format_age, format_number, printable
from endlex.commands.targets import find_server, find_server_run, is_run_directory
from endlex.commands.usage import UsageError
from endlex.protocol import EndlexError
from endlex.reading import read_points, session_files, session_status, summarize

PLOTS = 4
ENDED = ("finished", "failed", "interrupted", "crashed")
PREFERRED = ("train/loss", "loss", "val/bpb", "val/loss", "train/tokens_per_second", "train/mfu")
PLOT_ROWS = 12


@dataclass(frozen=True)
class Look:
    """A run at one moment."""

    title: str
    status: str
    updated: float
    metrics: list[dict[str, Any]]
    """As `GET /runs/{run}` tells them: name, last, last_step and so on."""


class ServerSource:
    """A run of a server."""

    def __init__(self, server: Api, text: str) -> None:
        self._server = server
        self._run = find_server_run(server, text)["run"]

    def look(self) -> Look:
        """Return the run as it is now."""
        run = self._server.get(run_path(self._run))
        title = f"{run['project']}/{run['name']} {run['run']}"
        return Look(title, run["status"], run["updated"], run["metrics"])

    def series(self, name: str, width: int) -> tuple[list[float], list[float]]:
        """Return the steps and values of a metric, at most about `width` of them."""
        query = {"metric": name, "x": "step", "points": width}
        found = self._server.get(run_path(self._run, "series"), query)["series"].get(name, {})
        pairs = zip(found.get("x", []), found.get("y", []), strict=True)
        kept = [(x, y) for x, y in pairs if x is not None and y is not None]
        return [x for x, _ in kept], [y for _, y in kept]


class DirectorySource:
    """A run's directory on this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def look(self) -> Look:
        """Return the run as it is now."""
        run = summarize(self._directory)
        if any(session_status(path) == "running" for path in session_files(self._directory)):
            run["status"] = "running"
        title = f"{run['project']}/{run['name']} {run['run']}"
        return Look(title, run["status"], run["updated"], run["metrics"])

    def series(self, name: str, width: int) -> tuple[list[float], list[float]]:
        """Return the steps and finite values of a metric, thinned to about `width` of them."""
        points = read_points(self._directory).get(name, {})
        steps = sorted(step for step, (_, value) in points.items() if math.isfinite(value))
        stride = max(1, len(steps) // max(1, width))
        kept = steps[::-stride][::-1]
        return [float(step) for step in kept], [points[step][1] for step in kept]


def watch(run: str, metric: Sequence[str], every: float, once: bool, url: str | None) -> int:
    """Show a run until it ends, or until Ctrl-C."""
    source: ServerSource | DirectorySource
    if is_run_directory(Path(run)):
        source = DirectorySource(Path(run))
    else:
        source = ServerSource(find_server(url), run)
    terminal = sys.stdout.isatty()
    plotext = _import_plotext() if terminal else None
    try:
        _watch(source, metric, every, once, plotext)
    except KeyboardInterrupt:
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


def _watch(
    source: ServerSource | DirectorySource,
    metric: Sequence[str],
    every: float,
    once: bool,
    plotext: Any,
) -> None:
    printed = None
    while True:
        try:
            look = source.look()
            names = _choose(look, metric)
            if plotext is not None:
                _draw(plotext, source, look, names)
            elif (line := _line(look, names)) != printed:
                print(line, flush=True)
                printed = line
            if once or look.status in ENDED:
                return
        except ServerUnreachable as error:  # the server may come back; the first look must succeed
            if once or (printed is None and plotext is None):
                raise
            print(f"{error}; trying again", file=sys.stderr)
        time.sleep(every)


def _choose(look: Look, wanted: Sequence[str]) -> list[str]:
    """Return which metrics to show: those asked for, else the usual ones, else the first."""
    there = [m["name"] for m in look.metrics]
    unknown = [name for name in wanted if name not in there]
    if unknown and look.status in ENDED:
        raise UsageError(f"the run has no metric {', '.join(unknown)}; it has {', '.join(there)}")
    if wanted:
        return [name for name in wanted if name in there]
    usual = [name for name in PREFERRED if name in there]
    rest = [name for name in there if name not in usual and not name.startswith("system/")]
    return (usual + rest)[:PLOTS]


def _line(look: Look, names: Sequence[str]) -> str:
    last = {m["name"]: m for m in look.metrics}
    step = max((last[name]["last_step"] for name in names), default=0)
    values = "  ".join(f"{printable(n)} {format_number(last[n]['last'])}" for n in names)
    return f"{printable(look.title)}  {look.status}  step {step:,}  {values}"


def _draw(
    plotext: Any, source: ServerSource | DirectorySource, look: Look, names: Sequence[str]
) -> None:
    """Draw one plot a metric, as many as fit below one another."""
    columns, lines = shutil.get_terminal_size()
    fitting = max(1, (lines - 2) // PLOT_ROWS)
    last = {m["name"]: m for m in look.metrics}
    figure = [f"{printable(look.title)}  {look.status}, updated {format_age(look.updated)}"]
    for name in names[:fitting]:
        x, y = source.series(name, columns)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plotsize(columns, min(PLOT_ROWS + 4, (lines - 2) // min(fitting, len(names))))
        if x:
            plotext.plot(x, y, marker="braille")
        plotext.title(f"{printable(name)}  {format_number(last[name]['last'])}")
        figure.append(plotext.build())
    sys.stdout.write("\x1b[2J\x1b[H" + "\n".join(figure) + "\n")
    sys.stdout.flush()
