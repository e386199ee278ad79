"""trackio's SQLite and neptune-exporter's Parquet, in files made here as those tools write them."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from endlex.importers import neptune, trackio
from endlex.importers.trackio import import_trackio
from endlex.protocol import EndlexError
from endlex.reading import read_run, summarize

TRACKIO = """
CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL,
    timestamp TEXT NOT NULL, run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL);
CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL,
    run_name TEXT NOT NULL, config TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE TABLE system_metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL,
    timestamp TEXT NOT NULL, run_name TEXT NOT NULL, metrics TEXT NOT NULL);
"""


def of_type(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_run(directory) if record["type"] == kind]


def test_each_run_of_a_trackio_database(tmp_path: Path) -> None:
    path = tmp_path / "toy.db"
    media = {"_type": "trackio.image", "file_path": "toy/a/3/x.png", "caption": "c"}
    rows = [
        ("run1", "a", 0, '{"loss":1.0,"bad":"NaN"}'),
        ("run1", "a", 1, b'{"loss":0.5,"nest":{"x":2},"flag":true,"note":"hi"}'),
        ("run2", "b", 0, '{"loss":3.0}'),
        ("run1", "a", 2, "not json"),
        (
            "run1",
            "a",
            3,
            json.dumps(
                {
                    "img": media,
                    "gone": {"_type": "trackio.video", "file_path": "../../secret"},
                    "no name": {"_type": "trackio.video", "file_path": "toy/\0"},
                    "long": {"_type": "trackio.video", "file_path": "x" * 5000},
                    "h": {"_type": "trackio.histogram", "bins": [0, 1, 2], "values": [3, 4]},
                    "t": {"_type": "trackio.table", "_value": [{"q": "x", "a": 1}]},
                    "no table": {"_type": "trackio.table", "_value": [1]},
                    "no rows": {"_type": "trackio.table", "_value": ["x"]},
                }
            ),
        ),
    ]
    time = "2026-11-27T10:00:00+00:00"
    with sqlite3.connect(path) as database:
        database.executescript(TRACKIO)
        database.executemany(
            "INSERT INTO metrics (run_id, run_name, step, metrics, timestamp) VALUES (?,?,?,?,?)",
            [(*row, time) for row in rows],
        )
        database.execute(
            "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?,?,?,?)",
            ("run1", "a", '{"depth":12,"_Group":"g","_Username":"me"}', time),
        )
        database.execute(
            "INSERT INTO system_metrics (run_id, run_name, metrics, timestamp) VALUES (?,?,?,?)",
            ("run1", "a", '{"cpu":50.0}', "2026-11-27T10:00:10+00:00"),
        )
    image = tmp_path / "media" / "toy" / "a" / "3" / "x.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"\x89PNG")
    ((_, import_found),) = trackio.find_runs(tmp_path, tmp_path / "out", None)
    both: Any = import_found()
    first, second = both
    run = summarize(first.directory)
    assert (run["project"], run["name"], run["group"], run["config"]) == (
        "toy",
        "a",
        "g",
        {"depth": 12},
    )
    expected = {"loss": 0.5, "nest/x": 2.0, "flag": 1.0, "bad": "NaN", "system/cpu": 50.0}
    assert run["summary"] == expected
    assert run["texts"] == ["note"]
    tables = of_type(first.directory, "table")
    assert [t["rows"] for t in tables] == [[[0, 1, 3], [1, 2, 4]], [["x", 1]]]
    (picture,) = of_type(first.directory, "media")
    assert (picture["name"], picture["caption"]) == ("img", "c")
    assert first.skipped == {"damaged row": 1, "video": 3, "table": 2}
    assert summarize(second.directory)["summary"] == {"loss": 3.0}
    with pytest.raises(EndlexError, match="no database of trackio"):
        import_trackio(image, tmp_path / "out")


@pytest.mark.parametrize(("kind", "run"), [("TEXT", None), ("INTEGER", 7), ("", 7)])
def test_a_trackio_run_may_be_named_by_a_number_or_by_nothing(
    tmp_path: Path, kind: str, run: int | None
) -> None:
    time = "2026-11-27T10:00:00+00:00"
    rows = [(run, time, "a", 0, '{"loss":2.0}'), ("b", time, "b", 0, "damaged")]
    with sqlite3.connect(tmp_path / "toy.db") as database:
        columns = f"run_id {kind}, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT"
        database.execute(f"CREATE TABLE metrics (id INTEGER PRIMARY KEY, {columns})")
        database.executemany("INSERT INTO metrics VALUES (NULL, ?, ?, ?, ?, ?)", rows)
    whole, damaged = import_trackio(tmp_path / "toy.db", tmp_path / "out")
    found = summarize(whole.directory)
    assert (found["name"], found["summary"]) == ("a", {"loss": 2.0})
    assert summarize(damaged.directory)["name"] == "b"
    assert (damaged.counts, damaged.skipped) == ({}, {"damaged row": 1})


def test_the_parts_of_a_neptune_run(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    blank = dict.fromkeys(
        ("step", "timestamp", "float_value", "int_value", "string_value", "string_set_value")
    )

    def row(path: str, kind: str, **values: Any) -> dict[str, Any]:
        ids = {"project_id": "me/toy", "run_id": "RUN-1"}
        head = {"attribute_path": path, "attribute_type": kind}
        return ids | head | blank | {"histogram_value": None, "file_value": None} | values

    rows = [
        row("sys/name", "string", string_value="d12"),
        row("sys/tags", "string_set", string_set_value=["a"]),
        row("params/depth", "int", int_value=12),
        *(
            row(
                "loss", "float_series", step=Decimal(n), timestamp=moment, float_value=1.0 / (n + 1)
            )
            for n in range(3)
        ),
        row("loss", "float_series", step=Decimal("3.5"), timestamp=moment, float_value=1.0),
        row("log", "string_series", step=Decimal(1), timestamp=moment, string_value="hi"),
        row(
            "h",
            "histogram_series",
            step=Decimal(1),
            timestamp=moment,
            histogram_value={"type": "COUNTING", "edges": [0.0, 1.0], "values": [5.0]},
        ),
        row("pic", "file", file_value={"path": "toy/pic.png"}),
        row("gone", "file", file_value={"path": "../../secret"}),
    ]
    data = tmp_path / "exports" / "data" / "toy"
    data.mkdir(parents=True)
    for number, part in enumerate((rows[:6], rows[6:])):
        schema = pa.Table.from_pylist(rows).schema
        pq.write_table(pa.Table.from_pylist(part, schema), data / f"RUN-1_part_{number}.parquet")
    picture = tmp_path / "exports" / "files" / "toy" / "pic.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"\x89PNG")
    ((_, import_found),) = neptune.find_runs(tmp_path / "exports", tmp_path / "out", None)
    imported: Any = import_found()
    run = summarize(imported.directory)
    assert (run["project"], run["name"], run["tags"]) == (
        "me/toy",
        "d12",
        ["a", "imported:neptune"],
    )
    assert run["config"] == {"params/depth": 12}
    assert [(m["name"], m["count"], m["last_step"]) for m in run["metrics"]] == [("loss", 3, 2)]
    assert [t["rows"] for t in of_type(imported.directory, "table")] == [[[0.0, 1.0, 5.0]]]
    assert [m["name"] for m in of_type(imported.directory, "media")] == ["pic"]
    assert imported.skipped == {"step that is not whole": 1, "file that is not here": 1}


def test_long_names_stay_apart(tmp_path: Path) -> None:
    from endlex.client.journal import tidy_name

    first, second = (tidy_name("x" * 300 + end, "") for end in "ab")
    assert len({first, second, "x" * 200}) == 3
    assert len(first) == len(second) == 200
