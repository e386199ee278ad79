"""Laws recovered from points that follow them, and which law a series of runs allows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.report import scaling
from archerchat.report.runs import Run
from archerchat.report.scaling import Law, SizedRun, build_scaling_report, fit_law, fit_runs

CHINCHILLA = Law(1.69, (406.4, 410.7), (0.34, 0.28))
"""Hoffmann et al. 2022, equation 10."""
GRID = list(product((1e7, 3e7, 1e8, 3e8, 1e9), (2e8, 1e9, 4e9, 2e10)))


def sizes() -> list[list[float]]:
    return [[n for n, _ in GRID], [d for _, d in GRID]]


@pytest.mark.parametrize("end", [math.nan, math.inf, -math.inf, 0.0, None])
def test_a_run_that_ends_in_no_positive_number_is_refused(
    end: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that diverged is not judged by the loss before."""
    metrics = {name: {0: 2.0, 9: 1.5} for name in ("val/bpb", "train/tokens", "train/flops")}
    shape = {"sequence_length": 8, "vocab_size": 64, "num_layers": 1, "num_heads": 1,
             "num_kv_heads": 1, "model_dim": 32}  # fmt: skip
    run = Run("a", metrics=metrics, config={"model_config": shape})
    monkeypatch.setattr(scaling, "load_run", lambda home, tag: run)
    (found,) = scaling.gather_sizes(Home(tmp_path), ["a"], "val/bpb", "total")
    assert (found.loss, found.tokens, found.flops) == (1.5, 1.5, 1.5)
    metrics["val/bpb"] = {} if end is None else {0: 2.0, 9: end}
    with pytest.raises(UsageError, match="run 'a' has not logged val/bpb"):
        scaling.gather_sizes(Home(tmp_path), ["a"], "val/bpb", "total")


def test_a_known_law_is_recovered() -> None:
    law = fit_law(CHINCHILLA.predict(*map(np.array, sizes())).tolist(), sizes())
    assert law.floor == pytest.approx(1.69, rel=1e-6)
    assert law.factors == pytest.approx((406.4, 410.7), rel=1e-5)
    assert law.exponents == pytest.approx((0.34, 0.28), rel=1e-6)


def test_one_outlier_and_noise_hardly_move_it() -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, len(GRID))
    losses = CHINCHILLA.predict(*map(np.array, sizes())) * np.exp(noise)
    losses[7] *= 1.2
    law = fit_law(losses.tolist(), sizes())
    assert law.floor == pytest.approx(1.69, rel=0.05)
    assert law.exponents == pytest.approx((0.34, 0.28), rel=0.06)


def test_fewer_terms() -> None:
    compute = [1e16, 1e17, 1e18, 1e19]
    law = fit_law([0.6 + 30 / c**0.1 for c in compute], [compute])
    assert (law.floor, *law.factors, *law.exponents) == pytest.approx((0.6, 30, 0.1), rel=1e-6)
    plain = fit_law([30 / c**0.1 for c in compute[:2]], [compute[:2]], floor=False)
    assert plain.floor is None
    assert (*plain.factors, *plain.exponents) == pytest.approx((30, 0.1), rel=1e-9)


def test_leaving_one_out_shows_what_rests_on_it() -> None:
    compute = [1e16, 1e17, 1e18, 1e19, 1e20]
    losses = [0.6 + 30 / c**0.1 for c in compute]
    laws = fit_law(losses, [compute]).without_one
    assert len(laws) == 5
    assert [law.floor for law in laws] == pytest.approx([0.6] * 5, rel=1e-4)
    losses[4] *= 1.05
    floors = [law.floor for law in fit_law(losses, [compute]).without_one]
    assert floors[4] == pytest.approx(0.6, rel=1e-4)
    assert floors[0] != pytest.approx(0.6, rel=1e-2)
    assert fit_law(losses[:3], [compute[:3]]).without_one == ()


@pytest.mark.filterwarnings("error")
def test_a_law_that_falls_steeply_warns_of_nothing() -> None:
    """Without one of these runs the exponent is 33, and 1e10^33 is more than a float holds."""
    compute = [11616583680.0, 24170250240.0, 43901706240.0, 57999753216.0]
    law = fit_law([4.244833535891836, 4.228040787659309, 4.038096115866922, 4.2231], [compute])
    assert max(each.factors[0] for each in law.without_one) == math.inf
    assert math.isfinite(law.factors[0])


