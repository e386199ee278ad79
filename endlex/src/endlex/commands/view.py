"""Look at runs: `endlex ls`, `show`, `compare` and `watch`.

`watch` plots a run in the terminal while it is going, and prints lines when piped. A run of the
server is polled, and so is a run's directory on this machine: no server is needed beside a trainer.
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
from endlex.commands.rendering import (
    count,
    format_age,
    format_bytes,
    format_number,
    print_json,
    printable,
    render_table,
)
from endlex.commands.targets import is_run_directory, local_runs
from endlex.protocol import CONSOLE, TEXT, EndlexError, UsageError
from endlex.reading import iter_session, read_points, session_files, summarize
from endlex.search import flatten, matches, parse_search

SHOWN_METRICS = ("val/bpb", "train/loss", "loss")
CELL = 40
PLOTS = 4
PLOT_ROWS = 12
PLOTTED = ("train/loss", "loss", "val/bpb", "val/loss", "train/tokens_per_second", "train/mfu")
ENDED = ("finished", "failed", "interrupted", "crashed")

Found = dict[str, Any]
"""A run at one moment, as `GET /runs/RUN` answers."""


def _load_run(text: str, url: str | None) -> Found:
    """Return what there is to know of a run: from its directory here, else from the server."""
    if is_run_directory(Path(text)):
        return summarize(Path(text))
    return Api(url).run(text).whole


def ls(
    query: list[str], limit: int, ids: bool, local: bool, url: str | None, as_json: bool, **by: Any
) -> None:
    """Print a table of runs, of the server or of this machine's run directories.

    `by` is project, group, sort and archived, as the server takes them.
    """
    words = " ".join(query)
    if local:
        found = _local_runs(words, **by)
        page: dict[str, Any] = {"runs": found[:limit], "total": len(found)}
    else:
        page = Api(url).get("/runs", {"q": words or None, "limit": limit, **by})
    runs = page["runs"]
    if as_json:
        print_json(runs if local else page)
    elif ids:
        for run in runs:
            print(run["run"])
    else:
        print(_run_table(runs) if runs else "no runs")
        if page["total"] > len(runs):
            print(f"{len(runs):,} of {count(page['total'], 'run')}: --limit shows more")


def _local_runs(query: str, project: str | None, group: str | None, **other: Any) -> list[Any]:
    """Return the runs on this machine that a search finds, newest first."""
    if any(other.values()):
        raise UsageError("--local lists what is here: it takes no --sort or --archived")
    known, runs, terms = local_runs(), [], parse_search(query)
    for directory in known.found:
        run = summarize(directory) | {"directory": str(directory)}
        is_of = project in (None, run["project"]) and group in (None, run["group"])
        if is_of and matches(terms, run):
            runs.append(run)
    if known.gone or known.unreadable or not runs:
        print(known, file=sys.stderr)
    return sorted(runs, key=lambda run: -run["updated"])


def _run_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the runs with the first of the usual metrics that any of them has."""
    metric = next((m for m in SHOWN_METRICS if any(m in run["summary"] for run in runs)), "")
    rows = []
    for run in runs:
        words = (run["project"], run["name"], run["status"], format_age(run["updated"]))
        cells = [word[:CELL] for word in (*words, ",".join(run["tags"]))]
        rows.append([run["run"], *cells, format_number(run["summary"].get(metric))])
    headers = ["ID", "PROJECT", "NAME", "STATUS", "UPDATED", "TAGS", metric]
    return render_table(headers, rows, right=(6,))


def show(run: str, log: bool, url: str | None, as_json: bool) -> None:
    """Print one run, or what it printed."""
    if log:
        if is_run_directory(Path(run)):
            records = (one for path in session_files(Path(run)) for one in iter_session(path))
            lines = (r["text"] for r in records if r["type"] == TEXT and r["name"] == CONSOLE)
            print("\n".join(lines))
        else:
            print(Api(url).run(run).console())
        return
    found = _load_run(run, url)
    if as_json:
        print_json(found)
        return
    print(f"{printable(found['project'])}/{printable(found['name'])}  {found['run']}")
    host = f" on {printable(found['host'])}" if found.get("host") else ""
    print(f"{found['status']}{host}, updated {format_age(found['updated'])}")
    for key in ("tags", "group", "notes"):
        if value := found.get(key):
            print(f"{key}: {printable(', '.join(value) if isinstance(value, list) else value)}")
    keys = ("last", "min", "max", "last_step", "count")
    metrics = [[m["name"], *(format_number(m.get(k)) for k in keys)] for m in found["metrics"]]
    checkpoints = []
    for c in found["checkpoints"]:
        row = [c["name"], format_number(c["step"]), format_bytes(c["bytes"]), c["state"]]
        checkpoints.append([*row, ",".join(c.get("aliases") or []), format_age(c["created"])])
    config = [[key, str(value)[:80]] for key, value in flatten(found["config"]).items()]
    for headers, rows, right in (
        ("METRIC LAST MIN MAX STEP VALUES", metrics, range(1, 6)),
        ("CHECKPOINT STEP SIZE STATE ALIASES SAVED", checkpoints, range(1, 3)),
        ("CONFIG ", config, range(0)),
    ):
        if rows:
            print("\n" + render_table(headers.split(" "), rows, right))
    if names := [*found.get("texts", []), *found.get("tables", [])]:
        print("\ntexts and tables: " + ", ".join(map(printable, names)))


