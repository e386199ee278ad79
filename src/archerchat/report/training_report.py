"""Tell how a model was trained and what it is worth: base, SFT and RL in one document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from archerchat import __version__
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.model.flops import count_parameters
from archerchat.report.curves import run_charts
from archerchat.report.document import (
    Charts,
    Details,
    Document,
    Fact,
    Facts,
    Paragraph,
    Part,
    Sample,
    Section,
    Table,
)
from archerchat.report.evaluations import comparison_table, evaluation_sections
from archerchat.report.numbers import count, dollars, duration, moment, percent, shown
from archerchat.report.results import Result, latest, load_results
from archerchat.report.runs import Run, load_family, lookup
from archerchat.report.spending import (
    Prices,
    Spending,
    describe_prices,
    device_count,
    device_name,
    result_spending,
    run_spending,
)

STAGE_TITLES = {
    "base": "Pretraining",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
}
WARMUP_POINTS = 5
"""Steps after a start that are left out of typical speeds."""


@dataclass(frozen=True)
class Material:
    """What a report is drawn from."""

    runs: list[Run]
    results: list[Result]

    @property
    def title(self) -> str:
        return self.runs[-1].model_tag


def gather(home: Home, tag: str | None) -> Material:
    """Read the runs of a model and what its stages were evaluated to.

    Raises:
        UsageError: there is no such run.
        DataError: a journal is damaged.
    """
    runs = load_family(home, tag)
    places = dict.fromkeys((run.stage, run.model_tag) for run in runs)
    # An evaluation may be there without the journal of the run, as after a part of a pull.
    places |= dict.fromkeys((stage, runs[-1].model_tag) for stage in STAGE_TITLES)
    return Material(runs, [r for stage, tag in places for r in load_results(home, stage, tag)])


def build_training_report(material: Material, prices: Prices) -> Document:
    """Return the document."""
    runs = material.runs
    stages = " → ".join(dict.fromkeys(run.stage for run in runs))
    document = Document(
        f"Training report: {material.title}",
        f"ArcherChat {__version__} · {stages} · last record "
        f"{moment(max(session.end for run in runs for session in run.sessions))}",
    )
    spendings = [run_spending(run, prices) for run in runs]
    spendings += [
        result_spending(result, _run_of(result, runs), prices)
        for result in material.results
        if result.seconds
    ]
    document.sections.append(Section("Overview", _overview(material, spendings)))
    document.sections.append(comparison_table(runs, material.results))
    for run in runs:
        document.sections.append(_run_section(run))
    document.sections += evaluation_sections(material.results)
    samples: list[Part] = [sample for run in runs for sample in _samples(run)]
    if samples:
        document.sections.append(Section("Samples", samples))
    document.sections.append(_spending_section(spendings, runs, prices))
    document.sections.append(_environment_section(runs))
    return document


def _run_of(result: Result, runs: Sequence[Run]) -> Run:
    mine = [r for r in runs if (r.stage, r.model_tag) == (result.stage, result.tag)]
    return (mine or runs)[-1]


def _overview(material: Material, spendings: Sequence[Spending]) -> list[Part]:
    run, results = material.runs[0], material.results
    facts = []
    if (model := model_of(run)) is not None:
        counts = count_parameters(model)
        note = f"depth {model.num_layers}, width {model.model_dim}, {count(counts.scaling)} scaling"
        facts.append(Fact("Parameters", count(counts.total), note))
    tokens = [(r, value) for r in material.runs if (value := r.last("train/tokens")) is not None]
    if tokens:
        shares = ", ".join(f"{r.stage} {r.steps:,}" for r, _ in tokens)
        facts.append(Fact("Tokens", count(sum(value for _, value in tokens)), f"steps: {shares}"))
    if (bits := run.last("val/bpb")) is not None:
        note = f"of {run.stage}; best {shown(run.best('val/bpb'))}"
        facts.append(Fact("Bits per byte", shown(bits), note))
    core = latest([r for r in results if r.stage == "base"], "core")
    if core is not None and core.score is not None:
        facts.append(Fact("CORE", shown(core.score), "GPT-2 XL: 0.2565"))
    chat = latest(results, "chat")
    if chat is not None and chat.score is not None:
        facts.append(Fact("ChatCORE", shown(chat.score), f"after {chat.stage}"))
    total = sum(spending.seconds for spending in spendings)
    costs = [spending.cost for spending in spendings if spending.cost is not None]
    device = f"{device_count(run)} x {device_name(run)}"
    cost = f"{dollars(sum(costs))} · {device}" if costs else device
    facts.append(Fact("Time in all", duration(total), cost))
    parts: list[Part] = [Facts(tuple(facts))]
    for each in material.runs:
        if each.status != "finished":
            parts.append(
                Paragraph(
                    f"The run {each.tag!r} is {each.status}: its figures are those of step "
                    f"{each.steps:,}.",
                    notice=True,
                )
            )
    return parts


def model_of(run: Run) -> ModelConfig | None:
    """Return the shape of the run's model, if the journal has one."""
    config = run.config.get("model_config")
    try:
        return ModelConfig(**config) if isinstance(config, Mapping) else None
    except (TypeError, ValueError, ArithmeticError, AssertionError):
        return None


