"""`endlex ls`, `endlex show` and `endlex compare`: what runs there are, and what they hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endlex.api import Api
from endlex.commands.rendering import (
    count,
    format_age,
    format_bytes,
    format_number,
    print_json,
    printable,
    render_table,
)
from endlex.commands.targets import is_run_directory, load_run, local_runs
from endlex.protocol import CONSOLE, TEXT, UsageError
from endlex.reading import iter_session, session_files, summarize
from endlex.search import flatten, matches, parse_search

SHOWN_METRICS = ("val/bpb", "train/loss", "loss")
CELL = 40


def ls(
    query: Sequence[str],
    limit: int,
    ids: bool,
    local: bool,
    url: str | None,
    as_json: bool,
    **rest: Any,
) -> int:
    """Print a table of runs, of the server or of this machine's run directories.

    Args:
        rest: project, group, sort and archived, as the server takes them.
    """
    words = " ".join(query)
    if local:
        found = _local_runs(words, **rest)
        page: dict[str, Any] = {"runs": found[:limit], "total": len(found)}
    else:
        page = Api(url).get("/runs", {"q": words or None, "limit": limit, **rest})
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
    return 0


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


def show(run: str, log: bool, url: str | None, as_json: bool) -> int:
    """Print one run, or what it printed."""
    if log:
        print(_console(run, url))
        return 0
    found = load_run(run, url)
    if as_json:
        print_json(found)
        return 0
    print(f"{printable(found['project'])}/{printable(found['name'])}  {found['run']}")
    host = f" on {printable(found['host'])}" if found.get("host") else ""
    print(f"{found['status']}{host}, updated {format_age(found['updated'])}")
    for key in ("tags", "group", "notes"):
        if value := found.get(key):
            print(f"{key}: {printable(', '.join(value) if isinstance(value, list) else value)}")
    _print_sections(found)
    return 0


def _console(run: str, url: str | None) -> str:
    if not is_run_directory(Path(run)):
        return Api(url).run(run).console()
    records = (record for path in session_files(Path(run)) for record in iter_session(path))
    return "\n".join(r["text"] for r in records if r["type"] == TEXT and r["name"] == CONSOLE)


def _print_sections(found: dict[str, Any]) -> None:
    if found["metrics"]:
        keys = ("last", "min", "max", "last_step", "count")
        rows = [[m["name"], *(format_number(m.get(k)) for k in keys)] for m in found["metrics"]]
        headers = ["METRIC", "LAST", "MIN", "MAX", "STEP", "VALUES"]
        print("\n" + render_table(headers, rows, right=range(1, 6)))
    if found["checkpoints"]:
        rows = []
        for c in found["checkpoints"]:
            row = [c["name"], format_number(c["step"]), format_bytes(c["bytes"]), c["state"]]
            rows.append([*row, ",".join(c.get("aliases") or []), format_age(c["created"])])
        headers = ["CHECKPOINT", "STEP", "SIZE", "STATE", "ALIASES", "SAVED"]
        print("\n" + render_table(headers, rows, right=(1, 2)))
    if flat := flatten(found["config"]):
        print("\n" + render_table(["CONFIG", ""], [[k, str(v)[:80]] for k, v in flat.items()]))
    if names := [*found.get("texts", []), *found.get("tables", [])]:
        print("\ntexts and tables: " + ", ".join(map(printable, names)))


def compare(runs: Sequence[str], metric: Sequence[str], url: str | None, as_json: bool) -> int:
    """Print the metrics of runs side by side, and the configuration where it differs."""
    if len(runs) < 2:
        raise UsageError(f"{runs[0]!r} alone cannot be compared: give two runs or more")
    loaded = [load_run(text, url) for text in runs]
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
        return 0
    heads = [f"{run['name'][:CELL]} ({run['run']})" for run in loaded]
    columns = range(1, len(loaded) + 1)
    rows = [[n, *(format_number(m.get(n, {}).get("last")) for m in by_name)] for n in wanted]
    print(render_table(["LAST VALUE", *heads], rows, right=columns))
    if differing:
        rows = [[key, *(str(v)[:CELL] for v in values)] for key, values in differing.items()]
        print("\n" + render_table(["CONFIG THAT DIFFERS", *heads], rows, right=columns))
    else:
        print("\nthe configurations are equal")
    return 0
