"""Counts made without a model against what a model allocates and computes, and the goldens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archerchat.model.config import SMEAR_CHANNELS, ModelConfig
from archerchat.model.flops import count_parameters, flops_per_token
from archerchat.model.loss import weighted_loss
from archerchat.model.transformer import Transformer

CONFIGS = [
    ModelConfig(64, 500, 1, 1, 1, 64, "L"),
    ModelConfig(64, 512, 3, 4, 2, 64, "SL"),
    ModelConfig(256, 1000, 4, 2, 2, 256, "SSSL"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_is_counted_in_its_role(config: ModelConfig) -> None:
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())

    def allocated(prefix: str) -> int:
        return sum(p.numel() for name, p in parameters.items() if name.startswith(prefix))

    counts = count_parameters(config)
    assert counts.embedding == allocated("token_embedding.")
    assert counts.value_embeddings == allocated("value_embeddings.")
    assert counts.unembedding == allocated("unembedding.")
    assert counts.block_matrices == allocated("blocks.")
    assert counts.total == allocated("")
    assert counts.scaling == allocated("blocks.") + allocated("unembedding.")


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_flops_are_those_of_a_forward_and_a_backward_pass(config: ModelConfig) -> None:
    model = Transformer(config, backend="matmul")
    model.init_weights(0)
    length = config.sequence_length  # one block of attention, which forms every score
    token_ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(token_ids)
        vocab_size = config.padded_vocab_size
        weighted_loss(hidden, model.unembedding.weight, token_ids, vocab_size).backward()
    smear_of_first_token = 6 * SMEAR_CHANNELS  # it has none before it
    expected = length * flops_per_token(config) - smear_of_first_token
    assert counter.get_total_flops() == expected


def test_a_window_saves_flops() -> None:
    windowed, full = (ModelConfig(2048, 512, 4, 4, 4, 64, p) for p in ("SSSL", "L"))
    assert flops_per_token(full) - flops_per_token(windowed) == 3 * 12 * 64 * (2048 - 512)


def test_counts_equal_the_goldens(model_golden: Any) -> None:
    counts = count_parameters(model_golden.config)
    expected = model_golden.facts["num_scaling_params"]
    assert counts.embedding == expected["wte"]
    assert counts.value_embeddings == expected["value_embeds"]
    assert counts.unembedding == expected["lm_head"]
    assert counts.block_matrices == expected["transformer_matrices"]
    assert counts.scalars == expected["scalars"]
    assert counts.total == expected["total"]
    assert flops_per_token(model_golden.config) == model_golden.facts["flops_per_token"]


def test_decode_and_prefill_follow_from_the_counts(model_golden: Any) -> None:
    config, facts = model_golden.config, model_golden.facts
    linear = 2 * (count_parameters(config).scaling + SMEAR_CHANNELS)

    def forward_flops(seen: int) -> int:
        return linear + sum(4 * config.model_dim * min(w, seen) for w in config.windows)

    assert forward_flops(100) == facts["decode_flops_ctx100"]
    assert sum(forward_flops(t + 1) for t in range(200)) == facts["prefill_flops_200"]
