"""Two runs, or a run and the reference's log in either layout, side by side."""

from __future__ import annotations

import pytest

from archerchat.errors import DataError
from archerchat.report.comparison import (
    BITS,
    CHATCORE,
    CORE,
    FIRST_LOSS,
    MFU,
    SFT_BITS,
    SPEED,
    Course,
    compare,
    compute_multiplier,
    parse_log,
)

STEP_LINES = """
Total batch size 524,288
Estimated FLOPs per token: 8.87e+08
Step 00000 | Validation bpb: 3.2000
step 00000/02520 (0.00%) | loss: 10.397 | dt: 4,900.1ms | tok/sec: 106,000 | mfu: 38.00
step 00100/02520 (3.97%) | loss: 5.500 | dt: 4,900.1ms | tok/sec: 106,500 | mfu: 39.00
Step 02520 | Validation bpb: 0.8420
Step 02520 | CORE metric: 0.1542
Step 00000 | Validation bpb: 0.5000
step 00000 (0.00%) | loss: 2.000 | tok/sec: 90,000
Step 00100 | Validation bpb: 0.3560
ChatCORE metric: 0.2578
"""
PAIRS = """
[params] total=286261730 flops_per_token=887098032 total_batch_size=524288
[step] step=0 loss=10.397 tok_per_sec=106000 mfu=38.0
[step] step=100 loss=5.5 tok_per_sec=106500 mfu=39.0
[eval] step=2520 val_bpb=0.842
[core] step=2520 score=0.1542
[chatcore] score=0.2578
"""


@pytest.mark.parametrize("text", [STEP_LINES, PAIRS])
def test_both_layouts_of_the_reference_s_log_are_read(text: str) -> None:
    course = parse_log("log", text)
    assert course.losses == {0: 10.397, 100: 5.5}
    assert course.bits[2520] == 0.842
    scores = {BITS: 0.842, CORE: 0.1542, CHATCORE: 0.2578, SPEED: 106_500.0, MFU: 0.39}
    expected = scores | ({SFT_BITS: 0.356} if text == STEP_LINES else {})
    assert course.scores == pytest.approx(expected)
    assert course.flops_per_step == pytest.approx(8.87e8 * 524_288, rel=1e-3)
    with pytest.raises(DataError, match="no line with a step's loss"):
        parse_log("log", "hello: 1 at step 9")


def test_what_is_printed_after_fine_tuning_counts_if_it_is_of_the_base_model() -> None:
    whole = STEP_LINES.replace("Estimated FLOPs per token: 8.87e+08\n", "")
    before = whole.replace("Step 02520 | CORE metric: 0.1542\n", "")
    course = parse_log("log", before + "CORE metric: 0.1542\nTotal training flops: 2.52e+18\n")
    assert course.scores == parse_log("log", whole).scores
    assert course.flops_per_step == pytest.approx(1e15)


def test_runs_agree_within_the_noise() -> None:
    one = Course("a", {0: 6.0, 5: 5.0, 99: 3.0}, {100: 0.90}, scores={BITS: 0.90, CORE: 0.15})
    near = Course("b", {0: 6.0, 5: 5.04, 99: 3.02}, {100: 0.907}, scores={BITS: 0.907, CORE: 0.142})
    assert all(row.agrees for row in compare(one, near))
    far = Course("c", {0: 6.0, 5: 5.06}, scores={BITS: 0.911, SPEED: 9.0})
    rows = {row.name: row for row in compare(one, far)}
    assert rows[FIRST_LOSS].difference == pytest.approx(0.06)
    assert not rows[FIRST_LOSS].agrees
    assert not rows[BITS].agrees
    assert SPEED not in rows


def test_too_few_common_steps_show_a_difference_but_no_agreement() -> None:
    one, long = Course("a", dict.fromkeys(range(3), 6.0)), dict.fromkeys(range(101), 6.0)
    rows = compare(one, Course("b", long))
    assert [(row.agrees, row.few_steps) for row in rows] == [(None, 3)] * 2
    assert [row.agrees for row in compare(one, Course("c", long | {1: 7.0}))] == [False, None]
    assert all(row.agrees for row in compare(Course("a", long), Course("b", long)))


def test_the_compute_multiplier_is_interpolated_in_log_log() -> None:
    """Bits fall as 4 / sqrt(steps): the slow one needs four times the compute."""
    fast = Course("fast", bits={s: 4 / s**0.5 for s in (25, 49, 225, 400)}, flops_per_step=2.0)
    slow = Course("slow", bits={s: 8 / s**0.5 for s in (100, 400)})
    found = compute_multiplier(slow, fast)
    assert found is not None
    assert found == ("fast", pytest.approx(4.0))
    assert compute_multiplier(Course("x"), fast) is None
