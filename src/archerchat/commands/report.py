"""`archerchat report`: a model's training report, as Markdown and as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from archerchat.config import Config
from archerchat.console import build_console
from archerchat.errors import UsageError
from archerchat.home import Home, check_name
from archerchat.planning.gpus import Prices
from archerchat.report.document import CHARTS, HTML, MARKDOWN
from archerchat.report.report import build_training_report, gather


@dataclass(frozen=True)
class ReportConfig(Config):
    """Write a model's training report from its journals and results (Markdown and HTML).

    `archerchat report TAG` is about one model; `archerchat report scaling RUNS` fits a scaling law
    to several runs instead.
    """

    tag: tuple[str, ...]
    """Name of a model or a run. Defaults to the latest run."""
    out: Path | None = None
    """Directory to write to; an earlier report in it is replaced. Defaults to `reports/TAG` in
    ArcherChat's home."""
    prices: Prices = field(default_factory=Prices)
    """Prices for the table of costs."""


def report(config: ReportConfig, home: Home) -> None:
    """Write the report and print where it is.

    Raises:
        UsageError: there is no such run, or --out holds something else.
        DataError: a journal is damaged.
    """
    if len(config.tag) > 1:
        raise UsageError(
            f"a report is about one model, not {len(config.tag)}; for a law over several runs use "
            f"`archerchat report scaling {' '.join(config.tag)}`"
        )
    runs, results = gather(home, config.tag[0] if config.tag else None)
    directory = target_directory(config.out, home, runs[-1].model_tag)
    paths = build_training_report(runs, results, config.prices).write(directory)
    console = build_console()
    console.print(f"report of {', '.join(run.tag for run in runs)}:")
    for path in paths:
        console.print(f"  {path}")


def target_directory(out: Path | None, home: Home, name: str) -> Path:
    """Return where to write: `out`, or the home's directory for a report of this name.

    Raises:
        UsageError: `out` holds anything but a report.
    """
    if out is None:
        return home.root / "reports" / check_name(name, "report name")
    out = out.expanduser()
    if out.exists():
        content = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if content and not (HTML in content and content <= {HTML, MARKDOWN, CHARTS}):
            raise UsageError(f"--out {out} exists and is no report; choose another directory")
    return out
