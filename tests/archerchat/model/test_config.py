"""Derived sizes of a model's shape, its windows, and shapes that no model can have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from archerchat.model.config import ModelConfig

BASE = ModelConfig(2048, 500, 6, 4, 2, 256, "SSSL")


def windows(sequence_length: int, num_layers: int, pattern: str) -> tuple[int, ...]:
    return ModelConfig(sequence_length, 500, num_layers, 4, 2, 256, pattern).windows


def test_sizes_follow() -> None:
    assert (BASE.head_dim, BASE.kv_dim) == (64, 128)
    sizes = (1, 64, 65, 500, 512, 32768)
    padded = [dataclasses.replace(BASE, vocab_size=size).padded_vocab_size for size in sizes]
    assert padded == [64, 64, 128, 512, 512, 32768]


def test_windows_tile_the_pattern_and_the_last_layer_sees_all() -> None:
    assert windows(2048, 6, "SSSL") == (512, 512, 512, 2048, 512, 2048)
    assert windows(2048, 3, "L") == (2048,) * 3
    assert windows(2048, 4, "S") == (512, 512, 512, 2048)
    assert windows(2048, 1, "S") == (2048,)
    assert windows(2048, 2, "SSSL") == (512, 2048)


@pytest.mark.parametrize(
    ("sequence_length", "short"),
    [(256, 128), (512, 128), (513, 256), (1024, 256), (2048, 512), (4096, 1024), (64, 128)],
)
def test_a_short_window_is_a_quarter_rounded_up_to_128(sequence_length: int, short: int) -> None:
    assert windows(sequence_length, 2, "SL") == (short, sequence_length)


def test_every_other_layer_up_to_the_last_has_a_value_embedding() -> None:
    def embedded(num_layers: int) -> list[int]:
        config = dataclasses.replace(BASE, num_layers=num_layers)
        return [i for i in range(num_layers) if config.has_value_embedding(i)]

    assert [embedded(n) for n in (1, 2, 3, 4)] == [[0], [1], [0, 2], [1, 3]]


def test_shapes_equal_the_goldens(model_golden: Any) -> None:
    config, facts = model_golden.config, model_golden.facts
    assert config.padded_vocab_size == facts["padded_vocab_size"]
    assert config.windows == tuple(left for left, _ in facts["window_sizes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be at least 1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"num_heads": 3, "num_kv_heads": 3}, "model_dim 256 must be an even multiple"),
        ({"model_dim": 4 * 7}, "model_dim 28 must be an even multiple of num_heads 4"),
        ({"model_dim": 16}, "model_dim is 16; the smear gate reads 24 channels"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_kv_heads": 8}, "num_heads 4 is not a multiple of num_kv_heads 8"),
        ({"window_pattern": ""}, "window_pattern '' may hold only the letters S and L"),
        ({"window_pattern": "SSXL"}, "window_pattern 'SSXL'"),
        ({"window_pattern": "sl"}, "window_pattern 'sl'"),
    ],
)
def test_an_impossible_shape_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_a_shape_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.num_layers = 7  # type: ignore[misc]
