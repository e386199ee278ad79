"""Change what the server holds: runs, many at once (`endlex tag`, `note`, ...), a project's alert
rules, and which checkpoints are kept (`endlex prune`).

    endlex ls --ids tag:old | xargs endlex archive
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from endlex.api import Api
from endlex.commands.rendering import count, format_bytes, print_json, printable, render_table
from endlex.protocol import EndlexError, UsageError
from endlex.search import parse_search


def confirm(question: str, declined: str) -> None:
    """Ask the user; if the answer is not yes, raise an `EndlexError` that says `declined`."""
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm: give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise EndlexError(declined)


def change(runs: Sequence[str], url: str | None, *, done: str = "", **changes: Any) -> None:
    """Change runs; `changes` are their name, notes, group and so on, as the server takes them."""
    server = Api(url, read_only=False)
    if changes.get("notes") == "-":
        changes["notes"] = sys.stdin.read()
    ids = [server.run(run).id for run in runs]
    server.send("PATCH", "/runs", {"runs": ids, "changes": changes})
    said = ", ".join(f"{name} = {value!r:.80}" for name, value in changes.items())
    print(f"{count(len(ids), 'run')} {done or f'changed: {said}'}")


def tag(runs: Sequence[str], add: list[str], remove: list[str], url: str | None) -> None:
    """Add and remove tags."""
    if not (add or remove):
        raise UsageError("give tags with --add TAG or --remove TAG")
    change(runs, url, done="tagged", add_tags=add, remove_tags=remove)


def delete(runs: Sequence[str], undo: bool, yes: bool, url: str | None) -> None:
    """Delete runs, or bring them back while they are not pruned."""
    if not (yes or undo):
        confirm(f"delete {count(len(runs), 'run')}?", "nothing was deleted")
    done = "back" if undo else "deleted; `endlex prune --deleted` frees their disk space"
    change(runs, url, done=done, deleted=not undo)


def alert(
    action: str, rule: str | None, project: str | None, url: str | None, as_json: bool, **how: Any
) -> None:
    """List, add or remove a project's rules of alerts; `how` is minutes and level of a new one."""
    server, where = Api(url, read_only=False), {"project": project or ""}
    if action == "ls":
        rules = server.get("/settings", where).get("rules", {})
        if as_json:
            print_json(rules)
        elif rules:
            rows = [[n, r.get("minutes") or 0, r.get("level") or "rule"] for n, r in rules.items()]
            print(render_table(["RULE", "MINUTES", "LEVEL"], rows))
        else:
            print("no rules: `endlex alert add 'val/bpb > 2' --minutes 10` makes one")
        return
    if not rule:
        raise UsageError(f"alert {action} needs a rule, such as 'val/bpb > 2'")
    where |= {"kind": "rules", "name": rule}
    if action == "remove":
        server.send("DELETE", "/settings", query=where)
    else:
        terms = [term for group in parse_search(rule) for term in group]
        if len(terms) != 1 or terms[0].key is None or terms[0].number is None:
            raise EndlexError(
                f"{rule!r} is no rule: compare one metric with a number: 'val/bpb > 2'"
            )
        server.send("PUT", "/settings", how, query=where)
    print(f"rule {printable(rule)}: {'removed' if action == 'remove' else 'added'}")


def prune(
    run: str | None, dry_run: bool, yes: bool, url: str | None, as_json: bool, **asked: Any
) -> None:
    """Ask the server what rules remove, ask the user, then remove it.

    `asked` is project, keep_last, keep_best, mode, keep_every and deleted, as the server has it.
    """
    project, deleted = asked["project"], asked["deleted"]
    if run and project:
        raise UsageError(f"--run {run} and --project {project}: give one of them")
    if not (deleted or asked["keep_last"] or asked["keep_best"] or asked["keep_every"]):
        raise UsageError(
            "no rule says what to keep: give --keep-last, --keep-best or --keep-every (a "
            "checkpoint stays when any of them keeps it), or --deleted"
        )
    if not (run or project or deleted):
        raise UsageError("give --run or --project: pruning everything at once is not offered")
    server = Api(url, read_only=False)
    request = asked | {"run": server.run(run).id if run else None}
    plan = server.send("POST", "/prune", request | {"dry_run": True})
    if dry_run or not plan["removed"]:
        _print_outcome(plan, "would be removed", as_json)
        return
    if not yes:  # the person who is asked sees the plan as text; JSON has the outcome alone
        _print_outcome(plan, "would be removed", as_json=False)
        confirm("remove them?", "nothing was removed")
    _print_outcome(server.send("POST", "/prune", request | {"dry_run": False}), "removed", as_json)


def _print_outcome(outcome: dict[str, Any], verb: str, as_json: bool) -> None:
    if as_json:
        print_json(outcome)
        return
    for item in outcome["removed"]:
        what = f"{item['run']} {item.get('name') or '(the whole run)'}"
        print(f"  {printable(what)}  {format_bytes(item['bytes'])}")
    removed, freed = count(len(outcome["removed"]), "checkpoint"), outcome["freed_bytes"]
    print(f"{removed} {verb}, {format_bytes(freed)} freed; {len(outcome['kept']):,} kept")
