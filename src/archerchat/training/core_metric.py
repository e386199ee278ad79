"""CORE while pretraining: an `Evaluation.measure` that keeps its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from archerchat.distributed import Ranks
from archerchat.evals.core.bundle import load_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.inference.loading import InferenceModel
from archerchat.training.recipe import Recipe


def build_core_metric(
    recipe: Recipe, bundle: Path, max_per_task: int, ranks: Ranks
) -> Callable[[int], Mapping[str, float]]:
    """Return what measures CORE on part of each task; its prompts are made once and kept."""
    evaluation = CoreEvaluation(
        load_bundle(bundle),
        recipe.tokenizer,
        CoreOptions(max_per_task=max_per_task),
        ranks,
        keep_prompts=True,
    )

    def measure(step: int) -> Mapping[str, float]:
        result = evaluation.run(
            InferenceModel(recipe.model).model,
            on_progress=lambda label, share: recipe.show_progress(f"CORE, {label}", share),
        )
        figures = {
            "core/score": result.core,
            "core/low": result.core - result.half_width,
            "core/high": result.core + result.half_width,
        }
        return figures | {f"core/task/{task.label}": task.centred for task in result.tasks}

    return measure
