"""Say how long an evaluation will take before it starts.

A few examples of each task are made ready and timed, and some of them run. The figure is for this
rank; the tasks that are done already do not count.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from archerchat.evals.core.bundle import Task, read_examples
from archerchat.evals.core.evaluate import CoreEvaluation
from archerchat.evals.core.forward import Scorer
from archerchat.evals.core.layout import build_layout, tokens_to_run
from archerchat.evals.core.prompts import Prompter, choose_examples
from archerchat.evals.core.scoring import batch_tokens, iter_batches
from archerchat.evals.core.trees import Tree, build_tree
from archerchat.model.transformer import Transformer

PROBES = 4
"""Examples of a task that are looked at."""
PROBE_SECONDS = 1.0
"""How long to run some of them at least, where there are enough."""


@dataclass(frozen=True)
class Estimate:
    """How much there is to do."""

    examples: int
    """Over all ranks."""
    prompt_tokens: float
    """In all prompts of this rank's examples."""
    tokens: float
    """Of them, those that have to be run."""
    by_task: Mapping[str, float]
    """Seconds by label, for this rank."""

    @property
    def seconds(self) -> float:
        return sum(self.by_task.values())


@dataclass(frozen=True)
class Probe:
    """What a few of a task's examples tell of all of them."""

    examples: int
    own: int
    """This rank's."""
    trees: list[Tree]
    prompt_tokens: float
    """Of one example, like the next two."""
    tokens: float
    preparing: float
    """Seconds."""


def estimate(
    evaluation: CoreEvaluation, model: Transformer, done: Collection[str] = ()
) -> Estimate:
    """Look at a few examples of each task.

    Raises:
        DataError: a task's file is missing or broken.
    """
    scorer = Scorer(model)
    probes = {
        task.label: _probe(evaluation, task, scorer)
        for task in evaluation.bundle.tasks
        if task.label not in done
    }
    rate = _rate(scorer, [t for probe in probes.values() for t in probe.trees if len(t.target)])
    return Estimate(
        examples=sum(probe.examples for probe in probes.values()),
        prompt_tokens=sum(probe.prompt_tokens * probe.own for probe in probes.values()),
        tokens=sum(probe.tokens * probe.own for probe in probes.values()),
        by_task={
            label: probe.own * (probe.preparing + probe.tokens / rate)
            for label, probe in probes.items()
        },
    )


def _probe(evaluation: CoreEvaluation, task: Task, scorer: Scorer) -> Probe:
    options, ranks = evaluation.options, evaluation.ranks
    examples = choose_examples(read_examples(task), task, options.max_per_task)
    own = ranks.share(len(examples))
    chosen = own[:: max(1, len(own) // PROBES)][:PROBES] or range(1)
    prompter = Prompter(task, examples, evaluation.tokenizer, options.max_length)
    prompter.prompts(chosen[0])  # its few-shot examples are new, those of later ones mostly not
    started = time.perf_counter()
    prompts = [prompter.prompts(index) for index in chosen]
    trees = [build_tree(index, each) for index, each in zip(chosen, prompts, strict=True)]
    spent = time.perf_counter() - started
    return Probe(
        examples=len(examples),
        own=len(own),
        trees=trees,
        prompt_tokens=sum(len(p.token_ids) for each in prompts for p in each) / len(chosen),
        tokens=sum(tokens_to_run(tree, scorer.windows) for tree in trees) / len(chosen),
        preparing=spent / len(chosen),
    )


def _rate(scorer: Scorer, trees: list[Tree]) -> float:
    """Return tokens a second; the first batch only warms up where there are others."""
    tokens, seconds = 0, 0.0
    for number, batch in enumerate(iter_batches(trees, scorer.windows, batch_tokens(scorer))):
        started = time.perf_counter()
        layout = build_layout(batch, scorer.windows, scorer.block)
        scorer.score(layout, margins=False).losses.cpu()
        spent = time.perf_counter() - started
        if number == 1:
            tokens, seconds = 0, 0.0
        tokens, seconds = tokens + len(layout.token_ids), seconds + spent
        if number and seconds > PROBE_SECONDS:
            break
    return tokens / max(seconds, 1e-9) if tokens else 1.0
