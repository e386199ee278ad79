"""Lists, searches, changes and exports of runs."""

from __future__ import annotations

import csv
import io
import time
from typing import Any

import pyarrow.parquet as pq
import pytest

from endlex.server.store import retention

RUN = "testrun001"


def names(client: Any, **query: Any) -> list[str]:
    answer = client.get("/api/v1/runs", params=query)
    assert answer.status_code == 200, answer.text
    return [run["name"] for run in answer.json()["runs"]]


@pytest.fixture
def three(client: Any, make_box: Any) -> Any:
    """Runs alpha, beta and gamma, from the oldest."""
    for i, name in enumerate(["alpha", "beta", "gamma"]):
        box = make_box(client, run=f"run0000{i}x")
        project = "odd" if i % 2 else "even"
        box.begin(name=name, project=project, tags=[f"t{i}", "all"], group=f"g{i}", time=1.7e9 + i)
        box.send([box.metrics(0, {"val/bpb": 1.0 - i / 10, "lr": i})])
    return client


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        ("", ["gamma", "beta", "alpha"]),
        ("ALPHA", ["alpha"]),
        ("a tag:all", ["gamma", "beta", "alpha"]),
        ("tag:t1", ["beta"]),
        ("tag:T1", ["beta"]),
        ("tag:t", []),
        ("project:even", ["gamma", "alpha"]),
        ("group:g2", ["gamma"]),
        ("status:running", ["gamma", "beta", "alpha"]),
        ("val/bpb<0.95", ["gamma", "beta"]),
        ("val/bpb<=0.9", ["gamma", "beta"]),
        ("val/bpb>0.8 val/bpb<1", ["beta"]),
        ("lr=1", ["beta"]),
        ("lr!=1", ["gamma", "alpha"]),
        ("unknown>0", []),
        ("%", []),
        ('"alp ha"', []),
    ],
)
def test_search(three: Any, q: str, expected: list[str]) -> None:
    assert names(three, q=q) == expected


def test_sorting_and_pages(three: Any) -> None:
    assert names(three, sort="name") == ["alpha", "beta", "gamma"]
    assert names(three, sort="-val/bpb") == ["alpha", "beta", "gamma"]
    assert names(three, sort="val/bpb") == ["gamma", "beta", "alpha"]
    assert names(three, sort="name", limit=1, offset=1) == ["beta"]
    assert three.get("/api/v1/runs?limit=1").json()["total"] == 3
    assert names(three, project="odd") == ["beta"]
    assert names(three, group="g0") == ["alpha"]


def test_a_run_can_be_changed_archived_and_deleted_with_undo(three: Any) -> None:
    url = "/api/v1/runs/run00001x"
    changed = {"name": "new", "tags": ["x", "x", "y"], "group": None, "notes": "why"}
    answer = three.patch(url, json=changed).json()
    assert (answer["name"], answer["tags"], answer["group"]) == ("new", ["x", "y"], None)
    three.patch(url, json={"archived": True})
    assert names(three) == ["gamma", "alpha"]
    assert names(three, archived="true") == ["new"]
    assert names(three, archived="any") == ["gamma", "new", "alpha"]
    three.patch(url, json={"archived": False, "deleted": True})
    assert names(three) == ["gamma", "alpha"]
    assert names(three, deleted="true") == ["new"]
    three.patch(url, json={"deleted": False})
    assert names(three) == ["gamma", "new", "alpha"]
    for wrong in ({}, {"id": "x"}, {"name": ""}, {"tags": "x"}, {"tags": [1]}, {"archived": 1}):
        assert three.patch(url, json=wrong).status_code == 422
    assert three.patch("/api/v1/runs/unknown000", json={"name": "x"}).status_code == 404


