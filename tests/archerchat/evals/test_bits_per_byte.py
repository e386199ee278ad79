"""Bits per byte by hand, the reference's figures, and any text file in batches."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from archerchat.data.shards import list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.errors import DataError
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte, iter_text, iter_text_batches
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.model.config import ModelConfig
from archerchat.model.loss import token_losses
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer, load_ranks

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

SIZES = torch.tensor([1, 2, 5, 0], dtype=torch.int32)
"""Of four tokens; the last is special."""


def losses_by_token(inputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor([0.5, 1.0, 4.0, 100.0])[targets.clamp(min=0)]


def test_special_and_ignored_targets_count_in_neither_sum() -> None:
    targets = torch.tensor([[0, 1, -1], [2, 3, 0]])
    batches = [(targets, targets), (targets[:1], targets[:1])]
    bits = evaluate_bits_per_byte(losses_by_token, batches, SIZES)
    nats, size = (0.5 + 1.0 + 4.0 + 0.5) + (0.5 + 1.0), (1 + 2 + 5 + 1) + (1 + 2)
    assert bits == pytest.approx(nats / math.log(2) / size)


@pytest.mark.parametrize("targets", [[[3, 3]], [[-1, -1]], None])
def test_data_without_text_is_an_error(targets: Any) -> None:
    batches = [] if targets is None else [(torch.tensor(targets),) * 2]
    with pytest.raises(DataError, match="no text to evaluate on"):
        evaluate_bits_per_byte(losses_by_token, batches, SIZES)


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(4, requires_grad=True)

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        out = weight[targets]
        assert not out.requires_grad
        return out

    targets = torch.tensor([[0, 1]])
    assert evaluate_bits_per_byte(losses, [(targets, targets)], SIZES) > 0


@pytest.fixture(scope="module")
def measure(oracle_dir: Path) -> Callable[..., float]:
    """Measure a model on batches of the golden corpus, as `bpb_goldens.json` names them."""
    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    tokenizer = Tokenizer(ranks)
    train, val = split_shards(list_shards(oracle_dir / "corpus"))

    def bits(model: Transformer, golden: str) -> float:
        split, rows, length, steps, *masked = golden.split("_", 4)
        loader = TextLoader(
            val if split == "val" else train,
            tokenizer,
            batch_size=int(rows.removeprefix("B")),
            sequence_length=int(length.removeprefix("T")),
        )

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(int(steps.removeprefix("steps"))):
                batch = next(loader)
                targets = torch.from_numpy(batch.targets)
                if masked:
                    assert masked == ["targets_every7th_position_masked"]
                    targets[:, 0::7] = -1
                yield torch.from_numpy(batch.inputs), targets

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            hidden = model.hidden(inputs)
            return token_losses(hidden, model.unembedding.weight, targets, model.config.vocab_size)

        sizes = torch.from_numpy(tokenizer.token_bytes)
        with loader:
            return evaluate_bits_per_byte(losses, batches(), sizes)

    return bits


@pytest.mark.parametrize(
    ("name", "weights", "golden"),
    [
        ("train_init", "train_init", "val_B4_T256_steps10"),
        ("train_final_rounded", "train_final", "val_B4_T256_steps10"),
        (
            "train_final_rounded",
            "train_final",
            "val_B4_T256_steps10_targets_every7th_position_masked",
        ),
        slow("train_final_rounded", "train_final", "train_B4_T256_steps10"),
        slow("train_final_rounded", "train_final", "val_B8_T256_steps16"),
    ],
)
def test_the_trained_models_figures(
    oracle_dir: Path, measure: Callable[..., float], name: str, weights: str, golden: str
) -> None:
    stored = load_file(oracle_dir / f"{weights}.safetensors")
    model = Transformer(ModelConfig(256, 4096, 4, 2, 2, 128), backend="matmul")
    model.load_state_dict(to_archerchat_names({n: t.float() for n, t in stored.items()}))
    expected = json.loads((oracle_dir / "bpb_goldens.json").read_text())[name][golden]
    assert measure(model, golden) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("golden", ["val_B4_T256_steps10", slow("train_B4_T256_steps10")])
def test_the_random_models_figures(
    oracle_dir: Path,
    measure: Callable[..., float],
    load_model_golden: Callable[[str], Any],
    golden: str,
) -> None:
    expected = json.loads((oracle_dir / "bpb_goldens.json").read_text())["model_a"][golden]
    model = load_model_golden("model_a").build()
    assert measure(model, golden) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab1 .\n\t\ré"), max_size=60), st.integers(1, 9))
def test_parts_have_the_tokens_of_the_whole(
    merging_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str, part: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode())
    parts = list(iter_text(path, part))
    assert "".join(parts) == text
    ids = [i for each in parts for i in merging_tokenizer.encode(each)]
    assert ids == merging_tokenizer.encode(text)


def test_every_token_is_a_target_once(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "apple river.\nstone green winter\n\nhouse music " * 9
    path = tmp_path / "text"
    path.write_text(text)
    batches = list(iter_text_batches(path, small_tokenizer, 2, 8, torch.device("cpu")))
    targets = torch.cat([targets.flatten() for _, targets in batches])
    ids = small_tokenizer.encode(text)
    assert targets[targets >= 0].tolist() == ids
    assert {targets.shape for _, targets in batches[:-1]} == {(2, 8)}
    for inputs, targets in batches:
        assert (inputs[:, 0] == small_tokenizer.bos_id).all()
        kept = targets[:, :-1] >= 0
        assert torch.equal(inputs[:, 1:][kept], targets[:, :-1][kept])


def test_what_cannot_be_read_is_named(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="text:1: not UTF-8 text"):
        list(iter_text(path))
    with pytest.raises(DataError, match="cannot read"):
        list(iter_text(tmp_path / "none"))
