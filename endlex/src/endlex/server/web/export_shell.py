"""Build the page of an export, which lacks only a run's title and data.

A browser loads no module from a file:// address, so each ES module becomes a function that returns
what it exports, and all of them one script, in the order of their imports. The modules must
therefore import by name and without renaming, from each other only, and export declarations.

The build hook (endlex/server/hatch_build.py) runs this to put the page into a wheel, so it imports
nothing but the standard library.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

STATIC = Path(__file__).with_name("static")
TEMPLATES = Path(__file__).with_name("templates")

CHART_ASSETS = ("vendor/uplot/uPlot.iife.min.js", "vendor/uplot/uPlot.min.css")
"""What hatch_build.py fetches, below the static folder."""

STYLES = ("colors", "base", "controls", "tables", "labels", "run", "charts", "phone")
"""In the order in which they count: later ones win."""

ENTRY = "export_page.js"

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?P<kind>(?:async )?(?:function|class|const|let)) (?P<name>\w+)", re.MULTILINE
)


def build_shell() -> str:
    """Return the page as a `string.Template` of `title` and `data`."""
    parts = {
        "styles": "\n".join(map(_static, [CHART_ASSETS[1], *(f"{name}.css" for name in STYLES)])),
        "theme": _escape_script(_static("theme.js")),
        "chart_library": _escape_script(_static(CHART_ASSETS[0])),
        "script": _escape_script(bundle(ENTRY)),
    }
    literal = {name: text.replace("$", "$$") for name, text in parts.items()}
    template = Template((TEMPLATES / "export.html").read_text(encoding="utf-8"))
    return template.substitute(literal, title="$title", data="$data")


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
