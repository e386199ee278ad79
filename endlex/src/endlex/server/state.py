"""Everything that one running server holds, passed to the routes that use it.

What would hold up the event loop runs in threads, in pools that cannot starve another: a dozen
uploads cannot keep a chart waiting. Writing to the database has its own thread, in `database`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from sqlite3 import Connection
from typing import Annotated, Concatenate, ParamSpec, TypeVar

from fastapi import Depends, Request

from endlex.server.api.auth import Auth
from endlex.server.events import Hub
from endlex.server.settings import DataDir, Settings
from endlex.server.store.blobs import Blobs
from endlex.server.store.checkpoints import Checkpoints
from endlex.server.store.database import Database, Pool
from endlex.server.watch.alerts import Watch
from endlex.server.watch.notify import Notifier

P = ParamSpec("P")
T = TypeVar("T")


class Server:
    """The parts of a server on a data directory, which is made if missing; `close` ends them."""

    def __init__(self, data: DataDir, settings: Settings, hub: Hub) -> None:
        data.create()
        self.settings, self.data, self.hub = settings, data, hub
        self.read = Pool(4, "endlex-read")
        """Runs reads of the database."""
        self.file = Pool(4, "endlex-file")
        """Runs reads and writes of files."""
        self.batch = Pool(2, "endlex-batch")
        """Decodes incoming batches."""
        self.quick = Pool(1, "endlex-quick")
        """Answers questions of a millisecond at most, which must not wait behind a long read."""
        self.database, self.watch = Database(data.database), Watch(settings, data)
        self.auth = Auth(settings, self.database, self.quick)
        self.blobs = Blobs(settings, data, self.file)
        self.checkpoints = Checkpoints(self.database, self.blobs, self.hub)
        self.notifier = Notifier(settings, self.database)

    async def ask(
        self, question: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return the answer to a question about one state of the database, read in a thread."""
        return await self.read(self.database.ask, lambda db: question(db, *args, **kwargs))

    async def write(
        self, job: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run what changes the database, and return its result once that is on the disk."""
        return await asyncio.wrap_future(self.database.write(lambda db: job(db, *args, **kwargs)))

    def close(self) -> None:
        """Finish what has begun and accept nothing more."""
        self.hub.stop()
        self.checkpoints.stop()
        self.notifier.stop()
        for pool in (self.read, self.file, self.batch, self.quick):
            pool.shutdown(wait=True, cancel_futures=True)
        self.database.close()


async def server_of(request: Request) -> Server:
    """Return the server that a request came to."""
    server: Server = request.app.state.server
    return server


Here = Annotated[Server, Depends(server_of)]
"""The parameter of a route that is the server."""