def compare(runs: Sequence[str], metric: Sequence[str], url: str | None, as_json: bool) -> None:
    """Print the metrics of runs side by side, and the configuration where it differs."""
    if len(runs) < 2:
        raise UsageError(f"{runs[0]!r} alone cannot be compared: give two runs or more")
    loaded = [_load_run(text, url) for text in runs]
    configs = [flatten(run["config"]) for run in loaded]
    keys = dict.fromkeys(key for config in configs for key in config)
    whole = {key: [config.get(key) for config in configs] for key in keys}
    differing = {k: values for k, values in whole.items() if any(v != values[0] for v in values)}
    by_name = [{m["name"]: m for m in run["metrics"]} for run in loaded]
    names = dict.fromkeys(name for found in by_name for name in found)
    wanted = metric or [name for name in names if not name.startswith("system/")]
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"none of the runs has {', '.join(unknown)}; there is {', '.join(names)}")
    if as_json:
        about = [{k: run[k] for k in ("run", "project", "name")} for run in loaded]
        metrics = {name: [found.get(name) for found in by_name] for name in wanted}
        print_json({"runs": about, "config": differing, "metrics": metrics})
        return
    heads = [f"{run['name'][:CELL]} ({run['run']})" for run in loaded]
    columns = range(1, len(loaded) + 1)
    rows = [[n, *(format_number(m.get(n, {}).get("last")) for m in by_name)] for n in wanted]
    print(render_table(["LAST VALUE", *heads], rows, right=columns))
    if differing:
        rows = [[key, *(str(v)[:CELL] for v in values)] for key, values in differing.items()]
        print("\n" + render_table(["CONFIG THAT DIFFERS", *heads], rows, right=columns))
    else:
        print("\nthe configurations are equal")


def watch(run: str, metric: Sequence[str], every: float, once: bool, url: str | None) -> None:
    """Show a run until it ends, or until Ctrl-C."""
    plotext = None
    if sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            plotext = importlib.import_module("plotext")
        if not hasattr(plotext, "clear_figure"):  # it is not there, or another version
            raise EndlexError(
                "plots need plotext 5, which is not installed here: pip install 'endlex[watch]'; "
                "without it, `endlex watch RUN | cat` prints lines"
            )
    is_here = is_run_directory(Path(run))
    if not is_here:
        run = Api(url).run(run).id
    printed = None
    with suppress(KeyboardInterrupt):
        while True:
            try:
                found = _load_run(run, url)
                if is_here and any(one["status"] == "running" for one in found["sessions"]):
                    found["status"] = "running"  # whichever session it is
                metrics = _choose(found, metric)
                if plotext is not None:
                    _draw(plotext, found, metrics, run, url)
                elif (line := _line(found, metrics)) != printed:
                    print(line, flush=True)
                    printed = line
                if once or found["status"] in ENDED:
                    return
            except Unreachable as error:  # the server may come back; the first look must succeed
                if once or (printed is None and plotext is None):
                    raise
                print(f"{error}; trying again", file=sys.stderr)
            time.sleep(every)
    print()


def _choose(found: Found, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Return which metrics to show: those asked for, else the usual ones, else the first."""
    there = {m["name"]: m for m in found["metrics"]}
    unknown = [name for name in wanted if name not in there]
    if unknown and found["status"] in ENDED:
        raise UsageError(f"the run has no metric {', '.join(unknown)}; it has {', '.join(there)}")
    if wanted:
        return [there[name] for name in wanted if name in there]
    rest = [name for name in there if not name.startswith("system/")]
    usual = dict.fromkeys(name for name in (*PLOTTED, *rest) if name in there)
    return [there[name] for name in usual][:PLOTS]


def _title(found: Found) -> str:
    return printable(f"{found['project']}/{found['name']} {found['run']}") + f"  {found['status']}"


def _line(found: Found, metrics: Sequence[dict[str, Any]]) -> str:
    step = max((m["last_step"] for m in metrics), default=0)
    values = "  ".join(f"{printable(m['name'])} {format_number(m['last'])}" for m in metrics)
    return f"{_title(found)}  step {step:,}  {values}"


def _draw(plotext: Any, found: Found, metrics: list[Any], run: str, url: str | None) -> None:
    """Draw one plot per metric, as many as fit below one another."""
    columns, lines = shutil.get_terminal_size()
    metrics = metrics[: max(1, (lines - 2) // PLOT_ROWS)]
    figure = [f"{_title(found)}, updated {format_age(found['updated'])}"]
    for metric in metrics:
        points = _series(run, url, metric["name"], columns)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plotsize(columns, min(PLOT_ROWS + 4, (lines - 2) // len(metrics)))
        if points:
            plotext.plot([x for x, _ in points], [y for _, y in points], marker="braille")
        plotext.title(f"{printable(metric['name'])}  {format_number(metric['last'])}")
        figure.append(plotext.build())
    print("\x1b[2J\x1b[H" + "\n".join(figure), flush=True)


def _series(run: str, url: str | None, name: str, width: int) -> list[tuple[float, float]]:
    """Return the steps and values of a metric, about `width` of them at most."""
    if is_run_directory(Path(run)):
        points = read_points(Path(run)).get(name, {})
        steps = sorted(step for step, (_, value) in points.items() if math.isfinite(value))
        kept = steps[:: -max(1, len(steps) // max(1, width))][::-1]
        return [(float(step), points[step][1]) for step in kept]
    query = {"metric": name, "x": "step", "points": width}
    found = Api(url).get(quoted("runs", run, "series"), query)["series"]
    series = found.get(name, {"x": [], "y": []})
    return [pair for pair in zip(series["x"], series["y"], strict=True) if None not in pair]
