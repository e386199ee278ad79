"""One call of another tool's `log`, as wandb and trackio keep it: a JSON object by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from endlex.client.recorder import read_file
from endlex.importers.run_directory import RunWriter
from endlex.protocol import NON_FINITE, EndlexError

LARGEST_FILE = 64 * 2**20


def load(module: str) -> Any:
    """Return a module of a tool's own library.

    Raises:
        EndlexError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise EndlexError(
            f"this needs {module.partition('.')[0]}'s own library, to read its files: "
            "pip install 'endlex[import]'"
        ) from error


def find_files(path: Path, suffix: str, remedy: str) -> list[Path]:
    """Return the files of a suffix at or below `path`.

    Raises:
        EndlexError: there is none.
    """
    found = [path] if path.is_file() else sorted(path.rglob(f"*{suffix}"))
    if not found:
        raise EndlexError(f"{path} holds no {suffix} file: {remedy}")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings with "/"; what has a `_type` stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "_type" not in value:
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among nested values, by their joined names."""
    flat = flatten(values, prefix).items()
    return {k: NON_FINITE[v] if isinstance(v, str) else v for k, v in flat if is_number(v)}


def is_number(value: Any) -> bool:
    """Whether it is a number, or the word for one that JSON lacks."""
    return value in NON_FINITE if isinstance(value, str) else isinstance(value, int | float)


def write_row(
    writer: RunWriter, step: int, time: float, row: Mapping[str, Any], files: Path
) -> None:
    """Write one call of `log`: numbers together; texts, tables, histograms and media one by one.

    Args:
        files: the directory below which the paths of files are.
    """
    writer.metrics(step, time, numbers_of(row))
    for name, value in flatten(row).items():
        if isinstance(value, Mapping):
            _write_typed(writer, step, time, name, value, files)
        elif isinstance(value, str) and not is_number(value):
            writer.text(step, time, name, value)
        elif value is not None and not is_number(value):
            writer.skip(f"value of type {type(value).__name__}")


def _write_typed(
    writer: RunWriter, step: int, time: float, name: str, value: Mapping[str, Any], files: Path
) -> None:
    kind = str(value["_type"]).removeprefix("trackio.")
    path = str(value.get("path") or value.get("file_path") or "")
    if kind == "histogram" and isinstance(value.get("bins"), list):
        writer.histogram(step, time, name, value["bins"], value.get("values") or [])
    elif "table" in kind:
        table = _table_of(value, inside(files, path))
        if table is None:
            writer.skip(kind)
        else:
            writer.table(step, time, name, *table)
    else:
        caption = str(value.get("caption") or "") or None
        for one in value.get("filenames") or [path]:
            found = inside(files, str(one))
            if found is None:
                writer.skip(kind)
            else:
                writer.media(step, time, name, *read_file(found), caption)


def inside(files: Path, relative: str) -> Path | None:
    """A file's path; None where there is none, it is too large, or it leads out of the run."""
    target = (files / relative).resolve()
    if not relative or not target.is_relative_to(files.resolve()) or not target.is_file():
        return None
    return target if target.stat().st_size <= LARGEST_FILE else None


def _table_of(
    value: Mapping[str, Any], file: Path | None
) -> tuple[list[str], list[list[Any]]] | None:
    records = value.get("_value")
    if isinstance(records, list):  # trackio's: a list of objects
        columns = list(dict.fromkeys(key for record in records for key in record))
        return columns, [[record.get(column) for column in columns] for record in records]
    try:
        table = json.loads(file.read_bytes() if file else b"")
        return [str(column) for column in table["columns"]], [list(row) for row in table["data"]]
    except (ValueError, KeyError, TypeError):
        return None
