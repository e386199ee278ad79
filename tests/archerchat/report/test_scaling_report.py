"""Which law a series of runs allows, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from archerchat.errors import UsageError
from archerchat.report.scaling_report import (
    SizedRun,
    build_scaling_report,
    fit_runs,
)


def sized(parameters: int, tokens: float, finished: bool = True) -> SizedRun:
    loss = 1.7 + 400 / parameters**0.34 + 400 / tokens**0.28
    tag = f"p{parameters}t{tokens:.0f}"
    return SizedRun(tag, parameters, tokens, 6.0 * parameters * tokens, loss, finished)


def test_runs_that_vary_apart_give_both_terms() -> None:
    runs = [sized(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 4e9, 2e10)]
    fit = fit_runs(runs)
    assert fit.both
    assert fit.law.exponents == pytest.approx((0.34, 0.28), rel=1e-4)
    assert all(fit.predict(run) == pytest.approx(run.loss) for run in runs)
    assert fit.formula.startswith("L(N, D) = 1.7000 + 400 / N^0.3400 + 400 / D^0.2800")


def test_a_miniseries_at_one_ratio_is_fitted_over_compute() -> None:
    fit = fit_runs([sized(n, 12.0 * n) for n in (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 10**9)])
    assert not fit.both
    assert fit.law.floor is not None
    assert "cannot be told apart" in fit.reason


def test_two_amounts_of_tokens_do_not_show_a_curve() -> None:
    fit = fit_runs([sized(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 1e10)])
    assert not fit.both
    assert "only 2 different" in fit.reason


@pytest.mark.parametrize(("count", "floor"), [(2, False), (3, False), (4, True), (5, True)])
def test_few_runs_give_a_simpler_law_and_it_says_so(count: int, floor: bool) -> None:
    fit = fit_runs([sized(10**7 * 3**i, 1e9 * 2**i) for i in range(count)])
    assert not fit.both
    assert (fit.law.floor is not None) == floor
    assert "too few" in fit.reason


def test_runs_of_one_size_give_none() -> None:
    with pytest.raises(UsageError, match="two sizes"):
        fit_runs([sized(10**7, 1e9), sized(10**7, 1e9)])


@pytest.mark.parametrize("count", [2, 5, 9])
def test_the_document(count: int) -> None:
    sizes = [(10**7 * 3 ** (i // 3), 1e9 * 5 ** (i % 3)) for i in range(count)]
    runs = [sized(n, d, finished=i > 0) for i, (n, d) in enumerate(sizes)]
    document = build_scaling_report(runs, fit_runs(runs), "val/bpb")
    notices = [line for line in document.markdown.splitlines() if line.startswith("> ")]
    assert any(runs[0].tag in line for line in notices)
    assert all(run.tag in document.html for run in runs)
    assert len(document.charts) == (2 if count == 9 else 1)


def test_losses_that_rise_are_said_to() -> None:
    runs = [replace(sized(10**7 * 3**i, 1e9), loss=1.0 + i) for i in range(3)]
    text = build_scaling_report(runs, fit_runs(runs), "val/bpb").markdown
    assert "do not show loss falling" in text


def test_a_law_that_rises_with_one_size_has_no_best_split() -> None:
    sizes = [(n, d) for n in (10**7, 10**8, 10**9) for d in (1e9, 4e9, 2e10)]
    runs = [replace(sized(n, d), loss=1 + n**0.1 + 400 / d**0.28) for n, d in sizes]
    fit = fit_runs(runs)
    assert fit.both
    assert fit.law.exponents[0] < 0
    text = build_scaling_report(runs, fit, "val/bpb").markdown
    assert "do not show loss falling" in text
    assert "has no best split" in text
