"""`endlex token`: make, list and revoke tokens in a server's data directory.

Whoever may write that directory owns the server, so these commands work on its files, on its
machine; a running server sees the change at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from endlex.commands.rendering import count, format_age, print_json, render_table
from endlex.commands.serve import data_directory, import_server
from endlex.commands.usage import UsageError

SCOPES = ("write", "checkpoint", "read")


def create(name: str, scope: str, data: Path | None) -> int:
    """Make a token and print it; it cannot be shown again."""
    scopes = list(dict.fromkeys(part.strip() for part in scope.split(",") if part.strip()))
    unknown = [part for part in scopes if part not in SCOPES]
    if unknown or not scopes:
        raise UsageError(f"--scope {scope!r} has no such scope: give some of {','.join(SCOPES)}")
    secret = import_server("auth").create_token(data_directory(data), name, scopes)
    print(secret)
    return 0


def list_all(data: Path | None, as_json: bool) -> int:
    """Print what tokens there are: names, scopes, when they were made and last used."""
    infos = import_server("auth").list_tokens(data_directory(data))
    tokens: list[dict[str, Any]] = [info.as_json() for info in infos]
    if as_json:
        print_json(tokens)
    elif tokens:
        rows = [
            [
                *(t["id"], t["name"], ",".join(t["scopes"]), format_age(t["created"])),
                *(format_age(t["last_used"]) or "never", format_age(t["revoked"])),
            ]
            for t in tokens
        ]
        print(render_table(["ID", "NAME", "SCOPES", "MADE", "LAST USED", "REVOKED"], rows))
    else:
        print("no tokens: `endlex token create --name BOX --scope write,checkpoint` makes one")
    return 0


def revoke(token: str, data: Path | None) -> int:
    """Make a token worthless from now on."""
    key = int(token) if token.isdecimal() else token
    revoked = import_server("auth").revoke_token(data_directory(data), key)
    print(f"revoked {count(revoked, 'token')}")
    return 0
