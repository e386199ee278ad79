"""`endlex import`: other tools' files become run directories, which `endlex sync` ships."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path

from endlex.client.directories import runs_folder
from endlex.commands.rendering import count, printable
from endlex.importers.run_directory import Found, RunWriter
from endlex.protocol import EndlexError, UsageError

NOUNS = {"metrics": "metrics record", "text": "text", "table": "table", "media": "file"}


def import_runs(tool: str, path: Path, project: str | None, to: Path | None) -> int:
    """Import every run of a tool at or below a path; one that fails does not stop the others."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    importer = import_module(f"endlex.importers.{tool}")
    found: Found = importer.find_runs(path, to or runs_folder(), project)
    imported: list[RunWriter] = []
    failed = False
    for place, import_one in found:
        try:
            done = import_one()
        except Exception as error:  # whatever a damaged file makes of a library
            failed = True
            known = isinstance(error, EndlexError | OSError)
            said = str(error) if known else f"{type(error).__name__}: {error}"
            print(f"{place}: not imported: {printable(said)}")
            continue
        for one in done if isinstance(done, list) else [done]:
            imported.append(one)
            shown = [kind for kind in NOUNS if one.counts[kind] or kind == "metrics"]
            counts = ", ".join(count(one.counts[kind], NOUNS[kind]) for kind in shown)
            print(f"{place} -> {one.directory}: {counts}")
            if one.skipped:
                left = ", ".join(f"{n:,} x {printable(what)}" for what, n in one.skipped.items())
                print(f"  left out: {left}")
    if imported:
        directories = " ".join(dict.fromkeys(shlex.quote(str(one.directory)) for one in imported))
        print(f"ship with: endlex sync {directories}")
    return 1 if failed else 0
