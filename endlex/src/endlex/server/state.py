"""Everything that one running server holds, passed to the routes that use it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from endlex.server.api.auth import Auth
from endlex.server.api.ingest import Ingest
from endlex.server.events import Hub
from endlex.server.settings import DataDir, Settings
from endlex.server.store.blobs import Blobs
from endlex.server.store.checkpoints import Checkpoints
from endlex.server.store.database import Database
from endlex.server.store.journals import JournalHashes
from endlex.server.store.verification import Verifier
from endlex.server.watch.alerts import Watch
from endlex.server.watch.notify import Notifier
from endlex.server.workers import Workers

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """The parts, built once; `open_server` makes them and `close` ends them."""

    settings: Settings
    data: DataDir
    database: Database
    workers: Workers
    hub: Hub
    watch: Watch
    ingest: Ingest
    hashes: JournalHashes
    auth: Auth
    blobs: Blobs
    verifier: Verifier
    checkpoints: Checkpoints
    notifier: Notifier

    async def ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Return the answer to a question about one state of the database, read in a thread."""

        def read() -> T:
            with self.database.snapshot() as connection:
                return question(connection)

        return await self.workers.read(read)

    def close(self) -> None:
        """Finish what was begun; nothing is taken in any more."""
        self.hub.stop()
        self.verifier.stop()
        self.notifier.stop()
        self.workers.close()
        self.database.close()


def open_server(data: DataDir, settings: Settings) -> Server:
    """Open the data directory, made if missing, and build the parts.

    Raises:
        EndlexError: the database is a later version's.
        OSError, sqlite3.Error: the directory cannot be used.
    """
    data.create()
    database = Database(data.database)
    workers, hub, watch = Workers(), Hub(), Watch(settings, data)
    blobs = Blobs(settings, data, workers)
    verifier = Verifier(database, blobs, hub)
    verifier.start()
    notifier = Notifier(settings, database)
    notifier.start()
    return Server(
        settings=settings,
        data=data,
        database=database,
        workers=workers,
        hub=hub,
        watch=watch,
        ingest=Ingest(settings, data, database, workers, hub, watch),
        hashes=JournalHashes(database),
        auth=Auth(settings, database, workers),
        blobs=blobs,
        verifier=verifier,
        checkpoints=Checkpoints(database, blobs, verifier),
        notifier=notifier,
    )


def server_of(request: Request) -> Server:
    """Return the server that a request came to."""
    server: Server = request.app.state.server
    return server
