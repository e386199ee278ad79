"""Series: what charts show of the points, against a naive reading of the journal."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from endlex.server.downsample import choose_points, round_axis, round_significant

RUN = "testrun001"


def series(box: Any, **query: Any) -> dict[str, Any]:
    answer = box.client.get(f"/api/v1/runs/{RUN}/series", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_points_come_back_in_order_whatever_the_chunks(box: Any) -> None:
    box.begin()
    rng = random.Random(0)
    step, expected = 0, []
    while step < 3500:  # short and long batches, over several chunks
        count = rng.choice([1, 3, 700, 1200])
        records = [box.metrics(s, {"loss": s / 7, "lr": s}) for s in range(step, step + count)]
        expected += [s / 7 for s in range(step, step + count)]
        box.send(records)
        step += count
    found = series(box, metric="loss", points=100_000)["series"]["loss"]
    assert found["x"] == list(range(step))
    assert found["y"] == pytest.approx(expected, rel=1e-8)
    assert (found["count"], found["sampled"], found["nonfinite"]) == (step, False, [])
    reader = box.client.app.state.server.database.reader()
    counts = [n for (n,) in reader.execute("SELECT count FROM chunk ORDER BY pk")]
    chunks = [1000] * (step // 1000) + [step % 1000] * (step % 1000 > 0)
    assert counts == 2 * chunks, "chunks fill up before another begins"


def test_metrics_of_different_records_keep_their_order(box: Any) -> None:
    box.begin()
    box.send(
        [
            box.metrics(1, {"a": 1, "b": 10}),
            box.metrics(2, {"b": 20}),
            box.metrics(2, {"a": 2, "b": 21}),
            box.metrics(3, {"a": 3}),
            box.metrics(3, {"a": 4, "b": 30}),
        ]
    )
    found = series(box, metric=["a", "b"])["series"]
    assert (found["a"]["x"], found["a"]["y"]) == ([1, 2, 3], [1, 2, 4])
    assert (found["b"]["x"], found["b"]["y"]) == ([1, 2, 3], [10, 21, 30])


def test_a_resumed_run_overwrites_what_it_repeats(box: Any, make_box: Callable[..., Any]) -> None:
    box.begin()
    box.send([box.metrics(s, {"loss": 1.0}) for s in range(100)])
    later = make_box(box.client, session="000002-later")
    later.begin()
    later.send([box.metrics(s, {"loss": 2.0}, time=1_800_000_000.0 + s) for s in range(60, 120)])
    found = series(box, metric="loss")["series"]["loss"]
    assert found["x"] == list(range(120))
    assert found["y"] == [1.0] * 60 + [2.0] * 60
    by_time = series(box, metric="loss", x="time")["series"]["loss"]
    assert by_time["y"] == found["y"]
    assert by_time["x"] == sorted(by_time["x"])


def test_the_machine_s_sessions_do_not_overwrite_one_another(
    box: Any, make_box: Callable[..., Any]
) -> None:
    for number, began in enumerate([1.7e9, 1.7e9 + 1000]):  # their steps are seconds since then
        machine = make_box(box.client, session=f"00000{number}-machine")
        machine.begin(kind="system")
        records = [
            machine.metrics(s, {"system/cpu": number * 100 + s}, time=began + s) for s in (0, 5)
        ]
        machine.send(records)
    found = series(box, metric="system/cpu", x="time")["series"]["system/cpu"]
    assert (found["x"], found["y"]) == (
        [1.7e9, 1.7e9 + 5, 1.7e9 + 1000, 1.7e9 + 1005],
        [0, 5, 100, 105],
    )
    text = box.client.get(f"/api/v1/runs/{RUN}/export").text
    assert [line.split(",")[2] for line in text.splitlines()] == [
        "system/cpu",
        "0.0",
        "5.0",
        "100.0",
        "105.0",
    ]
    whole = box.client.get(f"/api/v1/runs/{RUN}/export?format=json").json()
    assert whole["series"]["system/cpu"]["value"] == [0, 5, 100, 105]


def test_numbers_that_are_not_finite_are_stored_and_shown(box: Any) -> None:
    box.begin()
    values = [1.0, "NaN", 2.0, "Infinity", "-Infinity", 3.0]
    box.send([box.metrics(s, {"loss": value}) for s, value in enumerate(values)])
    found = series(box, metric="loss")["series"]["loss"]
    assert found["y"] == [1.0, None, 2.0, None, None, 3.0]
    assert found["nonfinite"] == [[1, "NaN"], [3, "Infinity"], [4, "-Infinity"]]
    metric = box.client.get(f"/api/v1/runs/{RUN}").json()["metrics"][0]
    assert (metric["min"], metric["max"], metric["last"]) == (1.0, 3.0, 3.0)
    box.send([box.metrics(9, {"loss": "NaN"})])
    assert box.client.get(f"/api/v1/runs/{RUN}").json()["summary"] == {"loss": "NaN"}


def test_ranges_are_inclusive_and_finer(box: Any) -> None:
    box.begin()
    box.send([box.metrics(s, {"loss": math.sin(s)}) for s in range(5000)])
    whole = series(box, metric="loss", points=100)["series"]["loss"]
    assert whole["sampled"]
    assert len(whole["x"]) <= 100
    part = series(box, metric="loss", points=100, **{"from": 1990, "to": 2010})["series"]["loss"]
    assert part["x"] == list(range(1990, 2011))
    assert (part["count"], part["sampled"]) == (21, False)
    by_time = series(box, metric="loss", x="time", **{"from": 1_700_000_010, "to": 1_700_000_012})
    assert by_time["series"]["loss"]["x"] == [1_700_000_010, 1_700_000_011, 1_700_000_012]


def test_another_metric_as_the_axis_is_joined_by_step(box: Any) -> None:
    box.begin()
    box.send(
        [
            box.metrics(0, {"tokens": 0, "loss": 5.0}),
            box.metrics(1, {"loss": 4.0}),
            box.metrics(2, {"tokens": 200, "loss": 3.0}),
            box.metrics(3, {"tokens": 100, "loss": 2.0}),
            box.metrics(4, {"tokens": "NaN", "loss": 1.0}),
        ]
    )
    found = series(box, metric=["loss", "tokens"], x="tokens")["series"]
    assert (found["loss"]["x"], found["loss"]["y"]) == ([0, 100, 200], [5.0, 2.0, 3.0])
    assert found["tokens"]["y"] == [0, 100, 200]
    assert series(box, metric="loss", x="nothing")["series"]["loss"]["x"] == []


def test_what_is_not_there_is_empty_and_what_is_wrong_is_refused(box: Any) -> None:
    box.begin()
    empty = {"x": [], "y": [], "count": 0, "sampled": False, "nonfinite": []}
    assert series(box, metric="nothing")["series"] == {"nothing": empty}
    path = f"/api/v1/runs/{RUN}/series"
    for query in ({}, {"metric": "a", "points": "3"}, {"metric": "a", "from": "nan"}):
        assert box.client.get(path, params=query).status_code == 422
    assert box.client.get("/api/v1/runs/unknown0/series?metric=a").status_code == 404


@pytest.mark.parametrize("total", [5, 1999, 2001, 12_345, 100_000])
def test_every_spike_survives_sampling(total: int) -> None:
    rng = np.random.default_rng(total)
    y = rng.normal(size=total)
    high, low = rng.choice(total, 2, replace=False)
    y[high], y[low] = 1e6, -1e6
    y[rng.choice(total, total // 50, replace=False)] = np.nan
    y[high], y[low] = 1e6, -1e6
    chosen = choose_points(y, 2000)
    assert len(chosen) <= 2000
    assert {0, total - 1, high, low} <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all()


def test_sampling_keeps_each_bucket_s_extremes() -> None:
    y = np.sin(np.arange(10_000.0))
    chosen = set(choose_points(y, 22).tolist())
    for start in range(0, 10_000, 1000):
        bucket = y[start : start + 1000]
        assert {start + int(bucket.argmin()), start + int(bucket.argmax())} <= chosen


def test_a_series_without_a_finite_value_is_sampled_too() -> None:
    assert len(choose_points(np.full(10_000, np.nan), 100)) <= 100


def test_rounding_keeps_what_a_screen_shows() -> None:
    assert round_significant(np.array([1 / 3, np.nan, 1e-12, 123456789012.0]), 4) == [
        0.3333,
        None,
        1e-12,
        123500000000.0,
    ]
    assert round_axis(np.array([0.0, 0.123456, 1.0])) == [0.0, 0.12346, 1.0]
    assert round_axis(np.array([1.7e9 + 0.123, 1.7e9 + 1e6])) == [1.7e9, 1.7e9 + 1e6]
    assert round_axis(np.array([0.5])) == [0.5]


def test_a_sampled_series_fits_fifty_kilobytes(box: Any) -> None:
    box.begin()
    rng = random.Random(1)
    for start in range(0, 20_000, 10_000):
        box.send(
            [
                box.metrics(s, {"loss": rng.random()}, time=1.7e9 + s * 0.4371)
                for s in range(start, start + 10_000)
            ]
        )
    for x in ("step", "time"):
        answer = box.client.get(f"/api/v1/runs/{RUN}/series?metric=loss&x={x}")
        assert len(answer.content) <= 50_000
        assert answer.headers["Server-Timing"].startswith("series;dur=")
