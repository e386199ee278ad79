"""`endlex prune`: remove checkpoints that no rule keeps, after saying which."""

from __future__ import annotations

from typing import Any

from endlex.commands.rendering import confirm, count, format_bytes, print_json, printable
from endlex.commands.targets import find_server
from endlex.protocol import UsageError

PRUNE = "/prune"


def prune(
    run: str | None,
    project: str | None,
    keep_last: int | None,
    keep_best: str | None,
    mode: str,
    keep_every: int | None,
    deleted: bool,
    dry_run: bool,
    yes: bool,
    url: str | None,
    as_json: bool,
) -> int:
    """Ask the server what the rules remove, ask the user, then remove it."""
    rules = {"keep_last": keep_last, "keep_best": keep_best, "keep_every": keep_every}
    if run and project:
        raise UsageError(f"--run {run} and --project {project}: give one of them")
    if not deleted and not any(rules.values()):
        raise UsageError(
            "no rule says what to keep: give --keep-last, --keep-best or --keep-every (a "
            "checkpoint stays when any of them keeps it), or --deleted"
        )
    if not (run or project or deleted):
        raise UsageError("give --run or --project: pruning everything at once is not offered")
    server = find_server(url)
    asked = rules | {
        "mode": mode if keep_best else None,
        "deleted": deleted or None,
        "run": server.run(run).id if run else None,
        "project": project,
    }
    request = {key: value for key, value in asked.items() if value is not None}
    plan = server.send("POST", PRUNE, request | {"dry_run": True})
    if dry_run or not plan["removed"]:
        _print_outcome(plan, "would be removed", as_json)
        return 0
    if not yes:
        _print_outcome(plan, "would be removed", False)
        if not confirm("remove them?", yes):
            print("nothing was removed")
            return 1
    _print_outcome(server.send("POST", PRUNE, request | {"dry_run": False}), "removed", as_json)
    return 0


def _print_outcome(outcome: dict[str, Any], verb: str, as_json: bool) -> None:
    if as_json:
        print_json(outcome)
        return
    for item in outcome["removed"]:
        what = f"{item['run']} {item.get('name') or '(the whole run)'}"
        print(f"  {printable(what)}  {format_bytes(item['bytes'])}")
    removed, kept = len(outcome["removed"]), len(outcome["kept"])
    freed = format_bytes(outcome["freed_bytes"])
    print(f"{count(removed, 'checkpoint')} {verb}, {freed} freed; {kept:,} kept")
