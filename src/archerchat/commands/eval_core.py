"""CORE of a base model on the command line: find the bundle, evaluate, show and keep the figures.

Results go to `evals/<stage>/<tag>/core_<step>.json` under the home; an evaluation that was
interrupted resumes from the `.partial.json` beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from archerchat.checkpoint import META
from archerchat.console import duration_text
from archerchat.distributed import joined_ranks
from archerchat.evals.core.bundle import Bundle, load_bundle
from archerchat.evals.core.download import find_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions, Estimate
from archerchat.evals.core.results import (
    CoreResult,
    PartialResults,
    TaskResult,
    describe,
    is_offline,
)
from archerchat.files import sha256_file, write_json
from archerchat.home import Home
from archerchat.inference.loading import InferenceModel, LoadedModel
from archerchat.runtime import Runtime, dtype_name


def evaluate_core(
    loaded: LoadedModel,
    runtime: Runtime,
    home: Home,
    console: Console,
    bundle: str | None,
    options: CoreOptions,
) -> CoreResult:
    """Evaluate CORE, resuming what an earlier call left, and write the results on the first rank.

    Raises:
        UsageError: there is no such bundle.
        DataError: the bundle cannot be had or is broken.
    """
    with joined_ranks(runtime) as ranks:
        folder = ranks.first_alone(
            lambda: find_bundle(bundle, home.cache_dir, notify=console.print)
        )
        tasks = load_bundle(folder)
        evaluation = CoreEvaluation(tasks, loaded.tokenizer, options, ranks)
        if not runtime.is_master:
            return evaluation.run(InferenceModel(loaded.model).model)
        about = {
            "checkpoint": str(loaded.path),
            "step": loaded.step,
            "checkpoint_sha256": sha256_file(loaded.path / META),
            "tokenizer": loaded.tokenizer.fingerprint,
            "bundle": str(tasks.directory),
            "bundle_sha256": tasks.fingerprint(),
            "dtype": dtype_name(runtime.compute_dtype),
            "device": runtime.device_name,
            "options": asdict(options),
        }
        path = results_path(home, loaded, tasks, options)
        kept = PartialResults(path.with_suffix(".partial.json"), about)
        result = _run(evaluation, loaded, kept, console)
    write_json(path, {**about, **result.to_json()})
    kept.remove()
    for note in describe(result):
        console.print(f"note: {note}")
    low, high = result.core - result.half_width, result.core + result.half_width
    name = "offline tasks (not CORE):" if is_offline(result.tasks) else "CORE"
    console.print(
        f"{name} {result.core:.4f} (95 % interval {low:.4f} to {high:.4f}) in "
        f"{duration_text(result.seconds)}; {path}"
    )
    return result


def results_path(home: Home, loaded: LoadedModel, bundle: Bundle, options: CoreOptions) -> Path:
    """Return where the results go.

    A score that is capped or is not CORE has a name of its own, so it never replaces CORE.
    """
    tag, stage = loaded.path.parent.name, loaded.path.parent.parent.name
    cap = "" if options.max_per_task is None else f"_max{options.max_per_task}"
    name = "offline" if is_offline(bundle.tasks) else "core"
    return home.eval_dir(stage, tag) / f"{name}_{loaded.step:06d}{cap}.json"


def _run(
    evaluation: CoreEvaluation, loaded: LoadedModel, kept: PartialResults, console: Console
) -> CoreResult:
    """Evaluate with a bar on a terminal, and one line per task elsewhere."""
    model = InferenceModel(loaded.model).model
    if kept.tasks:
        console.print(f"resuming after {', '.join(kept.tasks)}")
    expected = evaluation.estimate(model, kept.tasks)
    console.print(_describe_estimate(expected.values()))
    table = Table(title="CORE", title_justify="left", box=SIMPLE)  # fits in 80 columns
    table.add_column("task", no_wrap=True)
    for column in ("examples", "accuracy", "centred", "per second"):
        table.add_column(column, justify="right")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        whole = bar.add_task("CORE", total=sum(each.seconds for each in expected.values()))
        spent = 0.0

        def on_progress(label: str, share: float) -> None:
            seconds = expected[label].seconds
            bar.update(whole, completed=spent + share * seconds, description=label)

        def on_task(result: TaskResult) -> None:
            nonlocal spent
            if result.label in expected:  # it was not kept from an earlier call
                spent += expected[result.label].seconds
            accuracy, centred = f"{result.accuracy:.4f}", f"{result.centred:.4f}"
            rate = f"{result.examples_per_second:,.1f}"
            table.add_row(result.label, f"{result.examples:,}", accuracy, centred, rate)
            if not console.is_terminal:
                console.print(
                    f"{result.label}: accuracy {accuracy}, centred {centred}, {rate} examples/s"
                )

        result = evaluation.run(model, kept, on_task, on_progress)
    console.print(table)
    return result


def _describe_estimate(expected: Collection[Estimate]) -> str:
    tokens = sum(each.tokens for each in expected)
    saved = sum(each.prompt_tokens for each in expected) / max(tokens, 1.0)
    return (
        f"CORE: {sum(each.examples for each in expected):,} examples in {len(expected)} tasks, "
        f"about {tokens / 1e6:,.1f} million tokens to run ({saved:.1f} times as many in the "
        f"prompts): about {duration_text(sum(each.seconds for each in expected))}"
    )
