"""`endlex token`: make, list and revoke tokens in a server's data directory.

Whoever may write that directory owns the server, so these commands work on its files, on its
machine; a running server sees the change at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endlex.commands.rendering import count, format_age, print_json, render_table
from endlex.commands.serve import data_directory, import_server
from endlex.protocol import SCOPES, UsageError


def create(name: str, scope: str, run: Sequence[str], data: Path | None) -> int:
    """Make a token and print it; it cannot be shown again."""
    scopes = list(dict.fromkeys(part.strip() for part in scope.split(",") if part.strip()))
    unknown = [part for part in scopes if part not in SCOPES]
    if unknown or not scopes:
        raise UsageError(f"--scope {scope!r} has no such scope: give some of {','.join(SCOPES)}")
    secret = import_server("api.auth").create_token(data_directory(data), name, scopes, run)
    print(secret)
    return 0


def grant(token: str, runs: Sequence[str], data: Path | None) -> int:
    """Make runs a token's own."""
    key = int(token) if token.isdecimal() else token
    import_server("api.auth").grant_runs(data_directory(data), key, list(runs))
    print(f"token {token} may add to {count(len(runs), 'more run')}")
    return 0


def list_all(data: Path | None, as_json: bool) -> int:
    """Print what tokens there are: names, scopes, own runs, when they were made and last used."""
    infos = import_server("api.auth").list_tokens(data_directory(data))
    tokens: list[dict[str, Any]] = [info.as_json() for info in infos]
    if as_json:
        print_json(tokens)
    elif tokens:
        rows = [
            [
                *(
                    t["id"],
                    t["name"],
                    ",".join(t["scopes"]),
                    _own_runs(t),
                    format_age(t["created"]),
                ),
                *(format_age(t["last_used"]) or "never", format_age(t["revoked"])),
            ]
            for t in tokens
        ]
        print(
            render_table(["ID", "NAME", "SCOPES", "OWN RUNS", "MADE", "LAST USED", "REVOKED"], rows)
        )
        if any(t["older_runs"] for t in tokens):
            print(
                "Tokens made before Endlex had the scopes annotate and manage keep their scopes, "
                "which now only add: none of them deletes, prunes, renames, tags or archives."
            )
    else:
        print("no tokens: `endlex token create --name BOX --scope write,checkpoint` makes one")
    return 0


def _own_runs(token: dict[str, Any]) -> str:
    if not {"write", "checkpoint"} & {*token["scopes"]}:
        return ""
    if "manage" in token["scopes"]:
        return "all"
    return f"{len(token['runs'])}{' and older ones' if token['older_runs'] else ''}"


def revoke(token: str, data: Path | None) -> int:
    """Make a token worthless from now on."""
    key = int(token) if token.isdecimal() else token
    revoked = import_server("api.auth").revoke_token(data_directory(data), key)
    print(f"revoked {count(revoked, 'token')}")
    return 0
