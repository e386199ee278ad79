"""`archerchat compare RUN RUN|LOG`: whether two runs agree, and which needs less compute."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from archerchat.console import build_console, build_table
from archerchat.errors import ArcherChatError, UsageError
from archerchat.files import write_bytes, write_json
from archerchat.home import Home
from archerchat.report.comparison import (
    compare,
    compute_multiplier,
    draw_comparison,
    read_course,
)


@dataclass(frozen=True)
class CompareConfig:
    """Compare two runs in loss, bits per byte, CORE and ChatCORE.

    The exit code is 0 if they agree and 1 if they differ.
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
    table = build_table(
        "", Path(first.name).name, Path(second.name).name, "difference", "limit", ""
    )
    for row in rows:
        figures = (row.first, row.second, row.difference)
        shown = (f"{figure:,.{0 if abs(figure) >= 1000 else 4}f}" for figure in figures)
        verdict = {None: "", True: "agrees", False: "DIFFERS"}[row.agrees]
        table.add_row(row.name, *shown, f"{row.limit:g}" if row.limit else "", verdict)
    console = build_console()
    console.print(table)
    if multiplier:
        console.print("compute multiplier of {}: {:.3f}".format(*multiplier))
    differing = [row.name for row in rows if row.agrees is False]
    if config.json is not None:
        content = {
            "rows": [asdict(row) | {"agrees": row.agrees} for row in rows],
            "compute_multiplier": multiplier and {"run": multiplier[0], "factor": multiplier[1]},
            "agree": not differing,
        }
        write_json(config.json, content)
    if config.plot is not None:
        write_bytes(config.plot, draw_comparison(first, second).encode())
    if differing:
        raise ArcherChatError(
            f"{first.name} and {second.name} do not agree in {', '.join(differing)}"
        )
