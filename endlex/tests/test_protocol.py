"""Names and manifests from the other side are refused unless they are safe and consistent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from endlex import protocol
from endlex.protocol import EndlexError, decode_number, encode_number, move_aliases

DIGEST = "a" * 64


def manifest() -> dict[str, Any]:
    parts = [{"sha256": DIGEST, "bytes": 3}, {"sha256": "b" * 64, "bytes": 2}]
    files = [
        {"path": "model/weights.bin", "bytes": 5, "sha256": "c" * 64, "parts": parts},
        {"path": "empty", "bytes": 0, "sha256": "d" * 64, "parts": []},
    ]
    head = {"protocol": protocol.PROTOCOL, "name": "step-5", "step": 5, "created": 1.5}
    return {**head, "aliases": ["last"], "metadata": {"loss": 2.5}, "files": files}


@pytest.mark.parametrize("run", ["abcdefgh", "0" * 32])
def test_run_ids(run: str) -> None:
    assert protocol.check_run_id(run) == run


@pytest.mark.parametrize(
    "run", ["", "short", "x" * 33, "UPPERCASE", "abc/../defg", "abcdefgh\n", 3]
)
def test_what_is_no_run_id_is_refused(run: Any) -> None:
    with pytest.raises(EndlexError, match="run id"):
        protocol.check_run_id(run)


@pytest.mark.parametrize("session", ["", "a/b", "..", "A", "x" * 65, "a\n"])
def test_what_is_no_session_id_is_refused(session: str) -> None:
    protocol.check_session_id("000001-0123456789ab")
    with pytest.raises(EndlexError, match="session id"):
        protocol.check_session_id(session)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "é", "x" * 121, "a\n"])
def test_what_is_no_checkpoint_name_is_refused(name: str) -> None:
    protocol.check_checkpoint_name("x" * 120)
    protocol.check_checkpoint_name("step-00000005.last_1")
    with pytest.raises(EndlexError, match="checkpoint name"):
        protocol.check_checkpoint_name(name)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "a\x7f",
    ],
)
def test_paths_that_could_leave_a_checkpoint_are_refused(path: str) -> None:
    with pytest.raises(EndlexError, match="path"):
        protocol.check_checkpoint_path(path)


@pytest.mark.parametrize("path", ["a\x85b", "x" * 401, "\ud800", 3, None])
def test_paths_that_no_file_should_have_are_refused(path: Any) -> None:
    with pytest.raises(EndlexError, match="path"):
        protocol.check_checkpoint_path(path)


@pytest.mark.parametrize("path", ["a", "a/b/c.bin", "..a/b..", "naïve 文.txt", "x" * 400])
def test_paths_inside_a_checkpoint(path: str) -> None:
    assert protocol.check_checkpoint_path(path) == path


def test_a_whole_manifest_is_taken() -> None:
    assert protocol.check_manifest(manifest()) == manifest()


def change(*keys: Any, to: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(manifest())
    place = changed
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return changed  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "JSON object"),
        (change("protocol", to=1), "protocol is 1"),
        (change("name", to="../x"), "checkpoint name"),
        (change("step", to=-1), "step is -1"),
        (change("step", to=True), "step is True"),
        (change("step", to=2**62 + 1), "whole number from 0 to 2"),
        (change("created", to=math.nan), "created"),
        (change("aliases", to=["../last"]), "checkpoint name"),
        (change("metadata", to=None), "metadata"),
        (change("files", to=[]), "1 to 10,000 files"),
        (change("files", 0, to="x"), "object with path"),
        (change("files", 0, "path", to="../x"), "path"),
        (change("files", 0, "sha256", to="x"), "SHA-256"),
        (change("files", 0, "bytes", to=6), "its parts have 5"),
        (change("files", 0, "parts", 0, "bytes", to=0), "part of"),
        (change("files", 0, "parts", 0, "bytes", to=2**40), "part of"),
        (change("files", 0, "parts", 0, to=7), "part of"),
        (change("files", 1, "path", to="model/weights.bin"), "two files"),
        (change("files", 1, "path", to="model"), "file and a directory"),
    ],
)
def test_manifests_that_are_not_whole_are_refused(value: Any, message: str) -> None:
    with pytest.raises(EndlexError, match=message):
        protocol.check_manifest(value)


def test_numbers_travel_as_json() -> None:
    assert [encode_number(v) for v in (1.5, math.inf, -math.inf)] == [1.5, "Infinity", "-Infinity"]
    assert encode_number(math.nan) == "NaN"
    assert math.isnan(decode_number("NaN"))
    assert decode_number(decode_number("-Infinity")) == -math.inf
    with pytest.raises(EndlexError, match="'infinity' is not a number"):
        decode_number("infinity")


def test_an_alias_is_that_of_the_newest_published_checkpoint() -> None:
    def saved(name: str, created: float, state: str, *aliases: str) -> dict[str, Any]:
        return {"name": name, "created": created, "state": state, "aliases": list(aliases)}

    found = [
        saved("a", 1.0, "published", "best", "last", "keep"),
        saved("c", 3.0, "announced", "last"),
        saved("b", 2.0, "published", "last", "keep"),
    ]
    move_aliases(found)
    assert [one["aliases"] for one in found] == [["best", "keep"], [], ["last", "keep"]]
