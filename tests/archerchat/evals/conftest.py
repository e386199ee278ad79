"""A small evaluation bundle of every task type, and models small enough to score it at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.core.prompts import Prompt
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer, train_tokenizer

WORDS = ("apple", "river", "stone", "green", "winter", "house", "music", "paper", "seven", "night")


def sentence(random: Random, least: int, most: int) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(least, most)))


def make_rows(count: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return rows of each type, some with options of one token and of very different lengths."""
    random = Random(seed)
    choice, schema, text = [], [], []
    for i in range(count):
        letters = i % 3 == 0
        options = ["A", "B", "C"] if letters else [sentence(random, 1, 9) + f" {n}" for n in "xyz"]
        query = f"Question: {sentence(random, 3, 30)}\nAnswer:"
        choice.append({"query": query, "choices": options, "gold": random.randrange(3)})
        start, end = sentence(random, 1, 12), sentence(random, 1, 8)
        contexts = [f"{start} {word}" for word in random.sample(WORDS, 2)]
        schema.append({"context_options": contexts, "continuation": end, "gold": i % 2})
        text.append({"context": f"{sentence(random, 1, 40)} ", "continuation": WORDS[i % 10]})
    return {"multiple_choice": choice, "schema": schema, "language_modeling": text}


def write_bundle(
    directory: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    shots: Mapping[str, int] | None = None,
) -> Path:
    """Write a bundle with a task of each type that `rows` has, named by its type."""
    listing, baselines = ["icl_tasks:"], ["Eval Task,Random baseline"]
    (directory / "eval_data").mkdir(parents=True)
    for kind, lines in rows.items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "eval_data" / f"{kind}.jsonl").write_text(content)
        listing += [
            f"- label: {kind}",
            f"  dataset_uri: {kind}.jsonl",
            f"  num_fewshot: [{(shots or {}).get(kind, 0)}]",
            f"  icl_task_type: {kind}",
        ]
        baselines.append(f"{kind},{ {'multiple_choice': 100 / 3, 'schema': 50}.get(kind, 0) }")
    (directory / "core.yaml").write_text("\n".join(listing) + "\n")
    (directory / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n")
    return directory


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    random = Random(1)
    return train_tokenizer([sentence(random, 5, 50) + ".\n\n" for _ in range(200)], 300)


@pytest.fixture(scope="session")
def merging_tokenizer() -> Tokenizer:
    """One that joins whatever whitespace and punctuation stands together."""
    merged = (b"\n\n", b"\n\n\n", b" \n", b"  ", b".\n", b".\n\n", b" a", b"ab", b"\r\n", b"\t\n")
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer(ranks | {token: 256 + i for i, token in enumerate(merged)})


@pytest.fixture(scope="session")
def build_small_model() -> Callable[..., Transformer]:
    """Return a model whose every part does something: all weights are noise."""

    def build(
        sequence_length: int = 24, pattern: str = "L", layers: int = 3, kv_heads: int = 2
    ) -> Transformer:
        config = ModelConfig(sequence_length, 300, layers, 4, kv_heads, 32, pattern)
        model = Transformer(config, torch.float32, "sdpa")
        model.init_weights(0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def score_plainly() -> Callable[[Transformer, Sequence[Prompt]], tuple[list[float], bool]]:
    """The oracle of CORE's fast path: one example at a time, whole prompts, every logit."""

    @torch.no_grad()
    def score(model: Transformer, prompts: Sequence[Prompt]) -> tuple[list[float], bool]:
        """Return each option's mean loss, NaN for one with nothing to score, and whether every
        token of the first's span is predicted."""
        width = max(len(prompt.token_ids) for prompt in prompts)
        rows = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt.token_ids)] = torch.from_numpy(prompt.token_ids)
        logits = model(rows)[:, :-1]  # (O, T - 1, V)
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        predicted: Tensor = logits.argmax(dim=-1) == rows[:, 1:]
        spans = [slice(p.start - 1, len(p.token_ids) - 1) for p in prompts]
        parts = [losses[i, span] for i, span in enumerate(spans)]
        means = [part.mean().item() if part.numel() else math.nan for part in parts]
        return means, bool(predicted[0, spans[0]].all())

    return score


@pytest.fixture
def small_bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", make_rows(12), {"language_modeling": 2, "schema": 1})
