"""One path of the CORE benchmark on one model: its times, its outcomes, and the FLOPs it needs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from archerchat.evals.core.bundle import Bundle, CoreTask, load_bundle, read_examples
from archerchat.evals.core.layout import needed_trunk
from archerchat.evals.core.prompts import Prompt, Prompter, Tree, choose_examples
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.inference.loading import build_inference_model
from archerchat.model.config import ModelConfig
from archerchat.model.flops import count_parameters
from archerchat.model.transformer import Transformer
from archerchat.planning.peak_flops import measure_peak
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tokenizer.bpe import Tokenizer
from models import GOLDEN_CONFIG, draw_model, load_golden_model, load_golden_tokenizer

PATHS = ("plain", "float32", "default")
"""The plain path, ours in float32, ours as it is by default."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Transformer
    tokenizer: Tokenizer
    fast: Transformer
    """The same for our paths, in the form for inference."""


def run_path(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the sample along one of `PATHS` and return its times and outcomes."""
    runtime = build_runtime("cpu", None if options.path == "default" else "float32")
    prepare_process(runtime)
    rate = measure_peak(runtime).flops_per_second
    tokenizer = load_golden_tokenizer(options.oracle)
    model = build_model(options, runtime)
    subject = Subject(model, tokenizer, build_inference_model(model))
    evaluate = evaluate_plainly if options.path == "plain" else evaluate_task
    tasks = chosen_tasks(load_bundle(options.bundle), options.tasks)
    for task in tasks[:2]:  # not measured: kernels are chosen and memory is claimed at first use
        evaluate(subject, task, 2)
    return {
        "tasks": {task.label: evaluate(subject, task, options.per_task) for task in tasks},
        "dtype": dtype_name(runtime.compute_dtype),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "sequence_length": subject.model.config.sequence_length,
        "matrix_flops_per_second": rate,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }


def chosen_tasks(bundle: Bundle, labels: str | None) -> list[CoreTask]:
    asked = labels.split(",") if labels else [task.label for task in bundle.tasks]
    return [task for task in bundle.tasks if task.label in asked]


def build_model(options: argparse.Namespace, runtime: Runtime) -> Transformer:
    if options.model == "golden":
        return load_golden_model(options.oracle, runtime)
    config = ModelConfig(options.sequence_length, GOLDEN_CONFIG.vocab_size, 6, 6, 6, 384)
    return draw_model(config, runtime, seed=1, noise_seed=0)


@torch.no_grad()
def score_plainly(model: Transformer, prompts: Sequence[Prompt]) -> tuple[list[float], bool]:
    """Return each option's mean loss, and whether every token of the first's span is predicted.

    Whole prompts run as one batch through the whole model, as the tests' oracle does.
    """
    width = max(len(prompt.token_ids) for prompt in prompts)
    rows = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt.token_ids)] = torch.from_numpy(prompt.token_ids)
    logits = model(rows)[:, :-1]  # (O, T - 1, V)
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    predicted = logits.argmax(dim=-1) == rows[:, 1:]
    spans = [slice(p.start - 1, len(p.token_ids) - 1) for p in prompts]
    parts = [losses[i, span] for i, span in enumerate(spans)]
    means = [part.mean().item() if part.numel() else math.nan for part in parts]
    return means, bool(predicted[0, spans[0]].all())


def evaluate_plainly(subject: Subject, task: CoreTask, count: int) -> dict[str, Any]:
    """Run a task's sample one example at a time."""
    everything = choose_examples(read_examples(task), task, None)
    config = subject.model.config
    started = time.perf_counter()
    prompter = Prompter(task, everything, subject.tokenizer)
    outcomes: list[int] = []
    losses: list[list[float]] = []
    flops = 0
    sample = range(min(count, len(everything)))
    for index in sample:
        prompts = prompter.prompts(index)
        means, all_predicted = score_plainly(subject.model, prompts)
        is_text = task.task_type == "language_modeling"
        outcomes.append(int(all_predicted) if is_text else means.index(min(means)))
        losses.append(means)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        flops += plain_flops(config, lengths)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "examples": len(sample),
        "available": len(everything),
        "outcomes": outcomes,
        "losses": losses,
        "flops": flops,
    }


def evaluate_task(subject: Subject, task: CoreTask, count: int) -> dict[str, Any]:
    """Run a task's sample as `archerchat eval base` does."""
    everything = choose_examples(read_examples(task), task, None)
    started = time.perf_counter()
    prompter = Prompter(task, everything, subject.tokenizer)
    sample = range(min(count, len(everything)))
    trees = [prompter.tree(index) for index in sample]
    found = [o for batch in iter_outcomes(subject.fast, trees, task.task_type) for o in batch]
    found.sort(key=lambda outcome: outcome.index)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "examples": len(sample),
        "available": len(everything),
        "outcomes": [int(o.all_predicted) if o.predicted is None else o.predicted for o in found],
        "losses": [outcome.losses for outcome in found],
        "margins": [outcome.margin for outcome in found],
        "flops": sum(tree_flops(subject.model.config, tree) for tree in trees),
    }


def plain_flops(config: ModelConfig, lengths: list[int]) -> int:
    """Count the products of whole prompts, padded to one length, with every logit."""
    tokens, longest = max(lengths) * len(lengths), max(lengths)
    seen = sum(sum(min(window + 1, t + 1) for t in range(longest)) for window in config.windows)
    return 2 * count_parameters(config).scaling * tokens + 4 * config.model_dim * seen * len(
        lengths
    )


def tree_flops(config: ModelConfig, tree: Tree) -> int:
    """Count the products of what is run of a tree."""
    dim, kv = config.model_dim, config.kv_dim
    needed, trunk = needed_trunk(tree, config.windows), tree.trunk_length
    in_branches = tree.positions[trunk:]
    total = 0
    for i, window in enumerate(config.windows):
        incoming, outgoing = (n + len(in_branches) for n in needed[i : i + 2])
        total += 2 * (2 * dim * kv * incoming + 10 * dim * dim * outgoing)
        queries = [*range(trunk - needed[i + 1], trunk), *in_branches.tolist()]
        total += 4 * dim * sum(min(window, t) + 1 for t in queries)
    return total + 2 * dim * config.padded_vocab_size * len(tree.targets)
