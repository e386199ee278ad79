"""Series: what charts show of the points, against a naive reading of the journal."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from endlex import formats
from endlex.server.api.bodies import json_response
from endlex.server.store.charts import (
    ChartQuery,
    choose_points,
    read_chart,
    round_axis,
    shorten,
)
from endlex.server.store.database import connect
from endlex.server.store.records import Points
from endlex.server.store.series import append_points, read_sampled

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
    assert [line.split(",")[1::2] for line in text.splitlines()] == [
        ["step", "value"],
        ["0", "0.0"],
        ["5", "5.0"],
        ["1000", "100.0"],
        ["1005", "105.0"],
    ]
    whole = box.client.get(f"/api/v1/runs/{RUN}/export?format=json").json()
    assert whole["series"]["system/cpu"]["value"] == [0, 5, 100, 105]


def test_json_is_whole_however_it_is_cut(box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "POINTS_AT_ONCE", 3)
    box.begin()
    box.send([box.metrics(s, {"loss": s / 8 if s else "NaN"}) for s in range(10)])
    whole = box.client.get(f"/api/v1/runs/{RUN}/export?format=json").json()["series"]["loss"]
    assert whole["value"] == ["NaN", *(s / 8 for s in range(1, 10))]
    assert whole["step"] == list(range(10))
    assert whole["time"] == [1_700_000_000.0 + s for s in range(10)]


def test_numbers_that_are_not_finite_are_stored_and_shown(box: Any) -> None:
    box.begin()
    values = [1.0, "NaN", 2.0, "Infinity", "-Infinity", 3.0]
    box.send([box.metrics(s, {"loss": value}) for s, value in enumerate(values)])
    found = series(box, metric="loss")["series"]["loss"]
    assert found["y"] == [1.0, None, 2.0, None, None, 3.0]
    assert found["nonfinite"] == [[1, 1, "NaN"], [3, 3, "Infinity"], [4, 4, "-Infinity"]]
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
    values = np.array([1 / 3, np.nan, -np.inf, 1e-12, 123456789012.0])
    assert json_response(shorten(values)).body == b"[0.33333334,null,null,1e-12,123456790000.0]"
    assert shorten(np.array([1.0, 1e300])).tolist() == [1.0, 1e300]
    assert round_axis(np.array([0.0, 0.123456, 1.0])).tolist() == [0.0, 0.12346, 1.0]
    assert round_axis(np.array([1.7e9 + 0.123, 1.7e9 + 1e6])).tolist() == [1.7e9, 1.7e9 + 1e6]
    assert round_axis(np.array([0.0, 1e300])).tolist() == [0.0, 1e300]
    assert round_axis(np.array([0.5])).tolist() == [0.5]
    assert round_axis(np.array([])).tolist() == []


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


def chart(connection: sqlite3.Connection, **query: Any) -> dict[str, Any]:
    """What the API answers for the metric of `store`."""
    found = read_chart(connection, 1, ChartQuery(metric=["m"], **query))["m"]
    answer: dict[str, Any] = json.loads(json_response(found).body)
    return answer


def many(count: int, seed: int) -> Points:
    rng = np.random.default_rng(seed)
    numbers = np.cumsum(rng.normal(size=count))
    spikes = rng.choice(count, 20, replace=False)
    numbers[spikes] = rng.normal(size=20) * 1e6
    steps = np.cumsum(rng.integers(1, 4, count))
    return Points(steps, numbers, 1.7e9 + steps / 8)


@pytest.fixture
def store(tmp_path: Any) -> Iterator[tuple[sqlite3.Connection, Callable[..., None]]]:
    """A database with one metric, and a way to add points of a session in pieces to it."""
    connection = connect(tmp_path / "x.sqlite3")
    connection.execute("INSERT INTO metric (run, name) VALUES (1, 'm')")

    def add(points: Points, session: int = 1) -> None:
        for i in range(0, len(points.steps), 2345):
            part = slice(i, i + 2345)
            piece = Points(points.steps[part], points.numbers[part], points.times[part])
            append_points(connection, 1, session, piece)

    yield connection, add
    connection.close()


def test_long_series_drawn_from_summaries_show_what_all_points_show(store: Any) -> None:
    connection, add = store
    points = many(40_000, 1)
    add(points)
    chosen = {True: 0, False: 0}
    rng = np.random.default_rng(2)
    for _ in range(30):
        for x, axis in (("step", points.steps), ("time", points.times)):
            low, high = np.sort(rng.choice(axis, 2, replace=False))
            found = chart(connection, x=x, first=low, last=high, points=100)
            inside = (axis >= low) & (axis <= high)
            numbers = points.numbers[inside]
            assert found["count"] == inside.sum()
            assert len(found["x"]) <= 100
            assert found["x"] == sorted(found["x"])
            digits = pytest.approx
            ends = (found["x"][0], found["x"][-1], found["y"][0], found["y"][-1])
            assert ends == digits((low, high, numbers[0], numbers[-1]), rel=1e-6)
            assert min(found["y"]) == digits(numbers.min(), rel=1e-6)
            assert max(found["y"]) == digits(numbers.max(), rel=1e-6)
            drawn = read_sampled(connection, 1, x == "time", float(low), float(high), 100)
            chosen[drawn is not None] += 1
            if drawn is not None:  # every candidate is a point that was logged
                places = np.searchsorted(axis, drawn[0])
                assert (points.numbers[places] == drawn[1]).all()
    assert min(chosen.values()) > 0, "both ways were taken"


def test_summaries_are_not_used_where_they_would_be_wrong(store: Any) -> None:
    connection, add = store
    first = many(20_000, 3)
    add(first)
    resumed = many(20_000, 4)
    steps = resumed.steps + first.steps[15_000]
    add(Points(steps, resumed.numbers, resumed.times + 1e6), session=2)
    assert read_sampled(connection, 1, False, -np.inf, np.inf, 100) is None
    found = chart(connection, points=100)
    assert found["count"] == len(np.union1d(first.steps, steps))
    before = float(first.times[-1]) + 1  # the points that were replaced are not shown here either
    found = chart(connection, x="time", last=before, points=100)
    assert found["count"] == len(np.setdiff1d(first.steps, steps))


def test_what_is_not_finite_shows_in_long_series(store: Any) -> None:
    connection, add = store
    points = many(20_000, 5)
    strange = [7, 8, 5000, 19_998, 19_999]
    points.numbers[strange] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    add(points)
    assert read_sampled(connection, 1, False, -np.inf, np.inf, 100)
    found = chart(connection, points=100)
    ends = [(7, 7), (8, 8), (5000, 5000), (19_998, 19_999)]
    steps = points.steps
    assert [(a, b) for a, b, _ in found["nonfinite"]] == [(steps[a], steps[b]) for a, b in ends]
    assert found["count"] == 20_000
    finite = points.numbers[np.isfinite(points.numbers)]
    assert max(y for y in found["y"] if y is not None) == pytest.approx(finite.max(), rel=1e-6)


def test_what_is_not_finite_is_told_over_the_whole_run_in_few_ranges(store: Any) -> None:
    connection, add = store
    points = many(20_000, 5)
    points.numbers[1000:2000] = np.nan
    points.numbers[10_000::2] = np.inf  # five thousand of them, each alone
    add(points)
    found = chart(connection, points=100)["nonfinite"]
    steps = points.steps
    assert found[0] == [steps[1000], steps[1999], "NaN"]
    assert found[-1][1] == steps[19_998]
    assert 1 < len(found) <= 502
    assert {kind for *_, kind in found[1:]} == {"Infinity"}


def test_a_logarithmic_axis_has_points_at_small_steps(store: Any) -> None:
    connection, add = store
    points = many(100_000, 5)
    add(points)
    found = chart(connection, points=2000, log=True)
    assert found["x"][:100] == points.steps[:100].tolist()
    assert len(found["x"]) <= 2000
    assert found["x"] == sorted(set(found["x"]))
    assert max(found["y"]) == pytest.approx(points.numbers.max(), rel=1e-6)


def test_a_series_that_is_not_sampled_holds_what_was_recorded(store: Any) -> None:
    connection, add = store
    numbers = np.array([100_000.0625, 1 / 3, 5_368_709_121.0, np.nan, -1e-300])
    steps = np.arange(100_000, 100_005)
    add(Points(steps, numbers, steps.astype(np.float64)))
    found = chart(connection, points=100)
    assert found["x"] == steps.tolist()
    assert found["y"] == [100_000.0625, 1 / 3, 5_368_709_121.0, None, -1e-300]
    assert not found["sampled"]
