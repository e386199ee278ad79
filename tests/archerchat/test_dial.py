"""The dial against the reference's table, and what it says to impossible requests."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from archerchat.dial import (
    DialConfig,
    Hyperparameters,
    build_hyperparameters,
    grad_accum_steps,
)
from archerchat.errors import UsageError

RATE_OF_GROUP = {
    "lm_head": "unembedding",
    "wte": "embedding",
    "value_embeds": "value_embedding",
    "resid_lambdas": "residual_lambdas",
    "x0_lambdas": "input_lambdas",
    "smear_gate+smear_lambda+backout_lambda": "smear",
    "muon": "matrix",
}


@pytest.fixture(scope="module")
def table(oracle_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((oracle_dir / "scaling_table.json").read_text())
    return content


def _exact(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=0)


def _assert_row(hp: Hyperparameters, row: dict[str, Any]) -> None:
    model, counts = hp.model, row["num_scaling_params"]
    assert (model.num_layers, model.model_dim) == (row["depth"], row["model_dim"])
    assert (model.num_heads, model.num_kv_heads) == (row["n_head"], row["n_kv_head"])
    assert list(model.windows) == [left for left, _ in row["window_sizes"]]
    assert hp.parameters.embedding == counts["wte"]
    assert hp.parameters.value_embeddings == counts["value_embeds"]
    assert hp.parameters.unembedding == counts["lm_head"]
    assert hp.parameters.block_matrices == counts["transformer_matrices"]
    assert hp.parameters.scalars == counts["scalars"]
    assert hp.parameters.total == counts["total"]
    assert hp.parameters.scaling == row["scaling_params"]
    assert hp.flops_per_token == row["flops_per_token"]
    assert hp.target_tokens == row["target_tokens"]
    assert hp.reference_tokens == row["d_ref_tokens"]
    assert hp.total_batch_tokens == row["total_batch_size"]
    assert hp.num_iterations == row["num_iterations"]
    assert hp.total_tokens == row["total_tokens"]
    if row["predicted_batch_size"] is None:
        assert hp.predicted_batch_tokens is None
    else:
        assert hp.predicted_batch_tokens == _exact(row["predicted_batch_size"])
    assert hp.batch_lr_scale == _exact(row["batch_lr_scale"])
    assert hp.width_lr_scale == _exact(row["dmodel_lr_scale"])
    assert hp.weight_decay == _exact(row["weight_decay_scaled"])
    for group in row["optimizer_groups"]:
        rate = getattr(hp.learning_rates, RATE_OF_GROUP[group["name"]])
        assert rate == _exact(group["lr"]), group["name"]
        if group["kind"] == "muon":
            assert hp.weight_decay == _exact(group["weight_decay"])


def test_every_depth_equals_the_reference(table: dict[str, Any]) -> None:
    assert len(table["rows"]) == 12
    for row in table["rows"]:
        hp = build_hyperparameters(DialConfig(depth=row["depth"]), table["vocab_size"])
        _assert_row(hp, row)
        steps = grad_accum_steps(hp.total_batch_tokens, 32, 2048, 1)
        assert steps == row["grad_accum_steps_1_rank"]


def test_every_override_equals_the_reference(table: dict[str, Any]) -> None:
    assert len(table["variants_depth12"]) == 7
    for row in table["variants_depth12"]:
        fields: dict[str, Any] = {}
        vocab_size = table["vocab_size"]
        for argument in row.get("argv", []):
            name, _, text = argument.lstrip("-").partition("=")
            name = name.replace("-", "_")
            value = text if name == "window_pattern" else float(text)
            if name == "vocab_size":
                vocab_size = int(text)
            else:
                integer = name in ("head_dim", "aspect_ratio", "max_seq_len")
                fields[name] = int(text) if integer else value
        hp = build_hyperparameters(DialConfig(depth=12, **fields), vocab_size)
        _assert_row(hp, row)
        steps = grad_accum_steps(hp.total_batch_tokens, 32, hp.model.sequence_length, 1)
        assert steps == row["grad_accum_steps_1_rank"]


def test_short_run_equals_the_reference(table: dict[str, Any]) -> None:
    config = DialConfig(
        depth=4, head_dim=64, max_seq_len=256, total_batch_size=8192, num_iterations=200
    )
    row = table["schedules"]["short_200_iterations"]["row"]
    _assert_row(build_hyperparameters(config, 4096), row)
    assert grad_accum_steps(8192, 8, 256, 1) == row["grad_accum_steps_1_rank"]


def test_training_curves_used_these_rates(oracle_dir: Path) -> None:
    runs = json.loads((oracle_dir / "train_curve.json").read_text())["runs"]
    known = {field.name for field in dataclasses.fields(DialConfig)}
    for name, run in runs.items():
        args = {key: value for key, value in run["args"].items() if key in known and value != -1}
        hp = build_hyperparameters(DialConfig(**args), run["model_config"]["vocab_size"])
        assert hp.parameters.total == run["param_counts"]["total"], name
        assert hp.flops_per_token == run["flops_per_token"]
        assert hp.batch_lr_scale == _exact(run["batch_lr_scale"])
        assert hp.weight_decay == _exact(run["weight_decay_scaled"])
        rates = dataclasses.astuple(hp.learning_rates)
        expected = [group["initial_lr"] for group in run["optimizer_groups"]]
        assert rates == _exact(tuple(expected[:7]))


def test_horizon_precedence() -> None:
    by_flops = DialConfig(depth=12, target_flops=1e18)
    assert build_hyperparameters(by_flops, 32768).num_iterations == 2511
    both = dataclasses.replace(by_flops, num_iterations=7)
    hp = build_hyperparameters(both, 32768)
    assert hp.num_iterations == 7
    assert hp.total_flops == 7 * 2**19 * hp.flops_per_token


def test_grouped_query_attention_shrinks_the_model_not_the_reference() -> None:
    full = build_hyperparameters(DialConfig(depth=12), 32768)
    grouped = build_hyperparameters(DialConfig(depth=12, num_kv_heads=2), 32768)
    assert grouped.parameters.scaling < full.parameters.scaling
    assert grouped.reference_tokens == full.reference_tokens
    assert grouped.weight_decay > full.weight_decay


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "--depth is 0"),
        ({"depth": -3}, "--depth is -3"),
        ({"head_dim": 0}, "--head-dim is 0"),
        ({"head_dim": 33}, "head dimension 33"),
        ({"aspect_ratio": 0}, "--aspect-ratio is 0"),
        ({"max_seq_len": 0}, "--max-seq-len is 0"),
        ({"window_pattern": "SXL"}, "'SXL'"),
        ({"window_pattern": ""}, "only the letters S and L"),
        ({"num_kv_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
        ({"num_iterations": 0}, "--num-iterations is 0"),
        ({"num_iterations": -1}, "--num-iterations is -1"),
        ({"target_flops": -1.0}, "--target-flops is -1"),
        ({"target_flops": 1.0}, "--target-flops 1 is less than one step"),
        ({"target_param_data_ratio": math.nan}, "--target-param-data-ratio is nan"),
        ({"target_param_data_ratio": 1e-12}, "--target-param-data-ratio 1e-12"),
        ({"target_param_data_ratio": 1e308}, "--target-param-data-ratio 1e+308"),
        ({"total_batch_size": 0}, "--total-batch-size is 0"),
        ({"total_batch_size": 2**40}, "is less than one step of 1099511627776 tokens"),
        ({"matrix_lr": -0.1}, "--matrix-lr is -0.1"),
        ({"embedding_lr": math.inf}, "--embedding-lr is inf"),
        ({"weight_decay": math.nan}, "--weight-decay is nan"),
        ({"warmup_steps": -1}, "--warmup-steps is -1"),
        ({"warmdown_ratio": 1.5}, "--warmdown-ratio is 1.5"),
        ({"final_lr_frac": -0.1}, "--final-lr-frac is -0.1"),
    ],
)
def test_impossible_requests_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build_hyperparameters(DialConfig(**{"depth": 12, **fields}), 32768)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_impossible_vocabulary_is_named() -> None:
    with pytest.raises(UsageError, match="vocab_size is 0"):
        build_hyperparameters(DialConfig(depth=12), 0)


def test_tiny_horizons_still_make_a_whole_batch() -> None:
    config = DialConfig(depth=1, head_dim=32, target_param_data_ratio=1e-4, num_iterations=3)
    assert build_hyperparameters(config, 64).total_batch_tokens >= 1


@pytest.mark.parametrize(
    ("batch", "rows", "length", "ranks", "steps"),
    [(8192, 8, 256, 1, 4), (524288, 32, 2048, 8, 1), (524288, 16, 2048, 2, 8), (256, 1, 256, 1, 1)],
)
def test_batches_that_divide(batch: int, rows: int, length: int, ranks: int, steps: int) -> None:
    assert grad_accum_steps(batch, rows, length, ranks) == steps


def test_a_batch_that_does_not_divide_names_what_would() -> None:
    with pytest.raises(UsageError) as error:
        grad_accum_steps(500_000, 32, 2048, 1)
    message = str(error.value)
    assert "500000 tokens" in message
    assert "32 rows x 2048 tokens x 1 rank(s) = 65536" in message
    assert "--total-batch-size 524288" in message
    assert "--device-batch-size" not in message  # 500,000 is not a whole number of rows
    assert grad_accum_steps(524288, 32, 2048, 1) == 8


def test_a_batch_smaller_than_a_micro_batch_names_a_fitting_one() -> None:
    with pytest.raises(UsageError) as error:
        grad_accum_steps(12 * 256, 32, 256, 2)
    assert "--total-batch-size 16384" in str(error.value)
    assert "--device-batch-size 6" in str(error.value)
    assert grad_accum_steps(12 * 256, 6, 256, 2) == 1
    assert grad_accum_steps(16384, 32, 256, 2) == 1
