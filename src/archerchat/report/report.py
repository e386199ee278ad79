"""Report how a model was trained and how it scored: base, SFT and RL in one document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from archerchat import __version__
from archerchat.evals.statistics import centred
from archerchat.home import Home
from archerchat.model.flops import count_parameters
from archerchat.planning.gpus import Prices, find_gpu
from archerchat.report.charts import Bars, Lines, Series, compact
from archerchat.report.document import ABSENT, Document
from archerchat.report.results import SCORES, Result, latest, load_results
from archerchat.report.runs import STAGES, Run, load_family

GPT2_CORE = 0.256525
"""CORE of GPT-2 XL (1.5B parameters), SPEC section 9."""
LADDER = (
    ("GPT-2 124M", 0.1139), ("GPT-3 125M", 0.148), ("GPT-2 355M", 0.1849), ("GPT-2 774M", 0.2146),
    ("GPT-3 350M", 0.216), ("GPT-2 XL, 1558M", GPT2_CORE), ("GPT-3 760M", 0.266),
    ("GPT-3 1.3B", 0.291), ("GPT-3 2.7B", 0.329), ("GPT-3 6.7B", 0.361), ("GPT-3 13B", 0.385),
    ("GPT-3 175B", 0.427),
)  # fmt: skip
"""CORE of well-known models: GPT-2's is measured, GPT-3's estimated (SPEC section 11)."""
TITLES = {
    "base": "Pretraining",
    "sft": "Supervised fine-tuning",
    "rl": "Reinforcement learning",
    "core": "CORE, task by task",
    "offline": "Offline tasks (not CORE)",
    "chat": "Chat tasks",
}
"""Titles of a run's stage, and of an evaluation's kind."""
WARMUP_POINTS = 5
"""Steps after the start that typical speeds leave out."""
GROUPS = (
    ("Rollouts", "share", {
        "rollout/reward": "mean reward",
        "rollout/solved_share": "solved",
        "rollout/learning_share": "informative",
        "rollout/cut_share": "truncated",
    }),
    ("Tokens of a step", "", {"rollout/tokens": "generated", "rollout/trained_tokens": "trained"}),
    ("Pass rate on the test", "", {f"val/pass_at_{k}": f"pass@{k}" for k in (1, 2, 4, 8, 16)}),
)  # fmt: skip
"""Metrics that share a chart: title, label of the axis, and labels by metric."""
NOT_DRAWN = ("train/", "data/", "core/", "eval/", "val/bpb")
"""Prefixes of metrics that have their own charts, or need none."""
MAX_OTHERS = 12
MAX_LABEL = 32
"""Most characters of a task's name next to its bar."""
BITS_OF_TEXT, BITS_OF_ANSWERS = "val bits per byte, text", "val bits per byte, answers"


REFERENCES: dict[int, tuple[str, dict[str, float]]] = {
    8: (
        "503M tokens, RTX 5060 Ti 16 GiB",
        {BITS_OF_TEXT: 0.938, BITS_OF_ANSWERS: 0.4185, "CORE": 0.0976, "ChatCORE": 0.2173},
    ),
    12: (
        "1.32B tokens, RTX 5060 Ti 16 GiB; CORE on 200 examples per task",
        {BITS_OF_TEXT: 0.842, BITS_OF_ANSWERS: 0.356, "CORE": 0.1542, "ChatCORE": 0.2578},
    ),
    24: (
        "ratio 8, fp8, eight H100; CORE is the mean of 5 runs",
        {BITS_OF_TEXT: 0.718, "CORE": 0.2626},
    ),
}
"""Conditions and scores of the reference implementation, by depth (SPEC section 11)."""


class Spending(NamedTuple):
    """Time of a run or an evaluation: training steps, evaluations, and the rest."""

    name: str
    training_seconds: float
    eval_seconds: float
    other_seconds: float
    cost: float | None
    """Dollars; None if no price is known."""


def gather(home: Home, tag: str | None) -> tuple[list[Run], list[Result]]:
    """Read the runs of a model, as `load_family` does, and the results of its stages."""
    runs = load_family(home, tag)
    places = dict.fromkeys((run.stage, run.model_tag) for run in runs)
    # After a partial pull an evaluation may exist without the journal of its run.
    places |= dict.fromkeys((stage, runs[-1].model_tag) for stage in STAGES)
    return runs, [r for stage, tag in places for r in load_results(home, stage, tag)]


