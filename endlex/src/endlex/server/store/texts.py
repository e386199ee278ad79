"""Texts, tables and media of a run: latest steps first, in pages.

The content of media (pictures, sound, video, other files) is parts like those of checkpoints' files
(`blobs`), and as safe from removal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sqlite3 import Connection
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field

from endlex.protocol import CHECKPOINT, MAX_STEP, MEDIA, TABLE, TEXT
from endlex.server.errors import ApiError
from endlex.server.store.database import insert

OWN_PREFIX = "run/"
Kind = Literal["texts", "tables", "media"]
Record = dict[str, Any]

KINDS: dict[Kind, tuple[str, str]] = {
    "texts": ("text", "json_object('text', text, 'id', pk)"),
    "tables": ("data_table", "content"),
    "media": ("media", "json_set(content, '$.id', pk)"),
}
"""The table of each kind, and the JSON object that a record is besides name, step and time."""
CONTENTS = {
    TABLE: ("data_table", ("columns", "rows")),
    MEDIA: ("media", ("kind", "mime", "bytes", "caption", "parts")),
}
"""The table and the keys of records whose content is stored as JSON."""


class Page(BaseModel, frozen=True):
    """Selects records: `limit` of the latest steps, optionally of one name and below a step.

    A step comes whole, even beyond `limit`; the next page continues below it.
    """

    name: str | None = None
    before_step: Annotated[int, Field(ge=0, le=MAX_STEP + 1)] | None = None
    after_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Only records that arrived after this one, whatever their steps."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    own: bool = False
    """Whether to include those that Endlex records itself, such as what a run printed."""


def list_records(db: Connection, kind: Kind, run: int, page: Page) -> list[Record]:
    """Return a page of texts, tables or media; of two under one name and step the later one."""
    table, content = KINDS[kind]
    bounds = {"name = ?": page.name, "step < ?": page.before_step, "pk > ?": page.after_id}
    given = {"run = ?": run, **{key: bound for key, bound in bounds.items() if bound is not None}}
    where, values = " AND ".join(given), list(given.values())
    if page.name is None and not page.own:
        where += f" AND name NOT LIKE '{OWN_PREFIX}%'"
    chosen = f"SELECT max(pk) FROM {table} WHERE {where} GROUP BY name, step"
    lowest = f"SELECT step FROM {table} WHERE pk IN ({chosen}) ORDER BY step DESC LIMIT ?"
    rows = db.execute(
        f"SELECT name, step, time, {content} FROM {table} WHERE pk IN ({chosen}) "
        f"AND step >= (SELECT min(step) FROM ({lowest})) ORDER BY step DESC, name",
        [*values, *values, page.limit],
    )
    return [{"name": n, "step": s, "time": t, **orjson.loads(more)} for n, s, t, more in rows]


def store_records(db: Connection, run: int, records: Mapping[str, Sequence[Record]]) -> None:
    """Keep a batch's texts, tables, media and checkpoints, and that parts of media are used."""
    db.executemany(
        "INSERT INTO text (run, name, step, time, text) VALUES (?, ?, ?, ?, ?)",
        [(run, r["name"], r["step"], r["time"], r["text"]) for r in records[TEXT]],
    )
    for kind, (table, keys) in CONTENTS.items():
        for record in records[kind]:
            about = {key: record[key] for key in ("name", "step", "time")}
            insert(db, table, run=run, content={key: record.get(key) for key in keys}, **about)
    db.executemany(
        "INSERT OR IGNORE INTO media_part VALUES (?, ?, ?)",
        [(part["sha256"], run, part["bytes"]) for r in records[MEDIA] for part in r["parts"]],
    )
    for record in records[CHECKPOINT]:
        about = {"name": record["name"], "step": record["step"], "created": record["time"]}
        about["bytes"] = sum(file["bytes"] for file in record["files"])
        about["aliases"] = record.get("aliases") or []
        about["metadata"] = record.get("metadata") or {}
        insert(db, "checkpoint", "INSERT OR IGNORE", run=run, state="announced", **about)


def find_media(db: Connection, run: int, pk: int) -> Record:
    """Return one record of media; an unknown one is an `ApiError` 404."""
    row = db.execute("SELECT content FROM media WHERE pk=? AND run=?", (pk, run)).fetchone()
    if row is None:
        raise ApiError(404, f"the run has no file {pk}: GET .../media lists them")
    return dict(orjson.loads(row[0]))
