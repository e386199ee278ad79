"""What pretraining measures on the way: bits per byte of the validation text, and CORE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from archerchat.data.prefetch import Batch
from archerchat.data.text_loader import TextLoader
from archerchat.distributed import Ranks
from archerchat.evals.core.bundle import load_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.inference.loading import InferenceModel
from archerchat.training.recipe import Recipe


def build_bits_metric(
    recipe: Recipe, open_loader: Callable[[], TextLoader], batches: int, text_bytes: int
) -> Callable[[int], Mapping[str, float]]:
    """Return what measures bits per byte.

    Args:
        open_loader: opens the validation text at its beginning.
        batches: to measure on at most.
        text_bytes: bytes of the validation text, which is read once at most.
    """
    ranks = recipe.optimizer.ranks

    def iter_own(loader: TextLoader) -> Iterator[Batch]:
        """Yield this rank's batches."""
        sizes, seen = recipe.tokenizer.token_bytes, 0
        for done in range(1, batches + 1):
            batch = next(loader)
            if done % ranks.world_size == ranks.rank:
                yield batch
            seen += int(sizes[batch.targets].sum())
            recipe.show_progress("evaluating", max(done / batches, seen / text_bytes))
            if seen >= text_bytes:
                return

    def measure(step: int) -> Mapping[str, float]:
        with open_loader() as loader:
            return {"val/bpb": recipe.bits_per_byte(iter_own(loader))}

    return measure


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
        low, high = result.interval
        figures = {"core/score": result.core, "core/low": low, "core/high": high}
        return figures | {f"core/task/{task.label}": task.centred for task in result.tasks}

    return measure