def test_the_best_split_is_the_least_loss() -> None:
    flops = 1e21
    parameters, tokens = CHINCHILLA.optimal_split(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    best = float(CHINCHILLA.predict(parameters, tokens))
    for factor in (0.9, 1.1):
        moved = parameters * factor
        assert float(CHINCHILLA.predict(moved, flops / 6 / moved)) > best


def sized(parameters: int, tokens: float, finished: bool = True) -> SizedRun:
    loss = 1.7 + 400 / parameters**0.34 + 400 / tokens**0.28
    tag = f"p{parameters}t{tokens:.0f}"
    return SizedRun(tag, parameters, tokens, 6.0 * parameters * tokens, loss, finished)


def test_runs_that_vary_apart_give_both_terms() -> None:
    runs = [sized(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 4e9, 2e10)]
    law, _ = fit_runs(runs)
    assert law.both
    assert law.exponents == pytest.approx((0.34, 0.28), rel=1e-4)
    assert all(law.predict_run(run) == pytest.approx(run.loss) for run in runs)
    assert str(law).startswith("L(N, D) = 1.7000 + 400 / N^0.3400 + 400 / D^0.2800")


def test_a_miniseries_at_one_ratio_is_fitted_over_compute() -> None:
    law, reason = fit_runs(
        [sized(n, 12.0 * n) for n in (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 10**9)]
    )
    assert not law.both
    assert law.floor is not None
    assert "cannot be separated" in reason
    assert "because tokens grow with parameters" in reason


def test_two_amounts_of_tokens_do_not_show_a_curve() -> None:
    law, reason = fit_runs([sized(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 1e10)])
    assert not law.both
    assert "because they have only 2 different numbers of parameters or of tokens" in reason
    assert "at least 3 values of each" in reason
    _, reason = fit_runs([sized(10**7, 1e9 * 2**i) for i in range(6)])
    assert "only 1 different" in reason


@pytest.mark.parametrize(("count", "floor"), [(2, False), (3, False), (4, True), (5, True)])
def test_few_runs_give_a_simpler_law_and_it_says_so(count: int, floor: bool) -> None:
    law, reason = fit_runs([sized(10**7 * 3**i, 1e9 * 2**i) for i in range(count)])
    assert not law.both
    assert (law.floor is not None) == floor
    assert ("because they are too few" if floor else "too few for a floor") in reason


def test_runs_of_one_size_give_none() -> None:
    with pytest.raises(UsageError, match="two sizes"):
        fit_runs([sized(10**7, 1e9), sized(10**7, 1e9)])


@pytest.mark.parametrize("count", [2, 5, 9])
def test_the_document(count: int) -> None:
    sizes = [(10**7 * 3 ** (i // 3), 1e9 * 5 ** (i % 3)) for i in range(count)]
    runs = [sized(n, d, finished=i > 0) for i, (n, d) in enumerate(sizes)]
    document = build_scaling_report(runs, *fit_runs(runs), "val/bpb")
    notices = [line for line in document.markdown.splitlines() if line.startswith("> ")]
    assert any(runs[0].tag in line for line in notices)
    assert all(run.tag in document.html for run in runs)
    assert len(document.charts) == (2 if count == 9 else 1)


def test_a_chart_shows_no_more_sizes_than_it_has_colours() -> None:
    runs = [sized(10**7 * 2**i, 1e9 * 3**j) for i in range(8) for j in range(3)]
    chart, _ = scaling._charts(runs, fit_runs(runs)[0], "val/bpb")
    assert [series.color for series in chart.series] == [i // 2 for i in range(12)]
    labels = [series.label for series in chart.series if series.label]
    assert (labels[0], labels[-1]) == ("10M", "1.28B")  # the smallest and the largest


def test_losses_that_rise_are_said_to() -> None:
    runs = [replace(sized(10**7 * 3**i, 1e9), loss=1.0 + i) for i in range(3)]
    text = build_scaling_report(runs, *fit_runs(runs), "val/bpb").markdown
    assert "do not show loss falling" in text


def test_a_law_that_rises_with_one_size_has_no_best_split() -> None:
    sizes = [(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 4e9, 2e10)]
    runs = [replace(sized(n, d), loss=1 + n**0.1 + 400 / d**0.28) for n, d in sizes]
    law, reason = fit_runs(runs)
    assert law.both
    assert law.exponents[0] < 0
    text = build_scaling_report(runs, law, reason, "val/bpb").markdown
    assert "do not show loss falling" in text
    assert "has no best split" in text