def test_a_deleted_run_goes_for_good_after_a_week(
    three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = three.app.state.server
    three.patch("/api/v1/runs/run00001x", json={"deleted": True})
    retention.sweep(server.database, server.hashes, server.blobs)
    assert names(three, deleted="true") == ["beta"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + retention.UNDO_SECONDS + 1)
    retention.sweep(server.database, server.hashes, server.blobs)
    assert names(three, deleted="any") == ["gamma", "alpha"]
    reader = server.database.reader()
    for table, left in (
        ("session", 2),
        ("segment", 2),
        ("series", 4),
        ("chunk", 4),
        ("peak", 4),
        ("metric", 4),
    ):
        assert reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == left, table


def test_pruning_can_take_deleted_runs_at_once(three: Any) -> None:
    three.patch("/api/v1/runs/run00001x", json={"deleted": True})
    plan = three.post("/api/v1/prune", json={"deleted": True, "dry_run": True}).json()
    assert [run["run"] for run in plan["removed"]] == ["run00001x"]
    assert names(three, deleted="true") == ["beta"]
    three.post("/api/v1/prune", json={"deleted": True})
    assert names(three, deleted="any") == ["gamma", "alpha"]


def test_a_run_whole(box: Any, make_box: Any) -> None:
    box.begin(config={"lr": 0.1, "deep": {"x": [1]}})
    box.send(
        [
            box.metrics(3, {"loss": 2.0}),
            {
                "type": "checkpoint",
                "time": 5.0,
                "step": 3,
                "name": "step-3",
                "files": [{"path": "f", "bytes": 7}],
                "aliases": ["last"],
                "metadata": {},
            },
        ]
    )
    later = make_box(box.client, session="000002-later")
    later.begin(config={"lr": 0.2})
    machine = make_box(box.client, session="000003-system")
    machine.begin(kind="system", config={"ignored": True})
    whole = box.client.get(f"/api/v1/runs/{RUN}").json()
    assert whole["config"] == {"lr": 0.2, "deep": {"x": [1]}}
    assert [s["kind"] for s in whole["sessions"]] == ["trainer", "trainer", "system"]
    assert whole["metrics"] == [
        {"name": "loss", "count": 1, "last": 2.0, "min": 2.0, "max": 2.0, "last_step": 3}
    ]
    assert [(c["name"], c["state"], c["bytes"]) for c in whole["checkpoints"]] == [
        ("step-3", "announced", 7)
    ]
    assert box.client.get(f"/api/v1/runs/{RUN}/checkpoints/step-3").status_code == 404


def test_exports_hold_every_point(box: Any, make_box: Any, tmp_path: Any) -> None:
    box.begin()
    box.send(
        [box.metrics(s, {"loss": s / 3, **({"val": "NaN"} if s == 2 else {})}) for s in range(4)]
    )
    machine = make_box(box.client, session="000002-system")
    machine.begin(kind="system")
    machine.send([machine.metrics(0, {"system/cpu": 50.0})])
    url = f"/api/v1/runs/{RUN}/export"
    rows = list(csv.reader(io.StringIO(box.client.get(url).text)))
    assert rows[0] == ["step", "time", "loss", "val", "system/cpu"]
    assert [float(row[2]) for row in rows[1:5]] == [0, 1 / 3, 2 / 3, 1]
    assert [row[3] for row in rows[1:5]] == ["", "", "NaN", ""]
    assert rows[5] == ["0", "1700000000.0", "", "", "50.0"]
    whole = box.client.get(url, params={"format": "json"}).json()
    assert whole["series"]["loss"]["value"] == [0, 1 / 3, 2 / 3, 1]
    assert whole["series"]["val"] == {"step": [2], "time": [1_700_000_002.0], "value": ["NaN"]}
    assert whole["config"] == {"lr": 0.1}
    path = tmp_path / "run.parquet"
    path.write_bytes(box.client.get(url, params={"format": "parquet"}).content)
    table = pq.read_table(path).to_pydict()
    assert table["metric"] == ["loss"] * 4 + ["system/cpu", "val"]
    assert table["value"][:4] == [0, 1 / 3, 2 / 3, 1]
    assert not list((box.client.app.state.data.partial).iterdir())
    assert box.client.get("/api/v1/runs/unknown000/export").status_code == 404


def test_a_configuration_that_changes_is_shown_as_it_is_now(run: Any) -> None:
    head = {"type": "config", "session": run.session, "seq": 1, "time": 1.7e9}
    run.send([head | {"config": {"lr": 0.2, "depth": 4}}, head | {"config": "none"}])
    shown = run.client.get(f"/api/v1/runs/{run.run}").json()
    assert shown["config"] == {"lr": 0.2, "depth": 4}
    assert shown["sessions"][0]["damaged_lines"] == 1