def build_training_report(
    runs: Sequence[Run], results: Sequence[Result], prices: Prices
) -> Document:
    """Return the document."""
    model, depth = runs[0].model, runs[0].depth
    evaluations = [latest(results, kind, stage) for kind in SCORES for stage in STAGES]
    return Document(
        "training.md",
        version=__version__,
        title=runs[-1].model_tag,
        end=max(run.end for run in runs),
        runs=runs,
        counts=count_parameters(model) if model else None,
        tokens={run.tag: n for run in runs if (n := run.last("train/tokens"))},
        core=latest(results, "core", "base"),
        chat=latest(results, "chat"),
        evaluations=[result for result in evaluations if result and result.tasks],
        comparison=_comparison(runs, results),
        reference=REFERENCES.get(depth or 0),
        depths=list(REFERENCES),
        gpt2=GPT2_CORE,
        ladder=_ladder(latest(results, "core", "base")),
        titles=TITLES,
        typical=_typical,
        samples=[sample for run in runs for sample in _samples(run)],
        spent=_spendings(runs, results, prices),
        prices=prices.per_hour(find_gpu(runs[0].device))[1],
        environment=_environment(runs),
        configuration=lambda run: json.dumps(run.config, indent=2, default=str),
        run_charts=run_charts,
        bars=result_chart,
    )


def _ladder(core: Result | None) -> list[tuple[str, float, str]]:
    """Return models by their CORE, with this one: name, CORE, and the source of the figure.

    Empty without the whole CORE, since parts of it cannot be compared.
    """
    if core is None or core.score is None or core.conditions:
        return []
    known = [(n, v, "measured" if n.startswith("GPT-2") else "estimated") for n, v in LADDER]
    return sorted([*known, (core.tag, core.score, "this model")], key=lambda rung: rung[1])


def _typical(run: Run, metric: str) -> float | None:
    values = run.values(metric)[WARMUP_POINTS:]
    return median(values) if values else None


def _samples(run: Run) -> list[tuple[str, str]]:
    """Return the last sample of each prompt, with a title."""
    last = [(name.removeprefix("sample/"), max(texts.items())) for name, texts in run.texts.items()]
    return [(f"{run.stage}, step {step:,} · {name}", text) for name, (step, text) in last]


def _comparison(
    runs: Sequence[Run], results: Sequence[Result]
) -> tuple[list[str], list[list[str]]]:
    """Return the table of stages, with the reference's scores at the same depth and GPT-2's."""
    depth = runs[0].depth
    _, reference = REFERENCES.get(depth or 0, ("", {}))
    present = {run.stage for run in runs} | {result.stage for result in results}
    stages = [stage for stage in STAGES if stage in present]
    rows: list[list[str]] = []

    def row(name: str, own: Mapping[str, str], gpt2: str = ABSENT) -> None:
        if own:
            theirs = [str(reference.get(name, ABSENT))] if reference else []
            rows.append([name, *(own.get(stage, ABSENT) for stage in stages), *theirs, gpt2])

    bits = {run.stage: f"{b:.4f}" for run in runs if (b := run.last("val/bpb")) is not None}
    row(BITS_OF_TEXT, {stage: value for stage, value in bits.items() if stage == "base"})
    row(BITS_OF_ANSWERS, {stage: value for stage, value in bits.items() if stage != "base"})
    for kind, name in SCORES.items():
        found = {s: result for s in stages if (result := latest(results, kind, s)) is not None}
        full = kind == "core" and not any(result.conditions for result in found.values())
        row(name, {s: _score(r) for s, r in found.items()}, str(GPT2_CORE) if full else ABSENT)
        tasks = [(s, task) for s, r in found.items() for task in r.tasks if kind == "chat"]
        for label in dict.fromkeys(task.label for _, task in tasks):
            row(f"· {label}", {s: f"{t.accuracy:.1%}" for s, t in tasks if t.label == label})
    row("tokens", {run.stage: compact(n) for run in runs if (n := run.last("train/tokens"))})
    theirs = [f"reference d{depth}"] if reference else []
    return ["", *stages, *theirs, "GPT-2 XL"], rows


def _score(result: Result) -> str:
    if result.score is None:
        return "some tasks" if result.complete else "unfinished"
    return " ".join([f"{result.score:z.4f}", *(f"({each})" for each in result.conditions)])


