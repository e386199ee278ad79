"""`archerchat report`: what a run did, as one HTML page and as Markdown; laws over several runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from archerchat.console import build_console
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.report.files import default_directory, write_report
from archerchat.report.spending import Prices
from archerchat.report.training_report import build_training_report, gather


@dataclass(frozen=True)
class ReportConfig:
    """Write a model's training report, from its journals and results (HTML and Markdown).

    `archerchat report TAG` is about one model; `archerchat report scaling RUNS` fits a scaling law
    to several runs instead.
    """

    tag: tuple[str, ...]
    """Name of a model or a run; by default that of the latest run."""
    out: Path | None = None
    """Directory to write to, replaced if it is there; by default under the home's `reports`."""
    price_per_hour: float | None = None
    """Dollars for one device for an hour; assumed for cards that are usually rented."""
    price_per_kwh: float = 0.30
    """Dollars for a kilowatt-hour, for a card of your own."""


def report(config: ReportConfig, home: Home) -> None:
    """Write the report and say where it is.

    Raises:
        UsageError: there is no such run, or a number makes no sense.
        DataError: a journal is damaged.
    """
    if len(config.tag) > 1:
        raise UsageError(
            f"a report is about one model, not {len(config.tag)}: for a law over several runs use "
            f"`archerchat report scaling {' '.join(config.tag)}`"
        )
    for name in ("price_per_hour", "price_per_kwh"):
        price = getattr(config, name)
        if price is not None and not 0 <= price < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {price}; it must be 0 or more")
    material = gather(home, config.tag[0] if config.tag else None)
    prices = Prices(config.price_per_hour, config.price_per_kwh)
    document = build_training_report(material, prices)
    directory = target_directory(config.out, home, material.title)
    files = write_report(document, directory)
    console = build_console()
    console.print(f"report of {', '.join(run.tag for run in material.runs)}:")
    console.print(f"  {files.html}\n  {files.markdown}")


def target_directory(out: Path | None, home: Home, name: str) -> Path:
    """Return where to write; refuses a directory that holds anything but a report.

    Raises:
        UsageError: it does.
    """
    if out is None:
        return default_directory(home, name)
    out = out.expanduser()
    foreign = out.exists() and not (out.is_dir() and _is_replaceable(out))
    if foreign:
        raise UsageError(f"--out {out} is there and is no report: name a new directory")
    return out


def _is_replaceable(directory: Path) -> bool:
    content = {path.name for path in directory.iterdir()}
    return not content or ("report.html" in content and content <= {*_OURS})


_OURS = ("report.html", "report.md", "charts")
