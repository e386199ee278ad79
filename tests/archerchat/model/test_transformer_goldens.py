"""The transformer against the reference's figures (oracle/README, "models"), GQA included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.model.loss import token_losses, weighted_loss
from archerchat.model.transformer import Block, Regions, Transformer

BACKENDS = ("sdpa", "matmul")


@pytest.fixture(scope="module", params=BACKENDS)
def golden_run(request: pytest.FixtureRequest, model_golden: Any) -> tuple[Any, Transformer]:
    """A golden and its model, on each backend that runs everywhere."""
    return model_golden, model_golden.build(backend=request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    """Compare logits or activations at the oracle's tolerance."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_logits_equal_the_goldens(golden_run: tuple[Any, Transformer]) -> None:
    golden, model = golden_run
    io = golden.io
    logits = model(io["ids"])
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 256, golden.config.vocab_size)
    close(logits[0, io["logits_positions"]], io["logits_row0"])
    close(logits[1, -1], io["logits_row1_last"])
    close(model(io["ids"][:1, :10])[0, -1], io["logits_T10_last"])


@torch.no_grad()
def test_an_input_longer_than_the_configured_sequence(golden_run: tuple[Any, Transformer]) -> None:
    golden, model = golden_run
    logits = model(golden.io["long_ids_400"])
    close(logits[0, golden.io["long_logits_pos"]], golden.io["long_logits"])


@torch.no_grad()
def test_losses_equal_the_goldens(golden_run: tuple[Any, Transformer]) -> None:
    golden, model = golden_run
    hidden, targets = model.hidden(golden.io["ids"]), golden.io["targets"]
    losses = token_losses(hidden, model.unembedding.weight, targets, golden.config.vocab_size)
    torch.testing.assert_close(losses, golden.io["per_position_loss"], atol=1e-5, rtol=1e-5)
    mean = weighted_loss(hidden, model.unembedding.weight, targets, golden.config.vocab_size)
    assert mean.item() == pytest.approx(golden.facts["mean_loss"], rel=1e-5)


@torch.no_grad()
def test_activations_equal_the_goldens(golden_run: tuple[Any, Transformer]) -> None:
    golden, model = golden_run
    seen: dict[str, Tensor] = {}

    def record(block: Block, x: Tensor, x0: Tensor, *rest: Any) -> Tensor:
        number = sum(name.endswith(".in") for name in seen)
        seen[f"block{number}.in"] = rest[2] * x + rest[3] * x0
        branches = {"attn_out": block.attention, "mlp_out": block.mlp}
        hooks = [
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({f"block{number}.{name}": out})
            )
            for name, module in branches.items()
        ]
        out = seen[f"block{number}.out"] = Block.forward(block, x, x0, *rest)
        for hook in hooks:
            hook.remove()
        return out

    seen["lm_head_in"] = model.hidden(golden.io["ids"], Regions(block=record))
    wanted = {n.removeprefix("act."): t for n, t in golden.io.items() if n.startswith("act.")}
    assert seen.keys() == wanted.keys()
    for name, expected in wanted.items():
        close(seen[name][0, golden.io["act_positions"]], expected)


def test_gradients_equal_the_goldens(golden_run: tuple[Any, Transformer]) -> None:
    golden, model = golden_run
    model.zero_grad()
    hidden, targets = model.hidden(golden.io["ids"]), golden.io["targets"]
    weighted_loss(hidden, model.unembedding.weight, targets, golden.config.vocab_size).backward()
    stats = to_archerchat_names(golden.facts["grad_stats"])
    samples = to_archerchat_names(
        {name.partition(".")[2]: t for name, t in golden.io.items() if name.startswith("grad")}
    )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == stats.keys() == samples.keys()
    # smear_lambda's is a sum of 510 terms that nearly cancel in model_b_gqa: 4.81445e-4 in float64
    # where float32 left the reference 4.81349e-4. The golden itself is 2e-4 off.
    gradient, expected = gradients.pop("smear_lambda"), samples.pop("smear_lambda")
    torch.testing.assert_close(gradient, expected, atol=1.5e-7, rtol=1e-4)
    for name, gradient in gradients.items():
        norm = gradient.double().norm().item()
        assert norm == pytest.approx(stats[name]["l2"], rel=1e-4), name
        sample = gradient.flatten()[:: stats[name].get("stride", 1)][: samples[name].numel()]
        assert relative_error(sample, samples[name].flatten()) < 1e-4, name


@torch.no_grad()
def test_greedy_continuations_equal_the_goldens(model_golden: Any) -> None:
    model = model_golden.build()
    for case in model_golden.facts["generation"].values():
        token_ids = list(case["prompt"])
        for _ in case["naive_greedy"]:
            token_ids.append(int(model(torch.tensor([token_ids]))[0, -1].argmax()))
        assert token_ids[len(case["prompt"]) :] == case["naive_greedy"]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_close_as_the_reference(model_golden: Any, backend: Any) -> None:
    """Both are compared with float32: two bfloat16 results differ by the rounding of both.

    The rounding of the golden's 416 targets leaves a standard error of 0.001 in their mean loss.
    Sixteen draws of targets bring it well below the bound of 0.002.
    """
    golden, model = model_golden, model_golden.build(torch.bfloat16, backend)
    exact, ids, vocab_size = golden.build(), golden.io["ids"], golden.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(vocab_size, (16 * len(ids), ids.size(1)), generator=generator)
    losses = []
    for each in (model, exact):
        hidden = each.hidden(ids)
        assert hidden.dtype == each.compute_dtype
        hidden = hidden.repeat(16, 1, 1)
        losses.append(token_losses(hidden, each.unembedding.weight, targets, vocab_size).mean())
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=2e-3)
    positions, wanted = golden.io["logits_positions"], golden.io["logits_row0"]
    logits = model(ids[:1])[0, positions]
    assert logits.dtype == torch.float32
    reference = torch.tensor(golden.facts["bfloat16_compute"]["logits_row0_pos255_first16"])
    reference_error = reference - wanted[positions == 255, :16]
    assert (logits - wanted).square().mean() < reference_error.square().mean()
