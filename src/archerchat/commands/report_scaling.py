"""`archerchat report scaling`: how loss falls with size over a series of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.commands.report import target_directory
from archerchat.console import build_console
from archerchat.errors import UsageError
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.report.scaling_report import (
    Parameters,
    build_scaling_report,
    fit_runs,
    gather_sizes,
)


@dataclass(frozen=True)
class ScalingConfig:
    """Fit loss against parameters and tokens over several runs, and draw it (HTML and Markdown).

    `archerchat report scaling RUNS` takes their names, as in `archerchat report scaling d6 d8 d10`.
    """

    runs: tuple[str, ...]
    """Names of the runs."""
    metric: str = "val/bpb"
    """What to fit: the last value that each run logged of it."""
    parameters: Parameters = "scaling"
    """Which to count: `scaling` (block matrices and unembedding, as the dial does), or `total`."""
    out: Path | None = None
    """Directory to write to, replaced if it is there; by default under the home's `reports`."""
    json: Path | None = None
    """Also write the law and the runs to this file."""


def report_scaling(config: ScalingConfig, home: Home) -> None:
    """Fit the law, write the report, and say what it is and where.

    Raises:
        UsageError: a run is missing, named twice, or did not log what is needed; or too few.
        DataError: a journal is damaged.
    """
    tags = list(config.runs)
    if len(tags) < 2:
        raise UsageError(
            f"{len(tags)} runs cannot give a law: name at least two, as in `archerchat report "
            "scaling d6 d8 d10`"
        )
    if twice := [tag for tag in tags if tags.count(tag) > 1]:
        raise UsageError(f"run {twice[0]!r} is named twice: name each once")
    runs = gather_sizes(home, tags, config.metric, config.parameters)
    fit = fit_runs(runs)
    directory = target_directory(config.out, home, "scaling")
    paths = build_scaling_report(runs, fit, config.metric).write(directory)
    if config.json is not None:
        figures: dict[str, Any] = {
            "metric": config.metric,
            "over": ["parameters", "tokens"] if fit.both else ["flops"],
            "floor": fit.law.floor,
            "factors": fit.law.factors,
            "exponents": fit.law.exponents,
            "runs": [
                {
                    "tag": run.tag,
                    "parameters": run.parameters,
                    "tokens": run.tokens,
                    "flops": run.flops,
                    "loss": run.loss,
                    "predicted": fit.predict(run),
                }
                for run in runs
            ],
        }
        write_json(config.json, figures)
    build_console().print("\n  ".join([f"{fit.formula}\n{fit.reason}", *map(str, paths)]))
