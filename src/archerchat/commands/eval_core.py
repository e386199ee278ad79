"""CORE of a base model on the command line: where the bundle is, what is done, what is shown.

Results go to `evals/<stage>/<tag>/core_<step>.{json,csv}` under the home; an evaluation that was
interrupted goes on from the `.partial.json` beside them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from archerchat.checkpoint import META
from archerchat.console import duration_text
from archerchat.distributed import joined_ranks
from archerchat.evals.core.bundle import Bundle, load_bundle
from archerchat.evals.core.download import find_bundle
from archerchat.evals.core.estimate import Estimate, estimate
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.evals.core.results import (
    CoreResult,
    PartialResults,
    TaskResult,
    describe,
    is_offline,
    write_results,
)
from archerchat.files import sha256_file
from archerchat.home import Home
from archerchat.inference.loading import InferenceModel, LoadedModel
from archerchat.runtime import Runtime, dtype_name


@dataclass(frozen=True)
class Summary:
    """One evaluation's result and where it was written."""

    result: CoreResult
    paths: tuple[Path, Path] | None
    """None on ranks that write nothing."""


def evaluate_core(
    loaded: LoadedModel,
    runtime: Runtime,
    home: Home,
    console: Console,
    bundle: str | None,
    options: CoreOptions,
) -> Summary:
    """Evaluate CORE, go on where an earlier call was interrupted, and write the results.

    Raises:
        UsageError: an option makes no sense, or there is no such bundle.
        DataError: the bundle cannot be had or is broken.
    """
    with joined_ranks(runtime) as ranks:
        folder = ranks.first_alone(
            lambda: find_bundle(bundle, home.cache_dir, notify=console.print)
        )
        tasks = load_bundle(folder)
        evaluation = CoreEvaluation(tasks, loaded.tokenizer, options, ranks)
        about = describe_evaluation(loaded, runtime, tasks, options)
        stem = results_stem(home, loaded, tasks, options)
        partial = stem.with_name(stem.name + ".partial.json") if runtime.is_master else None
        kept = PartialResults(partial, about)
        result = _run(evaluation, loaded, kept, console)
    if not runtime.is_master:
        return Summary(result, None)
    paths = write_results(stem, result, about)
    kept.remove()
    for note in describe(result):
        console.print(f"note: {note}")
    low, high = result.core - result.half_width, result.core + result.half_width
    name = "offline tasks (not CORE):" if is_offline(result.tasks) else "CORE"
    console.print(
        f"{name} {result.core:.4f} (95 % interval {low:.4f} to {high:.4f}) in "
        f"{duration_text(result.seconds)}; {paths[0]}"
    )
    return Summary(result, paths)


def describe_evaluation(
    loaded: LoadedModel, runtime: Runtime, bundle: Bundle, options: CoreOptions
) -> dict[str, Any]:
    """Return what the figures belong to and depend on."""
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "checkpoint_sha256": sha256_file(loaded.path / META),
        "tokenizer": loaded.tokenizer.fingerprint,
        "bundle": str(bundle.directory),
        "bundle_sha256": bundle.fingerprint(),
        "dtype": dtype_name(runtime.compute_dtype),
        "device": runtime.device_name,
        "options": {k: v for k, v in asdict(options).items() if k != "batch_tokens"},
    }


def results_stem(home: Home, loaded: LoadedModel, bundle: Bundle, options: CoreOptions) -> Path:
    """Return the results' path without its ending.

    What is not CORE, or capped, says so, and takes the place of no figure that is.
    """
    tag, stage = loaded.path.parent.name, loaded.path.parent.parent.name
    cap = "" if options.max_per_task is None else f"_max{options.max_per_task}"
    name = "offline" if is_offline(bundle.tasks) else "core"
    return home.eval_dir(stage, tag) / f"{name}_{loaded.step:06d}{cap}"


def _run(
    evaluation: CoreEvaluation, loaded: LoadedModel, kept: PartialResults, console: Console
) -> CoreResult:
    """Evaluate with a bar, and a line a task."""
    if evaluation.ranks.rank:
        return evaluation.run(InferenceModel(loaded.model).model, kept)
    model = InferenceModel(loaded.model).model
    if kept.tasks:
        console.print(f"going on after {', '.join(kept.tasks)}")
    expected = estimate(evaluation, model, kept.tasks)
    console.print(_describe_estimate(expected))
    table = _table()
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
        whole = bar.add_task("CORE", total=max(expected.seconds, 1e-9))
        before = 0.0
        current = ""

        def on_progress(label: str, share: float) -> None:
            nonlocal before, current
            if label != current:
                before += expected.by_task.get(current, 0.0)
                current = label
            spent = before + share * expected.by_task.get(label, 0.0)
            bar.update(whole, completed=spent, description=label)

        def on_task(result: TaskResult) -> None:
            _add_row(table, result)
            if not console.is_terminal:
                console.print(
                    f"{result.label}: accuracy {result.accuracy:.4f}, centred "
                    f"{result.centred:.4f}, {result.examples_per_second:,.1f} examples/s"
                )

        result = evaluation.run(model, kept, on_task, on_progress)
    console.print(table)
    return result


def _describe_estimate(expected: Estimate) -> str:
    saved = expected.prompt_tokens / max(expected.tokens, 1.0)
    return (
        f"CORE: {expected.examples:,} examples in {len(expected.by_task)} tasks, about "
        f"{expected.tokens / 1e6:,.1f} million tokens to run ({saved:.1f} times as many in the "
        f"prompts): about {duration_text(expected.seconds)}"
    )


def _table() -> Table:
    table = Table(title="CORE", title_justify="left", box=SIMPLE)  # fits in 80 columns
    table.add_column("task", no_wrap=True)
    for column in ("examples", "accuracy", "centred", "a second"):
        table.add_column(column, justify="right")
    return table


def _add_row(table: Table, task: TaskResult) -> None:
    table.add_row(
        task.label,
        f"{task.examples:,}",
        f"{task.accuracy:.4f}",
        f"{task.centred:.4f}",
        f"{task.examples_per_second:,.1f}",
    )
