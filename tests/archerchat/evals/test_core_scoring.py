"""Trees, layouts and the forward pass against whole prompts one example at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch

from archerchat.evals.core.layout import build_layout, needed_trunk, tokens_to_run
from archerchat.evals.core.prompts import Prompt, Tree, build_tree
from archerchat.evals.core.scoring import Outcome, TreeLayer, iter_batches, iter_outcomes
from archerchat.model.transformer import Transformer


def ids(*token_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(token_ids, dtype=np.int32)


def draw_prompts(random: Random, kind: str) -> list[Prompt]:
    """Return an example's prompts of random tokens and lengths."""

    def some(least: int, most: int) -> list[int]:
        return random.choices(range(1, 290), k=random.randint(least, most))

    context = [299, *some(0, random.choice((5, 30, 200)))]
    if kind == "language_modeling":
        return [Prompt(ids(*context, *some(1, 6)), len(context))]
    if kind == "multiple_choice":
        options = [[i, *some(0, random.choice((0, 3, 25)))] for i in range(random.randint(2, 5))]
        return [Prompt(ids(*context, *option), len(context)) for option in options]
    end = some(1, 30)
    middles = [[i, *some(0, 3)] for i in range(290, 292)]
    return [Prompt(ids(*context, *m, 292, *end), len(context) + len(m) + 1) for m in middles]


