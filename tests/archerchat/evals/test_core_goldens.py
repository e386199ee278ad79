"""CORE on the reference's model and files: tokens, spans, losses and every outcome."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from archerchat.evals.core.bundle import CoreTask, load_bundle, read_examples
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.evals.core.prompts import SHUFFLE_SEED, Prompter, fewshot_indices
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer, load_ranks

TIE = 1e-5
LABELS = (
    "copa",
    "winograd",
    "winograd_3shot",
    "lambada_openai",
    "arc_easy",
    "bigbench_qa_wikidata",
    "lm_next_word",
    "lm_next_word_4shot",
    "bigbench_cs_algorithms",
)


@pytest.fixture(scope="module")
def goldens(oracle_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((oracle_dir / "core_goldens.json").read_text())
    return content | {"tasks": {task["label"]: task for task in content["tasks"]}}


@pytest.fixture(scope="module")
def tokenizer(oracle_dir: Path) -> Tokenizer:
    return Tokenizer(load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken"))


@pytest.fixture(scope="module")
def model(oracle_dir: Path) -> Transformer:
    model = Transformer(ModelConfig(256, 4096, 4, 2, 2, 128), torch.float32, "matmul")
    stored = load_file(oracle_dir / "train_final.safetensors")
    model.load_state_dict(to_archerchat_names({k: v.float() for k, v in stored.items()}))
    return model.eval().requires_grad_(False)


def task_of(golden: dict[str, Any], oracle_dir: Path) -> CoreTask:
    meta = golden["meta"]
    return CoreTask(
        golden["label"],
        oracle_dir / golden["file"],
        meta["task_type"],
        meta["num_fewshot"],
        meta["continuation_delimiter"],
        0.0,
    )


@pytest.mark.parametrize("label", LABELS)
def test_tokens_and_spans(
    goldens: dict[str, Any], oracle_dir: Path, tokenizer: Tokenizer, label: str
) -> None:
    golden = goldens["tasks"][label]
    task = task_of(golden, oracle_dir)
    prompter = Prompter(task, read_examples(task)[: golden["n"]], tokenizer)
    digest, tokens, longest = hashlib.sha256(), 0, 0
    for index, expected in enumerate(golden["per_example"]):
        prompts = prompter.prompts(index)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        assert [prompt.start for prompt in prompts] == expected["start"]
        assert lengths == expected["end"]
        tokens, longest = tokens + sum(lengths), max(longest, *lengths)
        for prompt in prompts:
            digest.update(prompt.token_ids.astype("<u4").tobytes())
            digest.update(np.uint32(len(prompt.token_ids)).tobytes())
    first = [prompt.token_ids.tolist() for prompt in prompter.prompts(0)]
    assert first == golden["first_example_prompt_token_ids"]
    assert (tokens, longest) == (golden["total_prompt_tokens"], golden["max_prompt_tokens"])
    assert digest.hexdigest() == golden["prompt_tokens_sha256"]


@pytest.mark.parametrize(
    "label", [pytest.param(n, marks=pytest.mark.slow) if n == "arc_easy" else n for n in LABELS]
)
def test_losses_and_outcomes(
    goldens: dict[str, Any],
    oracle_dir: Path,
    tokenizer: Tokenizer,
    model: Transformer,
    label: str,
) -> None:
    golden = goldens["tasks"][label]
    task = task_of(golden, oracle_dir)
    examples = read_examples(task)[: golden["n"]]
    prompter = Prompter(task, examples, tokenizer)
    trees = [prompter.tree(index) for index in range(len(examples))]
    found = [o for batch in iter_outcomes(model, trees, task.task_type) for o in batch]
    assert len(found) == golden["n"]
    for outcome in found:
        expected = golden["per_example"][outcome.index]
        correct = outcome.is_correct(examples[outcome.index].gold)
        assert correct == bool(expected["correct"]) or outcome.margin < TIE
        if task.task_type == "language_modeling":
            span = expected["end"][0] - expected["start"][0]
            assert outcome.losses[0] * span == pytest.approx(expected["nll"], rel=1e-4)
            hit = expected["predicted"] == expected["actual"]
            assert outcome.all_predicted == hit or outcome.margin < TIE
        else:
            assert outcome.losses == pytest.approx(expected["mean_losses"], rel=1e-4)
            assert outcome.predicted == expected["pred"] or outcome.margin < TIE


def test_draws(goldens: dict[str, Any]) -> None:
    shuffled = list(range(20))
    Random(SHUFFLE_SEED).shuffle(shuffled)
    assert shuffled == goldens["shuffle_1337_of_range20"]
    expected = goldens["fewshot_indices_n200_k10_for_idx_0_1_199"]
    assert [fewshot_indices(index, 200, 10) for index in (0, 1, 199)] == expected


def test_all_real_tasks_can_be_prepared(shared_data_dir: Path, tokenizer: Tokenizer) -> None:
    evaluation = CoreEvaluation(load_bundle(shared_data_dir / "core"), tokenizer, CoreOptions(3))
    assert len(evaluation.bundle.tasks) == 21
    for task in evaluation.bundle.tasks:
        gold, trees, _ = evaluation.prepare(task)
        assert len(gold) == len(trees) == 3
        assert not any(tree.has_unscored for tree in trees)
