"""`endlex serve` runs the server, the extra `endlex[server]`; `endlex token` manages its tokens.

A person who may write the data directory owns the server, so the tokens' commands change its files,
on its machine. A running server sees the change at once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endlex.commands.rendering import count, format_age, print_json, render_table
from endlex.protocol import EndlexError


def import_server(module: str) -> Any:
    """Return a module of the server."""
    try:
        return importlib.import_module(f"endlex.server.{module}")
    except ModuleNotFoundError as error:
        if error.name == "endlex.server":
            what = "only the client is installed here, and this is the server's"
        else:
            what = f"the server needs {error.name}, which is not installed here"
        remedy = "pip install 'endlex[server]', or in a clone pip install ./endlex ./endlex/server"
        raise EndlexError(f"{what}: {remedy}") from error


def data_directory(data: Path | None) -> Path:
    """Return the server's data directory: the one given, else the environment's or the default."""
    return data or Path(import_server("settings").DataDir.from_environment().root)


def serve(data: Path | None, alerts: list[Any], min_free_gb: float | None, **given: Any) -> None:
    """Serve until a signal ends it; `given` is what `Settings` takes as it is."""
    server, settings = import_server("app"), import_server("settings")
    targets = [target for target in alerts if target is not None]  # an empty --ntfy is none
    targets += os.environ.get("ENDLEX_ALERTS", "").split()
    for target in targets:
        import_server("watch.notify").check_target(target)
    if min_free_gb is not None:
        given["min_free_bytes"] = int(min_free_gb * 10**9)
    chosen = {name: value for name, value in given.items() if value is not None}
    server.serve(data_directory(data), settings.Settings(alerts=tuple(targets), **chosen))


def create_token(name: str, scope: str, run: Sequence[str], data: Path | None) -> None:
    """Make a token and print it, once; a bad name, scope or id is an `EndlexError`."""
    scopes = [part.strip() for part in scope.split(",") if part.strip()]
    print(import_server("api.auth").create_token(data_directory(data), name, scopes, run))


def grant_runs(token: str, runs: Sequence[str], data: Path | None) -> None:
    """Make runs a token's own."""
    import_server("api.auth").grant_runs(data_directory(data), token, list(runs))
    print(f"token {token} may add to {count(len(runs), 'more run')}")


def list_tokens(data: Path | None, as_json: bool) -> None:
    """Print what tokens there are: names, scopes, own runs, when they were made and last used."""
    tokens: list[dict[str, Any]] = import_server("api.auth").list_tokens(data_directory(data))
    if as_json:
        print_json(tokens)
        return
    if not tokens:
        print("no tokens: `endlex token create --name BOX --scope write,checkpoint` makes one")
        return
    rows = []
    for t in tokens:
        own = "all" if "manage" in t["scopes"] else f"{len(t['runs'])}"
        own += " and older ones" if t["older_runs"] and own != "all" else ""
        adds = {"write", "checkpoint"} & {*t["scopes"]}
        ages = [format_age(t[key]) for key in ("created", "last_used", "revoked")]
        named = [t["id"], t["name"], ",".join(t["scopes"]), own if adds else ""]
        rows.append([*named, ages[0], ages[1] or "never", ages[2]])
    print(render_table(["ID", "NAME", "SCOPES", "OWN RUNS", "MADE", "LAST USED", "REVOKED"], rows))
    if any(t["older_runs"] for t in tokens):
        print(
            "Tokens made before Endlex had the scopes annotate and manage keep their scopes, "
            "which now only add: none of them deletes, prunes, renames, tags or archives."
        )


def revoke_token(token: str, data: Path | None) -> None:
    """Make a token worthless from now on."""
    revoked = import_server("api.auth").revoke_token(data_directory(data), token)
    print(f"revoked {count(revoked, 'token')}")
