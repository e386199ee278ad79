"""Tell how loss falls with size over several runs: the law, its errors, what it foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archerchat import __version__
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.flops import count_parameters
from archerchat.report.charts import PALETTE, LineChart, Series
from archerchat.report.document import (
    Charts,
    Document,
    Fact,
    Facts,
    Paragraph,
    Part,
    Section,
    Table,
)
from archerchat.report.numbers import count, percent, shown
from archerchat.report.runs import load_run, run_tags
from archerchat.report.scaling import Law, fit_law, leave_one_out, optimal_split
from archerchat.report.training_report import model_of

Parameters = Literal["scaling", "total"]
BOTH_SIZES = 6
"""Runs that the law of two sizes takes at least: one more than it has unknowns."""
WITH_FLOOR = 4
"""Runs that a power law with a floor takes at least, likewise."""
SAME_DIRECTION = 0.98
"""Correlation of two sizes from which on their effects cannot be told apart."""
DISTINCT = 3
"""Values of each size from which on its factor, its exponent and the floor can be told apart."""
AHEAD = 10.0
"""How many times the compute of the largest run is looked at."""


@dataclass(frozen=True)
class SizedRun:
    """One run of the series, at its end."""

    tag: str
    parameters: int
    tokens: float
    flops: float
    loss: float
    finished: bool


@dataclass(frozen=True)
class Fit:
    """The law that the runs allow, and why it is that one."""

    law: Law
    both: bool
    """Whether parameters and tokens have terms of their own; else it is over compute."""
    reason: str
    without_one: tuple[Law, ...]
    """Fitted without one of the runs each; empty where too few would be left."""

    def predict(self, run: SizedRun) -> float:
        sizes = (run.parameters, run.tokens) if self.both else (run.flops,)
        return float(self.law.predict(*sizes))


def gather_sizes(
    home: Home, tags: Sequence[str], metric: str, parameters: Parameters
) -> list[SizedRun]:
    """Read the end of each run, the smallest compute first.

    Raises:
        UsageError: a run is not there, or did not log what is needed.
        DataError: a journal is damaged.
    """
    found = []
    for tag in tags:
        run = load_run(home, tag)
        if run is None:
            known = ", ".join(run_tags(home)) or "none"
            raise UsageError(f"there is no run {tag!r} in {home.root / 'runs'}; there is {known}")
        model, loss = model_of(run), run.last(metric)
        tokens, flops = run.last("train/tokens"), run.last("train/flops")
        if model is None or loss is None or not tokens or not flops:
            named = {metric: loss, "train/tokens": tokens, "train/flops": flops, "a model": model}
            absent = ", ".join(name for name, value in named.items() if not value)
            raise UsageError(
                f"run {tag!r} has not logged {absent}: leave it out or choose another --metric"
            )
        if loss <= 0:
            raise UsageError(f"run {tag!r} has {metric} {loss}, which no power law reaches")
        counts = count_parameters(model)
        size = counts.scaling if parameters == "scaling" else counts.total
        found.append(SizedRun(tag, size, tokens, flops, loss, run.status == "finished"))
    return sorted(found, key=lambda run: run.flops)


def fit_runs(runs: Sequence[SizedRun]) -> Fit:
    """Fit the richest law that the runs can tell.

    Raises:
        UsageError: there are fewer than two runs, or all of one size.
    """
    if len({run.flops for run in runs}) < 2:
        raise UsageError(
            f"a law needs runs of at least two sizes, not {len({r.flops for r in runs})}: train "
            "more depths"
        )
    losses = [run.loss for run in runs]
    sizes: list[list[float]] = [[run.parameters for run in runs], [run.tokens for run in runs]]
    logs, both, floor = np.log(sizes), False, True
    varied = bool((np.ptp(logs, axis=1) > 1e-9).all())
    together = abs(float(np.corrcoef(logs)[0, 1])) if varied else 1.0
    distinct = min(len(set(np.round(row, 2))) for row in logs)
    if len(runs) >= BOTH_SIZES and together < SAME_DIRECTION and distinct < DISTINCT:
        reason = (
            f"These runs have only {distinct} different numbers of parameters or of tokens, and a "
            f"curve takes {DISTINCT}: the law is over compute."
        )
    elif len(runs) >= BOTH_SIZES and together < SAME_DIRECTION:
        both = True
        reason = f"{len(runs)} runs whose parameters and tokens vary apart."
    elif len(runs) >= BOTH_SIZES:
        reason = (
            "In these runs tokens grow with parameters, as in a miniseries at one ratio, so that "
            "their effects cannot be told apart: the law is over compute. Runs of one depth with "
            "several --target-param-data-ratio would tell them apart."
        )
    elif len(runs) >= WITH_FLOOR:
        reason = (
            f"{len(runs)} runs are too few to tell the effects of parameters and tokens apart "
            f"({BOTH_SIZES} could): the law is over compute."
        )
    else:
        floor = False
        reason = (
            f"{len(runs)} runs are too few for a floor ({WITH_FLOOR} could tell one): this is a "
            "plain power law over compute, which foretells too little loss far ahead."
        )
    terms = sizes if both else [[run.flops for run in runs]]
    law = fit_law(losses, terms, floor)
    return Fit(law, both, reason, tuple(leave_one_out(losses, terms, floor)))


def build_scaling_report(runs: Sequence[SizedRun], fit: Fit, metric: str) -> Document:
    """Return the document."""
    document = Document(
        "Scaling law",
        f"ArcherChat {__version__} · {metric} of {len(runs)} runs: "
        + ", ".join(run.tag for run in runs),
    )
    parts: list[Part] = [Facts(_facts(fit)), Paragraph(f"{formula(fit)}. {fit.reason}")]
    unfinished = [run.tag for run in runs if not run.finished]
    if unfinished:
        text = f"Not finished, so their learning rate had not decayed: {', '.join(unfinished)}."
        parts.append(Paragraph(text, notice=True))
    if any(exponent <= 0 for exponent in fit.law.exponents):
        text = "An exponent is not positive: these runs do not show loss falling with size."
        parts.append(Paragraph(text, notice=True))
    document.sections.append(Section("The law", parts))
    document.sections.append(Section("Curves", [Charts(_charts(runs, fit, metric))]))
    document.sections.append(Section("Runs", [_table(runs, fit, metric)]))
    document.sections.append(Section("Ahead", _ahead(runs, fit, metric)))
    return document


def formula(fit: Fit) -> str:
    """Write the law out."""
    names = ("N", "D") if fit.both else ("C",)
    terms = [
        f"{factor:.4g} / {name}^{exponent:.4f}"
        for factor, name, exponent in zip(fit.law.factors, names, fit.law.exponents, strict=True)
    ]
    floor = [] if fit.law.floor is None else [f"{fit.law.floor:.4f}"]
    return f"L({', '.join(names)}) = {' + '.join(floor + terms)}"


def _facts(fit: Fit) -> tuple[Fact, ...]:
    def over(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "no range: too few runs"
        return f"{min(known):.3f} to {max(known):.3f} without one run"

    facts = []
    if fit.law.floor is not None:
        facts.append(
            Fact("E, the floor", shown(fit.law.floor), over([w.floor for w in fit.without_one]))
        )
    names = ("alpha, of parameters", "beta, of tokens") if fit.both else ("exponent of compute",)
    for i, name in enumerate(names):
        note = over([law.exponents[i] for law in fit.without_one])
        facts.append(Fact(name, shown(fit.law.exponents[i]), note))
    return tuple(facts)


def _charts(runs: Sequence[SizedRun], fit: Fit, metric: str) -> tuple[LineChart, ...]:
    dots = [(run.flops, run.loss) for run in runs]
    flops = np.geomspace(runs[0].flops, runs[-1].flops * AHEAD, 60)
    if not fit.both:
        curve = list(zip(flops.tolist(), fit.law.predict(flops).tolist(), strict=True))
        name = f"{metric} against compute"
        return (_log_chart(name, "FLOPs", Series("law", curve, 1, "dashed"), dots),)
    sizes = sorted({run.parameters for run in runs})
    if len(sizes) > PALETTE:
        sizes = [sizes[round(i * (len(sizes) - 1) / (PALETTE - 1))] for i in range(PALETTE)]
    series = []
    for color, size in enumerate(sizes):
        mine = [(run.tokens, run.loss) for run in runs if run.parameters == size]
        tokens = np.geomspace(min(r.tokens for r in runs), max(r.tokens for r in runs) * 2, 40)
        curve = list(zip(tokens.tolist(), fit.law.predict(size, tokens).tolist(), strict=True))
        series.append(Series("", curve, color, "dashed"))
        series.append(Series(f"{count(size)}", mine, color, "dots"))
    over_tokens = LineChart(
        f"{metric} against tokens, by parameters", "tokens", tuple(series), log_x=True, log_y=True
    )
    best = [float(fit.law.predict(*optimal_split(fit.law, c))) for c in flops.tolist()]
    frontier = Series("best split", list(zip(flops.tolist(), best, strict=True)), 1, "dashed")
    return (
        over_tokens,
        _log_chart(f"{metric} against compute, with the best split", "FLOPs", frontier, dots),
    )


def _log_chart(
    title: str, x_label: str, curve: Series, dots: Sequence[tuple[float, float]]
) -> LineChart:
    return LineChart(
        title, x_label, (curve, Series("runs", dots, 0, "dots")), log_x=True, log_y=True
    )


def _table(runs: Sequence[SizedRun], fit: Fit, metric: str) -> Table:
    rows = tuple(
        (
            run.tag,
            count(run.parameters),
            count(run.tokens),
            f"{run.flops:.3g}",
            shown(run.loss),
            shown(predicted := fit.predict(run)),
            percent(run.loss / predicted - 1, 2),
        )
        for run in runs
    )
    return Table(("run", "parameters", "tokens", "FLOPs", metric, "law", "off by"), rows)


def _ahead(runs: Sequence[SizedRun], fit: Fit, metric: str) -> list[Part]:
    flops = runs[-1].flops * AHEAD
    start = f"{AHEAD:g} times the compute of {runs[-1].tag} ({flops:.3g} FLOPs)"
    if not fit.both:
        value = shown(float(fit.law.predict(flops)))
        return [Paragraph(f"At {start} the law says {metric} {value}: an extrapolation.")]
    if any(exponent <= 0 for exponent in fit.law.exponents):
        return [Paragraph("The law has no best split of compute.")]
    parameters, tokens = optimal_split(fit.law, flops)
    alpha, beta = fit.law.exponents
    share = beta / (alpha + beta)
    return [
        Paragraph(
            f"With C = 6 N D the least loss has parameters growing as C^{share:.3f} and tokens as "
            f"C^{1 - share:.3f}. At {start} that is {count(parameters)} parameters and "
            f"{count(tokens)} tokens ({tokens / parameters:.1f} a parameter), with {metric} "
            f"{shown(float(fit.law.predict(parameters, tokens)))}: an extrapolation."
        )
    ]