def outcomes_of(
    model: Transformer, examples: Sequence[list[Prompt]], kind: str, tokens: int = 300
) -> list[Outcome]:
    trees = [build_tree(i, prompts) for i, prompts in enumerate(examples)]
    found = [o for batch in iter_outcomes(model, trees, kind, tokens) for o in batch]  # type: ignore[arg-type]
    return sorted(found, key=lambda outcome: outcome.index)


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ({"sequence_length": 24, "pattern": "L"}, 8),
        ({"sequence_length": 24, "pattern": "L", "layers": 1, "kv_heads": 4}, 128),
        ({"sequence_length": 300, "pattern": "SL", "layers": 4}, 32),
    ],
)
def test_trees_score_as_whole_prompts_do(
    build_small_model: Callable[..., Transformer],
    shape: dict[str, int],
    block: int,
    kind: str,
    score_plainly: Callable[..., tuple[list[float], bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("archerchat.evals.core.scoring.CPU_BLOCK", block)
    model, random = build_small_model(**shape), Random(f"{kind} {block}")
    examples = [draw_prompts(random, kind) for _ in range(25)]
    outcomes = outcomes_of(model, examples, kind)
    assert [outcome.index for outcome in outcomes] == list(range(25))
    for prompts, outcome in zip(examples, outcomes, strict=True):
        means, all_predicted = score_plainly(model, prompts)
        assert outcome.losses == pytest.approx(means, abs=1e-5)
        if kind == "language_modeling":
            assert (outcome.predicted, outcome.all_predicted) == (None, all_predicted)
        else:
            assert outcome.predicted == means.index(min(means))
            best, second = sorted(means)[:2]
            assert outcome.margin == pytest.approx(second - best, abs=2e-5)


def test_every_token_that_is_predicted_counts(
    build_small_model: Callable[..., Transformer],
) -> None:
    """A continuation of what the model says greedily is right; one changed token makes it wrong."""
    model = build_small_model()
    row = [299, 5, 17]
    for _ in range(4):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    wrong = [*row[:4], (row[4] + 1) % 290, *row[5:]]
    right, not_right = outcomes_of(
        model, [[Prompt(ids(*row), 3)], [Prompt(ids(*wrong), 3)]], "language_modeling"
    )
    assert right.is_correct(0)
    assert not not_right.is_correct(0)
    logits = model(torch.tensor([row]))[0, 2:-1]
    top = logits.topk(2).values
    assert right.margin == pytest.approx(float((top[:, 0] - top[:, 1]).min()), abs=1e-4)


def test_batches_change_nothing(build_small_model: Callable[..., Transformer]) -> None:
    model, random = build_small_model(), Random(5)
    examples = [draw_prompts(random, "multiple_choice") for _ in range(20)]
    alone, together = (
        outcomes_of(model, examples, "multiple_choice", tokens) for tokens in (1, 10_000)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)
        assert one.predicted == other.predicted


def test_bfloat16_is_close(build_small_model: Callable[..., Transformer]) -> None:
    exact = build_small_model()
    coarse = Transformer(exact.config, torch.bfloat16, "sdpa")
    coarse.load_state_dict(exact.state_dict())
    examples = [draw_prompts(Random(3), "schema") for _ in range(10)]
    for one, other in zip(
        outcomes_of(exact, examples, "schema"), outcomes_of(coarse, examples, "schema"), strict=True
    ):
        assert one.losses == pytest.approx(other.losses, rel=0.05)


def test_options_of_one_token_need_no_branch() -> None:
    prompts = [Prompt(ids(299, 4, 5, option), 3) for option in (7, 8, 9)]
    tree = build_tree(0, prompts)
    assert tree.token_ids.tolist() == [299, 4, 5]
    assert tree.trunk_length == 3
    assert tree.sources.tolist() == [2, 2, 2]
    assert tree.targets.tolist() == [7, 8, 9]
    assert tree.options.tolist() == [0, 1, 2]


def test_the_last_token_of_an_option_is_not_run() -> None:
    prompts = [Prompt(ids(299, 4, 7, 8), 2), Prompt(ids(299, 4, 9), 2)]
    tree = build_tree(0, prompts)
    assert tree.token_ids.tolist() == [299, 4, 7]
    assert tree.previous_ids.tolist() == [-1, 299, 4]
    assert tree.positions.tolist() == [0, 1, 2]
    assert tree.trunk_length == 2
    assert tree.sources.tolist() == [1, 2, 1]
    assert tree.lengths == (4, 3)


def test_only_what_windows_reach_is_run() -> None:
    trunk = Prompt(np.arange(1000, dtype=np.int32) % 290, 999)
    tree = build_tree(0, [trunk])
    assert needed_trunk(tree, (128, 128, 256)) == [513, 385, 257, 1]
    assert needed_trunk(tree, (2048, 2048)) == [999, 999, 1]
    assert tokens_to_run(tree, (128, 128, 256)) == 513
    branched = build_tree(0, [Prompt(ids(299, *[3] * 500, i, 6, 7), 501) for i in (4, 5)])
    assert needed_trunk(branched, (128, 256)) == [385, 257, 1]


def test_layers_that_are_alike_share_a_level() -> None:
    tree = build_tree(0, [Prompt(ids(299, *[3] * 50), 50)])
    layout = build_layout([tree], (128, 128, 64, 128), 128)
    assert layout.levels[0] is layout.levels[1] is layout.levels[2]
    assert layout.levels[3] is not layout.levels[0]
    assert layout.levels[0].keeps_all
    assert not layout.levels[3].keeps_all


def test_blocks_that_see_alike_share_a_mask() -> None:
    tree = build_tree(0, [Prompt(ids(299, *[3] * 1000), 1)])
    layout = build_layout([tree], (128, 64), 64)
    masks: dict[bytes, torch.Tensor] = {}
    layers = [TreeLayer(x, masks, torch.device("cpu"), torch.float32) for x in layout.levels]
    assert [len(layer.masks) for layer in layers] == [16, 16]
    assert len(masks) == 6  # where the trunk starts, within it, and where it ends


def test_the_largest_trees_come_first_and_batches_keep_the_budget() -> None:
    trees = [build_tree(i, [Prompt(ids(*[299] * n), n - 1)]) for i, n in enumerate((5, 40, 9, 20))]
    batches = [[tree.index for tree in batch] for batch in iter_batches(trees, (64,), 30)]
    assert batches == [[1], [3, 2], [0]]


def test_an_option_with_nothing_to_score_wins_where_it_stands_first(
    build_small_model: Callable[..., Transformer],
    score_plainly: Callable[..., tuple[list[float], bool]],
) -> None:
    """The reference's `min` keeps NaN where it comes first: nothing compares as less than it."""
    short, long = Prompt(ids(299, 4, 5), 3), Prompt(ids(299, 4, 5, 6), 3)
    other = Prompt(ids(299, 4, 5, 7), 3)
    examples = [[short, long], [long, short], [long, short, other], [short, short]]
    model = build_small_model()
    outcomes = outcomes_of(model, examples, "multiple_choice")
    assert [outcome.predicted for outcome in outcomes][:2] == [0, 0]
    assert outcomes[2].predicted in (0, 2)
    assert outcomes[3].predicted == 0
    for prompts, outcome in zip(examples, outcomes, strict=True):
        means, _ = score_plainly(model, prompts)
        assert outcome.losses == pytest.approx(means, abs=1e-5, nan_ok=True)
        assert outcome.predicted == means.index(min(means))
        assert build_tree(0, prompts).has_unscored
    assert [outcome.margin == math.inf for outcome in outcomes] == [True, True, False, True]
    assert not build_tree(0, [long, other]).has_unscored


def test_a_continuation_of_no_token_is_predicted(
    build_small_model: Callable[..., Transformer],
) -> None:
    (outcome,) = outcomes_of(build_small_model(), [[Prompt(ids(299, 4), 2)]], "language_modeling")
    assert outcome.is_correct(0)
    assert math.isnan(outcome.losses[0])


def test_the_first_of_equals_wins(build_small_model: Callable[..., Transformer]) -> None:
    model = build_small_model()
    model.unembedding.weight.zero_()  # every token is as likely as any other
    prompts = [Prompt(ids(299, 4, option), 2) for option in (9, 8, 7)]
    (outcome,) = outcomes_of(model, [prompts], "multiple_choice")
    assert outcome.predicted == 0
    assert outcome.margin == 0
    assert isinstance(build_tree(0, prompts), Tree)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_a_gpu_scores_what_a_cpu_scores(
    build_small_model: Callable[..., Transformer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = {"sequence_length": 300, "pattern": "SL", "layers": 4}
    examples = [draw_prompts(Random(i), kind) for i in range(25)]
    expected = outcomes_of(build_small_model(**shape), examples, kind)
    for ours, wanted in zip(
        outcomes_of(build_small_model(**shape).cuda(), examples, kind), expected, strict=True
    ):
        assert ours.losses == pytest.approx(wanted.losses, abs=1e-4)
        assert ours.all_predicted == wanted.all_predicted
