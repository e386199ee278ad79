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
        optim = {"lr": (i + 1) / 10, "kind": "adam" if i % 2 else "muon"}
        config = {"optim": optim, "lr": 10 if i == 0 else 20, "fused": bool(i % 2), "depth": 12}
        config["clip"] = "Infinity" if i == 0 else 1.0
        facts = {"name": name, "project": project, "config": config, "time": 1.7e9 + i}
        box.begin(**facts, tags=[f"t{i}", "all"], group=f"g{i}")
        box.send([box.metrics(0, {"val/bpb": 1.0 - i / 10, "lr": i})])
        if i == 0:
            box.send([box.metrics(1, {"top": "NaN"})])
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
        ("%", []),
        ("-tag:t1", ["gamma", "alpha"]),
        ("alpha OR tag:t2", ["gamma", "alpha"]),
        ("val/bpb < 0.95 OR lr = 0", ["gamma", "beta", "alpha"]),
        ("name:*a group:g*", ["gamma", "beta", "alpha"]),
        ("optim.lr >= 0.2", ["gamma", "beta"]),
        ("config.lr = 10", ["alpha"]),
        ("optim.kind = muon", ["gamma", "alpha"]),
        ("optim.kind != MUON", ["beta"]),
        ("fused = true", ["beta"]),
        ("-min:val/bpb < 0.95", ["alpha"]),
        ("val/* < 0.85", ["gamma"]),
        ("top = NaN", ["alpha"]),
        ('"alp ha"', []),
    ],
)
def test_search(three: Any, q: str, expected: list[str]) -> None:
    assert names(three, q=q) == expected


def test_a_name_that_no_run_has_is_told_with_the_nearest(three: Any) -> None:
    for wrong in ({"q": "val/bbp < 1"}, {"sort": "-val/bbp"}):
        answer = three.get("/api/v1/runs", params=wrong)
        assert (answer.status_code, "did you mean val/bpb" in answer.json()["error"]) == (422, True)


def test_columns_are_figures_of_metrics_and_keys_of_the_configuration(three: Any) -> None:
    columns = [
        "val/bpb",
        "max:val/bpb",
        "lr",
        "config.lr",
        "optim.kind",
        "top",
        "clip",
        "nothing",
        "status",
    ]
    found = three.get("/api/v1/runs", params={"column": columns, "sort": "name"}).json()
    assert "summary" not in found["runs"][0]
    alpha = {"val/bpb": 1.0, "max:val/bpb": 1.0, "lr": 0, "config.lr": 10}
    assert found["runs"][0]["values"] == {
        **alpha,
        "optim.kind": "muon",
        "top": "NaN",
        "clip": "Infinity",
    }
    named = three.get("/api/v1/runs", params={"names": True, "q": "tag:t0 OR tag:t1"}).json()
    assert named["metrics"] == [["lr", 2], ["top", 1], ["val/bpb", 2]]
    differing = [key for key, _, different in named["config"] if different > 1]
    assert differing == ["clip", "fused", "lr", "optim.kind", "optim.lr"]
    assert ["depth", 2, 1] in named["config"]
    ids = three.get("/api/v1/runs", params={"ids": "run00000x,run00002x"}).json()
    assert [run["name"] for run in ids["runs"]] == ["gamma", "alpha"]


def test_many_runs_are_changed_at_once_or_none(three: Any) -> None:
    ids = ["run00000x", "run00001x"]
    changes = {"add_tags": ["new"], "remove_tags": ["all"], "group": "g", "color": "#102030"}
    answer = three.patch("/api/v1/runs", json={"runs": ids, "changes": changes})
    assert answer.json() == {"changed": ids}
    shown = three.get("/api/v1/runs/run00001x").json()
    assert (shown["tags"], shown["group"], shown["color"]) == (["t1", "new"], "g", "#102030")
    wrong = {"runs": [*ids, "unknown000"], "changes": {"group": "other"}}
    assert three.patch("/api/v1/runs", json=wrong).status_code == 404
    assert three.get("/api/v1/runs/run00001x").json()["group"] == "g"
    for bad in ({"color": "red"}, {"add_tags": "x"}, {"add_tags": [str(n) for n in range(60)]}):
        assert three.patch("/api/v1/runs", json={"runs": ids, "changes": bad}).status_code == 422


def test_settings_are_saved_by_project(three: Any) -> None:
    place = {"project": "a/b", "kind": "view", "name": "best first"}
    assert three.put("/api/v1/settings", params=place, json={"sort": "x"}).status_code == 200
    three.put("/api/v1/settings", params=place, json={"sort": "y"})
    saved = three.get("/api/v1/settings", params={"project": "a/b"}).json()
    assert saved == {"view": {"best first": {"sort": "y"}}, "panels": {}, "rules": {}}
    assert three.get("/api/v1/settings").json()["view"] == {}
    three.delete("/api/v1/settings", params=place)
    assert three.get("/api/v1/settings", params={"project": "a/b"}).json()["view"] == {}
    wrong = [{"kind": "other"}, {"name": ""}, {"project": "a\nb"}]
    for change in wrong:
        answer = three.put("/api/v1/settings", params={**place, **change}, json={})
        assert answer.status_code == 422, change
    big = {"x": "x" * 300_000}
    assert three.put("/api/v1/settings", params=place, json=big).status_code == 422


def test_sorting_and_pages(three: Any) -> None:
    assert names(three, sort="optim.lr") == ["alpha", "beta", "gamma"]
    assert names(three, sort="-max:val/bpb") == ["alpha", "beta", "gamma"]
    assert names(three, sort="top") == ["gamma", "beta", "alpha"]
    three.patch("/api/v1/runs/run00000x", json={"name": "d12"})
    three.patch("/api/v1/runs/run00001x", json={"name": "d8"})
    assert names(three, sort="name") == ["d8", "d12", "gamma"]
    three.patch("/api/v1/runs/run00000x", json={"name": "alpha"})
    three.patch("/api/v1/runs/run00001x", json={"name": "beta"})
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
    retention.sweep(server.database, server.blobs)
    assert names(three, deleted="true") == ["beta"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + retention.UNDO_SECONDS + 1)
    retention.sweep(server.database, server.blobs)
    assert names(three, deleted="any") == ["gamma", "alpha"]
    reader = server.database.reader()
    for table, left in (
        ("session", 2),
        ("segment", 2),
        ("series", 5),
        ("chunk", 5),
        ("peak", 5),
        ("metric", 5),
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
    assert rows[0] == ["metric", "step", "time", "value"]
    assert [row[1::2] for row in rows[1:5]] == [[str(s), str(s / 3)] for s in range(4)]
    assert rows[5] == ["system/cpu", "0", "1700000000.0", "50.0"]
    assert rows[6] == ["val", "2", "1700000002.0", "NaN"]
    one = box.client.get(url, params={"metric": "val"}).text
    assert one.splitlines()[1:] == ["val,2,1700000002.0,NaN"]
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
