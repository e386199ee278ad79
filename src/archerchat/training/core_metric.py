"""CORE while a model trains: on part of each task, with the interval that this leaves.

The prompts are made at the first evaluation and kept for the others. The weights are cast anew each
time: they have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from archerchat.console import ProgressLine
from archerchat.evals.core.bundle import Bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.inference.loading import InferenceModel
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer


class CoreMetric:
    """Evaluate CORE on up to `max_per_task` examples of each task."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, max_per_task: int) -> None:
        options = CoreOptions(max_per_task=max_per_task)
        self._evaluation = CoreEvaluation(bundle, tokenizer, options, keep_prompts=True)

    def bind(
        self, model: Transformer, progress: ProgressLine
    ) -> Callable[[int], Mapping[str, float]]:
        """Return what the loop calls, for a model in training."""

        def measure(step: int) -> Mapping[str, float]:
            result = self._evaluation.run(
                InferenceModel(model).model,
                on_progress=lambda label, share: progress.busy(f"CORE: {label} {share:.0%}"),
            )
            figures = {
                "core/score": result.core,
                "core/low": result.core - result.half_width,
                "core/high": result.core + result.half_width,
            }
            return figures | {f"core/task/{task.label}": task.centred for task in result.tasks}

        return measure