def _spendings(runs: Sequence[Run], results: Sequence[Result], prices: Prices) -> list[Spending]:
    """Return the time and cost of each run and each evaluation."""

    def spending(name: str, run: Run, *seconds: *tuple[float, float, float]) -> Spending:
        devices = run.setting("hardware", "world_size") or 1
        price, _ = prices.per_hour(find_gpu(run.device))
        cost = None if price is None else sum(seconds) / 3600 * devices * price
        return Spending(name, *seconds, cost)

    rows = []
    for run in runs:
        # A session's first record is written after its model is built.
        other = max(0.0, run.wall_seconds - run.training_seconds - run.eval_seconds)
        rows.append(spending(run.tag, run, run.training_seconds, run.eval_seconds, other))
    for result in results:
        own = [r for r in runs if (r.stage, r.model_tag) == (result.stage, result.tag)]
        seconds = sum(task.seconds for task in result.tasks)
        name = f"{SCORES[result.kind]} of {result.stage}, step {result.step}"
        rows.append(spending(name, (own or runs)[-1], 0.0, seconds, 0.0))
    return rows


def _environment(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return a table of each run's machine and software."""
    columns: list[dict[str, Any]] = []
    for run in runs:
        facts = {"host": run.host}
        for group in ("environment", "hardware"):
            facts |= run.setting(group) or {}
        facts |= {name: run.setting(name) for name in ("attention", "compile")}
        facts["tokenizer"] = run.setting("tokenizer", "name") or run.setting("tokenizer")
        facts["precision"] = run.setting("identity", "dtype")
        columns.append(facts)
    names = dict.fromkeys(name for facts in columns for name in facts)
    rows = [[name, *(_known(facts.get(name)) for facts in columns)] for name in names]
    return ["", *(run.tag for run in runs)], rows


def _known(value: Any) -> str:
    return "not recorded" if value in (None, "") else str(value)


def run_charts(run: Run) -> list[Lines]:
    """Return the charts of a run's metrics."""
    rate = "train/matrix_lr" if "train/matrix_lr" in run.metrics else "train/lr_multiplier"
    of_peak = "" if rate == "train/matrix_lr" else "share of the peak"
    low, high = (run.metrics.get(f"core/{end}", {}) for end in ("low", "high"))
    core = _series(run, "core/score", band=[(x, low[x], high[x]) for x in low if x in high])
    charts = [
        _loss_chart(run),
        _throughput_chart(run),
        Lines("Learning rate of the matrices", "step", (_series(run, rate),), of_peak),
        Lines("CORE while training, 95% interval", "step", (core,)),
    ]
    for title, y_label, labels in GROUPS:
        named = enumerate(name for name in labels if name in run.metrics)
        curves = (_series(run, name, labels[name], color=i) for i, name in named)
        charts.append(Lines(title, "step", tuple(curves), y_label))
    grouped = {name for _, _, labels in GROUPS for name in labels}
    others = [n for n in run.metrics if n not in grouped and not n.startswith(NOT_DRAWN)]
    charts += [Lines(name, "step", (_series(run, name),)) for name in others[:MAX_OTHERS]]
    return [chart for chart in charts if any(len(each.points) > 1 for each in chart.series)]


def _series(run: Run, metric: str, label: str = "", **looks: Any) -> Series:
    return Series(label, tuple(run.metrics.get(metric, {}).items()), **looks)


def _loss_chart(run: Run) -> Lines:
    """Return the chart of training and validation loss; a policy's loss has no unit."""
    raw = _series(run, "train/loss", kind="faint")
    smooth = _series(run, "train/smooth_loss", "training")
    validation = _series(run, "val/bpb", "validation", color=1, on_right=True)
    if run.stage == "rl":
        return Lines("Policy loss", "step", (raw, smooth))
    curves = (raw, smooth, validation) if validation.points else (raw, smooth)
    positive = all(value > 0 for series in curves for _, value in series.points)
    right = "bits per byte" if validation.points else ""
    return Lines("Loss", "step", curves, "nats per token", right, log_y=positive)


def _throughput_chart(run: Run) -> Lines:
    """Return the chart of tokens per second, with MFU on the right if it is proportional."""
    rates, shares = (run.metrics.get(f"train/{n}", {}) for n in ("tokens_per_second", "mfu"))
    ratios = [shares[step] / rate for step, rate in rates.items() if step in shares and rate > 0]
    scale = 100 * median(ratios) if ratios and max(ratios) <= 1.01 * min(ratios) else None
    curve = _series(run, "train/tokens_per_second")
    label = "MFU in %" if scale else ""
    return Lines("Throughput", "step", (curve,), "tokens/s", label, scale, from_zero=True)


def result_chart(result: Result) -> Bars:
    """Return the centred accuracies of an evaluation's tasks, the highest first."""
    bars = []
    for task in sorted(result.tasks, key=lambda task: task.centred, reverse=True):
        low, high = (centred(limit, task.random_baseline) for limit in task.interval)
        bars.append((task.label[:MAX_LABEL], task.centred, (low, high), f"{task.accuracy:.1%}"))
    return Bars("Centred accuracy", bars)
