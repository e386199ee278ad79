"""A run as one HTML file: its data, the pages' scripts and styles, and the chart library.

The file opens from a disk with no network: a browser loads no module from a file:// address, so
each ES module becomes a function that returns what it exports, and all of them one script, in the
order of their imports. That asks of the modules to import by name and without renaming, from each
other only, and to export declarations. The file's own content security policy forbids every
request.
"""

from __future__ import annotations

import html
import re
from string import Template

from endlex.server.web.pages import CHART_ASSETS, STATIC, STYLES, TEMPLATES

ENTRY = "export_page.js"
POINTS = 2000
"""Points per series; as many as a chart of the live page gets at first."""
FEWEST_POINTS = 200
MOST_POINTS = 200_000
"""Points of all series together, at about 40 bytes each, in a run of many metrics."""

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?P<kind>(?:async )?(?:function|class|const|let)) (?P<name>\w+)", re.MULTILINE
)


def points_of_each(metrics: int) -> int:
    """Return how many points each series gets in a file with this number of them."""
    return max(FEWEST_POINTS, min(POINTS, MOST_POINTS // max(1, metrics)))


def render(title: str, data: str) -> str:
    """Return the file's content.

    Args:
        data: JSON of the answers of `local_source.js` to the page: `run`, `series` (by metric and
            x), `texts`, `tables`, `alerts` and `settings`, each as the API has it.
    """
    template = Template((TEMPLATES / "export.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        styles="\n".join(_static(name) for name in (CHART_ASSETS[1], *STYLES)),
        theme=_escape_script(_static("theme.js")),
        chart_library=_escape_script(_static(CHART_ASSETS[0])),
        data=data.replace("<", r"\u003c"),
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
    return (STATIC / name).read_text(encoding="utf-8")


def _escape_script(content: str) -> str:
    """Keep our own scripts' strings from ending the element that they stand in."""
    return re.sub(r"<(?=/script|!--|script)", r"\\u003c", content, flags=re.IGNORECASE)
