"""A run as one HTML file: its data, the pages' scripts and styles, and the chart library.

The file opens from a disk with no network: a browser loads no module from a file:// address, so
each ES module becomes a function that returns what it exports, and all of them one script, in the
order of their imports. That asks of the modules to import by name and without renaming, from each
other only, and to export declarations. The file's own content security policy forbids every
request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import Template
from typing import Any

import orjson

from endlex.server.web.pages import CHART_ASSETS, STATIC, STYLES, TEMPLATES

ENTRY = "export_page.js"
POINTS = 2000
"""Of each series; as many as a chart of the live page gets at first."""
FEWEST_POINTS = 200
MOST_POINTS = 200_000
"""Of all series together, at about 40 bytes each, where the run has many metrics."""

SeriesReader = Callable[[Sequence[str], str, int], Mapping[str, Mapping[str, Any]]]
"""(metrics, x, points) to what `GET /series` has under "series"; x is "step" or "time"."""

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?P<kind>(?:async )?(?:function|class|const|let)) (?P<name>\w+)", re.MULTILINE
)


def render(
    run: Mapping[str, Any],
    read_series: SeriesReader,
    texts: Sequence[Mapping[str, Any]] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    alerts: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the file's content.

    Args:
        run: what `GET /runs/{run}` answers, in full.
        read_series: asked for all metrics at once, against steps and against time.
        texts, tables: records with step, name, time and text, or columns and rows; any order.
        alerts: open ones, as `GET /alerts` answers.
        settings: of the project, as `GET /settings` answers; its panels are shown.
    """
    names = [metric["name"] for metric in run["metrics"]]
    points = max(FEWEST_POINTS, min(POINTS, MOST_POINTS // max(1, len(names))))
    by_step = read_series(names, "step", points)
    by_time = read_series(names, "time", points)
    data = {
        "run": dict(run),
        "series": {name: {"step": by_step[name], "time": by_time[name]} for name in names},
        "texts": list(texts),
        "tables": list(tables),
        "alerts": list(alerts),
        "settings": {"panels": {}, **(settings or {})},
    }
    styles = [_static(name) for name in (CHART_ASSETS[1], *STYLES)]
    template = Template((TEMPLATES / "export.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_escape_text(str(run.get("name") or run["run"])),
        styles="\n".join(styles),
        theme=_escape_script(_static("theme.js")),
        chart_library=_escape_script(_static(CHART_ASSETS[0])),
        data=orjson.dumps(data, default=str).decode().replace("<", r"\u003c"),
        script=_escape_script(bundle(ENTRY)),
    )


def bundle(entry: str) -> str:
    """Return a module and all that it imports as one script, each after what it needs."""
    done: dict[str, str] = {}
    _add_module(entry, done, ())
    return "\n".join(done.values())


def _add_module(name: str, done: dict[str, str], above: tuple[str, ...]) -> None:
    if name in done:
        return
    assert name not in above, f"modules import each other: {' -> '.join([*above, name])}"
    source = _static(f"js/{name}")
    for _, needed in _IMPORT.findall(source):
        _add_module(f"{needed}.js", done, (*above, name))
    exported = ", ".join(found["name"] for found in _EXPORT.finditer(source))
    body = _EXPORT.sub(r"\g<kind> \g<name>", _IMPORT.sub(r"const \1 = module_\2;", source))
    variable = f"module_{name.removesuffix('.js')}"
    done[name] = f"const {variable} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();"


def _static(name: str) -> str:
    file = STATIC / name
    # Without the chart library the file still has everything but charts, and says so.
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _escape_script(content: str) -> str:
    """Keep our own scripts' strings from ending the element that they stand in."""
    return re.sub(r"<(?=/script|!--|script)", r"\\u003c", content, flags=re.IGNORECASE)


def _escape_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
