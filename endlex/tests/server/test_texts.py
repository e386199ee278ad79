"""Texts and tables in pages."""

from __future__ import annotations

from typing import Any

RUN = "testrun001"


def test_texts_and_tables_come_newest_first_in_whole_steps(run: Any) -> None:
    for step in (1, 2, 3):
        for name in ("a", "b"):
            head = {"time": 1.0, "step": step, "name": name}
            text = {"type": "text", **head, "text": f"{name}{step}"}
            run.send([text, {"type": "table", **head, "columns": ["x"], "rows": [[step]]}])
    again = {"type": "text", "time": 2.0, "step": 3, "name": "a", "text": "replaced"}
    run.send([again])
    url = f"/api/v1/runs/{RUN}/texts"
    texts = run.client.get(url, params={"limit": 1}).json()["texts"]
    assert [t["text"] for t in texts] == ["replaced", "b3"]
    older = run.client.get(url, params={"before_step": 3, "name": "a"}).json()["texts"]
    assert [t["text"] for t in older] == ["a2", "a1"]
    run.send([{"type": "text", "time": 3.0, "step": 0, "name": "a", "text": "late"}])
    after = {"after_id": texts[1]["id"]}
    later = run.client.get(url, params=after).json()["texts"]
    assert [t["text"] for t in later] == ["replaced", "late"]
    tables = run.client.get(f"/api/v1/runs/{RUN}/tables", params={"name": "b"}).json()["tables"]
    assert [t["rows"] for t in tables] == [[[3]], [[2]], [[1]]]
    assert tables[0]["columns"] == ["x"]
