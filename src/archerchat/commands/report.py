"""`archerchat report`, `report scaling` and `compare`: what runs show, alone and side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from archerchat.config import Config
from archerchat.console import build_console, build_table
from archerchat.errors import ArcherChatError, UsageError
from archerchat.files import write_bytes, write_json
from archerchat.home import Home, check_name
from archerchat.planning.gpus import Prices
from archerchat.report.comparison import (
    FIRST_STEPS,
    compare,
    compute_multiplier,
    draw_comparison,
    read_course,
)
from archerchat.report.document import CHARTS, HTML, MARKDOWN
from archerchat.report.report import build_training_report
from archerchat.report.runs import gather
from archerchat.report.scaling import Parameters, build_scaling_report, fit_runs, gather_sizes


@dataclass(frozen=True)
class ReportConfig(Config):
    """Write a model's training report from its journals and results (Markdown and HTML).

    `archerchat report TAG` is about one model. `archerchat report scaling RUNS` fits a scaling law
    to several runs.
    """

    tag: tuple[str, ...]
    """Name of a model or a run. Defaults to the latest run."""
    out: Path | None = None
    """Directory to write to; an earlier report in it is replaced. Defaults to `reports/TAG` in
    ArcherChat's home."""
    prices: Prices = field(default_factory=Prices)
    """Prices for the table of costs."""


def report(config: ReportConfig, home: Home) -> None:
    """Write the report and print its path."""
    if len(config.tag) > 1:
        raise UsageError(
            f"a report is about one model, not {len(config.tag)}; for a law over several runs use "
            f"`archerchat report scaling {' '.join(config.tag)}`"
        )
    runs, results = gather(home, config.tag[0] if config.tag else None)
    directory = target_directory(config.out, home, runs[-1].model_tag)
    paths = build_training_report(runs, results, config.prices).write(directory)
    title = f"report of {', '.join(run.tag for run in runs)}:"
    print("\n  ".join([title, *map(str, paths)]))


def target_directory(out: Path | None, home: Home, name: str) -> Path:
    """Return `out`, or the home's directory for a report of this name.

    Raises:
        UsageError: `out` has no name, or holds anything but a report.
    """
    if out is None:
        return home.root / "reports" / check_name(name, "report name")
    out = out.expanduser()
    if out.name in ("", ".."):
        raise UsageError(f"--out {out} cannot be replaced from here: name a directory")
    if out.exists():
        content = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if content and not (HTML in content and content <= {HTML, MARKDOWN, CHARTS}):
            raise UsageError(f"--out {out} exists and is not a report: choose another directory")
    return out


@dataclass(frozen=True)
class ScalingConfig:
    """Fit a law of loss by parameters and tokens to several runs, and draw it (HTML, Markdown).

    `archerchat report scaling RUNS` takes their names, as in `archerchat report scaling d6 d8 d10`.
    """

    runs: tuple[str, ...]
    """Names of the runs."""
    metric: str = "val/bpb"
    """Metric to fit; the last value of each run counts."""
    parameters: Parameters = "scaling"
    """Parameters to count: `scaling` (block matrices and unembedding) or `total`."""
    out: Path | None = None
    """Directory to write to; an earlier report in it is replaced. Defaults to `reports/scaling` in
    ArcherChat's home."""
    json: Path | None = None
    """Also write the law and the runs to this file."""


def report_scaling(config: ScalingConfig, home: Home) -> None:
    """Fit the law, write the report, and print both the law and the report's path."""
    if twice := [tag for tag in config.runs if config.runs.count(tag) > 1]:
        raise UsageError(f"run {twice[0]!r} is named twice: name each once")
    runs = gather_sizes(home, config.runs, config.metric, config.parameters)
    law, reason = fit_runs(runs)
    directory = target_directory(config.out, home, "scaling")
    paths = build_scaling_report(runs, law, reason, config.metric).write(directory)
    if config.json is not None:
        figures = {
            "metric": config.metric,
            "over": ["parameters", "tokens"] if law.both else ["flops"],
            "floor": law.floor,
            "factors": law.factors,
            "exponents": law.exponents,
            "runs": [asdict(run) | {"predicted": law.predict_run(run)} for run in runs],
        }
        write_json(config.json, figures)
    print("\n  ".join([f"{law}\n{reason}", *map(str, paths)]))


@dataclass(frozen=True)
class CompareConfig:
    """Compare two runs in loss, bits per byte, CORE and ChatCORE.

    The exit code is 0 if they agree, 1 if they differ, and 2 if they have too few steps in common.
    """

    first: str
    """FIRST: name of a run."""
    second: str
    """SECOND: name of another run, or a file with the reference's printed log."""
    json: Path | None = None
    """Also write the figures to this file."""
    plot: Path | None = None
    """Also draw both curves of bits per byte, or of the loss if one has too few, to this SVG
    file."""


def run_comparison(config: CompareConfig, home: Home) -> None:
    """Print the figures that both have, those that differ too much, and the compute multiplier."""
    first, second = read_course(home, config.first), read_course(home, config.second)
    rows, multiplier = compare(first, second), compute_multiplier(first, second)
    if not any(row.limit for row in rows):
        raise UsageError(f"{first.name} and {second.name} have no figure in common to compare")
    names = Path(first.name).name, Path(second.name).name
    table = build_table("", *names, "difference", "limit", "")
    for row in rows:
        figures = (row.first, row.second, row.difference)
        shown = (f"{figure:,.{0 if abs(figure) >= 1000 else 4}f}" for figure in figures)
        unknown = "too few steps" if row.few_steps else ""
        verdict = {None: unknown, True: "agrees", False: "DIFFERS"}[row.agrees]
        table.add_row(row.name, *shown, f"{row.limit:g}" if row.limit else "", verdict)
    build_console().print(table)
    if multiplier:
        print("compute multiplier of {}: {:.3f}".format(*multiplier))
    differing = [row.name for row in rows if row.agrees is False]
    judged = any(row.agrees is not None for row in rows)
    few = next((row.few_steps for row in rows if row.few_steps), None)
    warning = f"{few} common step(s) are too few to say that losses agree: {FIRST_STEPS} are needed"
    if few and judged:
        print(warning)
    if config.json is not None:
        content = {
            "rows": [asdict(row) | {"agrees": row.agrees} for row in rows],
            "compute_multiplier": multiplier and {"run": multiplier[0], "factor": multiplier[1]},
            "agree": not differing if judged else None,
        }
        write_json(config.json, content)
    if config.plot is not None:
        write_bytes(config.plot, draw_comparison(first, second).encode())
    if differing:
        raise ArcherChatError(
            f"{first.name} and {second.name} do not agree in {', '.join(differing)}"
        )
    if not judged:
        raise UsageError(f"{first.name} and {second.name} cannot be compared: {warning}")