def _run_section(run: Run) -> Section:
    title = STAGE_TITLES[run.stage]
    section = Section(title if run.tag == run.model_tag else f"{title}: {run.tag}")
    section.parts.append(Paragraph(_describe(run)))
    charts = run_charts(run)
    if charts:
        section.parts.append(Charts(tuple(charts)))
    return section


def _describe(run: Run) -> str:
    """Say in a sentence or two what ran."""
    batch = lookup(run.config, "identity", "total_batch_size")
    text = f"{run.steps:,} steps"
    if isinstance(batch, int):
        text += f" of {batch:,} tokens"
    rates = [p.value for p in run.metrics.get("train/tokens_per_second", ())][WARMUP_POINTS:]
    shares = [p.value for p in run.metrics.get("train/mfu", ())][WARMUP_POINTS:]
    if rates:
        text += f"; in the median {median(rates):,.0f} tokens/s"
    if shares:
        text += f" at {percent(median(shares))} of the device's peak (MFU)"
    if (memory := run.last("train/memory_bytes")) is not None:
        text += f"; peak memory {memory / 2**30:.2f} GiB"
    sessions = len(run.sessions)
    text += f". {run.status.capitalize()}"
    if sessions > 1:
        text += f", in {sessions} sessions"
    data = lookup(run.config, "config", "data")
    if isinstance(data, str):
        text += f"; data: {data}"
    return text + "."


def _samples(run: Run) -> list[Sample]:
    return [
        Sample(f"{run.stage}, step {step:,} · {name.removeprefix('sample/')}", text)
        for name, passages in run.texts.items()
        for step, text in passages[-1:]
    ]


def _spending_section(
    spendings: Sequence[Spending], runs: Sequence[Run], prices: Prices
) -> Section:
    rows: list[tuple[str, ...]] = [
        (
            each.name,
            duration(each.training_seconds),
            duration(each.eval_seconds),
            duration(each.other_seconds),
            duration(each.seconds),
            dollars(each.cost),
        )
        for each in spendings
    ]
    costs = [each.cost for each in spendings if each.cost is not None]
    totals = [
        sum(values)
        for values in zip(
            *((s.training_seconds, s.eval_seconds, s.other_seconds, s.seconds) for s in spendings),
            strict=True,
        )
    ]
    cost = dollars(sum(costs)) if costs else dollars(None)
    rows.append(("Sum", *map(duration, totals), cost))
    columns = ("", "training", "evaluation", "the rest", "in all", "cost")
    note = (
        "The rest is compiling, sampling, saving and waiting for data, within the sessions. Cost: "
        f"{describe_prices(runs[0], prices)}."
    )
    return Section("Time and cost", [Table(columns, tuple(rows)), Paragraph(note)])


def _environment_section(runs: Sequence[Run]) -> Section:
    rows: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for name, value in _environment(run).items():
            rows.setdefault(name, [""] * len(runs))[number] = value
    columns = ("", *(run.tag for run in runs))
    table = Table(columns, tuple((name, *values) for name, values in rows.items()), figures=False)
    parts: list[Part] = [table]
    for run in runs:
        shown_config = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
        parts.append(Details(f"Configuration of {run.tag}", shown_config))
    return Section("Environment and configuration", parts)


def _environment(run: Run) -> dict[str, str]:
    """Return what is known of where and how a run ran, by name."""
    found: dict[str, Any] = {
        "commit": lookup(run.config, "environment", "git_commit"),
        "command": lookup(run.config, "environment", "command"),
        "host": run.sessions[-1].host,
        "began": moment(run.sessions[0].start),
    }
    for group in ("hardware", "environment"):
        facts = run.config.get(group)
        if isinstance(facts, Mapping):
            found |= {str(k): v for k, v in facts.items() if k not in ("git_commit", "command")}
    for name in ("attention", "compile", "tokenizer"):
        found[name] = run.config.get(name)
    found["precision"] = lookup(run.config, "identity", "dtype")
    if isinstance(found["tokenizer"], Mapping):
        found["tokenizer"] = found["tokenizer"].get("name")
    return {k: "not recorded" if v in (None, "") else str(v) for k, v in found.items()}
