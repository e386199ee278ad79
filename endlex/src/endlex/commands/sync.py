"""`endlex sync`: send run directories in the foreground, until the server has all of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from endlex.client.sync import sync_directory
from endlex.client.verify import require_all_sent
from endlex.commands.rendering import ProgressLine, format_bytes
from endlex.commands.targets import find_server, local_runs
from endlex.protocol import EndlexError


def sync(directories: Sequence[str], drop_failed: bool, resend: bool, url: str | None) -> int:
    """Send every directory, by default every run of this machine.

    One that cannot be sent does not keep the others back.
    """
    known = local_runs(directories)
    todo = list(known.found)
    if not directories:
        print(known)
    server = find_server(url)
    server.get("/health")  # a wrong address is told at once; later faults are waited out
    transport = server.transport
    line = ProgressLine()
    failed = 0
    for number, directory in enumerate(todo, 1):
        place = f"[{number}/{len(todo)}] {directory}" if len(todo) > 1 else str(directory)

        def show(what: str, done: int, total: int, place: str = place) -> None:
            line.show(f"{place}: {what} {format_bytes(done)} of {format_bytes(total)}")

        try:
            sent = sync_directory(
                directory, transport, show, drop_failed=drop_failed, resend=resend
            )
            require_all_sent(directory, transport, sent)
        except KeyboardInterrupt:
            line.clear()
            again = " ".join(shlex.quote(str(left)) for left in todo[number - 1 :])
            print(f"stopped; what was sent stays sent. To go on: endlex sync {again}")
            return 130
        except (EndlexError, OSError) as error:
            line.clear()
            print(f"{place}: not all sent: {error}")
            failed += 1
        else:
            line.clear()
            print(f"{place}: all on {transport.url}")
    return 1 if failed or known.unreadable else 0
