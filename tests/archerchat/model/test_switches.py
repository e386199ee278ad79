"""Each part of the model can be switched off: everywhere, it then computes what is left."""

from __future__ import annotations

from dataclasses import asdict, replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archerchat.dial import DialConfig, build_hyperparameters, build_model_config
from archerchat.errors import UsageError
from archerchat.evals.core.prompts import Prompt, build_tree
from archerchat.evals.core.scoring import iter_outcomes
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.config import ModelConfig
from archerchat.model.flops import count_parameters
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer, build_groups

WHOLE = ModelConfig(64, 300, 4, 4, 2, 64, "SSSL")
SWITCHES = ("value_embeddings", "smear", "backout", "residual_lambdas")
NEUTRAL = {"residual_lambdas": 1.0}
"""Values with which a part changes nothing, where they are not zero."""
CASES: list[dict[str, Any]] = [
    *({name: False} for name in SWITCHES),
    dict.fromkeys(SWITCHES, False) | {"qk_gain": 1.0, "window_pattern": "L"},
]


def pair(changes: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """Return a model without some parts, and a whole one whose parts change nothing."""
    model = Transformer(replace(WHOLE, **changes))
    model.init_weights(3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    kept = {name: value for name, value in changes.items() if name not in SWITCHES}
    whole = Transformer(replace(WHOLE, **kept))
    own = model.state_dict()
    values: dict[str, Tensor] = {
        name: own.get(name, torch.full_like(value, NEUTRAL.get(name, 0.0)))
        for name, value in whole.state_dict().items()
    }
    whole.load_state_dict(values)
    return model, whole


@pytest.mark.parametrize("changes", CASES)
def test_what_is_left_is_computed_in_training_decoding_and_core(changes: dict[str, Any]) -> None:
    model, whole = pair(changes)
    random = Random(0)
    rows = [[random.randrange(300) for _ in range(n)] for n in (50, 20)]
    ids = torch.tensor(rows[0])[None]
    torch.testing.assert_close(model(ids), whole(ids), atol=1e-6, rtol=1e-5)
    requests = [Request(row, SamplingParams(12, temperature=0)) for row in rows]
    said, expected = (
        [[c.token_ids for c in answer] for answer in Engine(m, max_batch=2).generate(requests)]
        for m in (model, whole)
    )
    assert said == expected
    ids_of = (np.array(row, dtype=np.int32) for row in ([*rows[0], 1, 2], [*rows[0], *rows[1]]))
    tree = build_tree(0, [Prompt(option, len(rows[0])) for option in ids_of])
    found, others = (
        [o for batch in iter_outcomes(m, [tree], "multiple_choice") for o in batch]
        for m in (model, whole)
    )
    assert found[0].losses == pytest.approx(others[0].losses, abs=1e-5)


@pytest.mark.slow
def test_what_is_left_is_compiled() -> None:
    model, whole = pair(CASES[-1])
    ids = torch.arange(50)[None]
    compiled = model.logits(model.hidden(ids, Regions.compiled()))
    torch.testing.assert_close(compiled, whole(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", CASES)
def test_a_part_that_is_off_has_no_parameters_and_every_other_is_trained(
    changes: dict[str, Any],
) -> None:
    config = replace(WHOLE, **changes)
    model = Transformer(config)
    model.init_weights(0)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total
    names = {name.partition(".")[0] for name in model.state_dict()}
    off = {name for name in SWITCHES if not changes.get(name, True)}
    assert not names & off
    rates = build_hyperparameters(DialConfig(depth=4, num_iterations=1), 300).learning_rates
    optimizer = Optimizer(model, build_groups(model, rates))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):  # branches begin at zero: the layers behind them are reached later
        model.zero_grad()
        ids = torch.arange(40)[None]
        model(ids).logsumexp(-1).mean().backward()
        optimizer.step(1.0, 0.9, 0.0)
    still = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not still
    assert ModelConfig(**asdict(config)) == config


def test_the_presets_and_the_flags_reach_the_model() -> None:
    one = build_model_config(DialConfig(depth=4, smear=False, qk_gain=1.5), 300)
    assert (one.smear, one.backout, one.qk_gain) == (False, True, 1.5)
    plain = build_model_config(DialConfig(depth=4, preset="transformers"), 300)
    assert not any(getattr(plain, name) for name in SWITCHES)
    assert (plain.qk_gain, plain.window_pattern) == (1.0, "L")
    with pytest.raises(UsageError, match="leave --window-pattern and --qk-gain out"):
        build_model_config(DialConfig(depth=4, preset="transformers", qk_gain=1.5), 300)
    with pytest.raises(ValueError, match="value gates read 12 channels"):
        ModelConfig(64, 300, 2, 1, 1, 8, smear=False)
