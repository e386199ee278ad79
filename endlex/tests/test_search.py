"""The search grammar: one test per line of its help, and the errors."""

from __future__ import annotations

from typing import Any

import pytest

from endlex.search import (
    SearchError,
    check_names,
    matches,
    parse_key,
    parse_search,
)

RUN: dict[str, Any] = {
    "run": "abcdefgh12",
    "project": "toy",
    "name": "d12-seed1",
    "status": "finished",
    "tags": ["baseline", "two words"],
    "group": "sweep",
    "notes": "100%_sure",
    "host": "box",
    "summary": {"val/bpb": 0.85, "loss": "NaN"},
    "metrics": [{"name": "val/bpb", "last": 0.85, "min": 0.8, "max": 2.0}],
    "config": {"depth": 12, "optimizer": {"name": "muon", "lr": 2e-2}, "tied": False, "loss": 1},
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "d12 toy SWEEP",
        "tag:baseline status:finished group:sweep project:toy host:box id:abc*",
        'tag:"two words" name:d1*',
        "val/bpb<0.9 val/bpb < 0.9 val/bpb <= 0.85",
        "min:val/bpb<0.81 max:val/bpb>=2",
        "depth>=12 config.depth = 12 config.loss=1 loss=NaN",
        "optimizer.name = muon optimizer.lr=0.02 optimizer.name=m*n tied=false",
        "-tag:old -d20 -depth>12 optimizer.name!=adam",
        "d20 OR d12 toy",
        "d12 OR d20 OR d30 finished OR baseline",
        "d99 OR LOR!=3 OR toy",
        '"100%_sure" val/*<1',
        "depth > -1 status != running",
    ],
)
def test_it_finds(text: str) -> None:
    words = text.replace("finished OR baseline", "status:finished OR tag:baseline")
    assert matches(parse_search(words), RUN)


@pytest.mark.parametrize(
    "text",
    [
        "d13",
        "tag:base",
        "val/bpb>0.9",
        "min:val/bpb>0.81",
        "-tag:baseline",
        "d20 OR d12 running",
        '"d1*"',
        "optimizer.name=adam",
        "loss>0",
        "config.val/bpb<1",
        '"100_%sure"',
    ],
)
def test_it_does_not_find(text: str) -> None:
    assert not matches(parse_search(text), RUN)


def test_patterns_of_sql_escape_what_is_literal() -> None:
    ((term,),) = parse_search("name:100%_*x")
    assert (term.text.like(), term.text.like(anywhere=True)) == (r"100\%\_%x", r"%100\%\_%x%")


def test_what_is_no_search_says_why() -> None:
    for text, said in (
        ("val/bpb <", "lacks a value"),
        ("< 3", "no name before it"),
        ("d12 OR < 3", "no name before it"),
        ("val/bpb < low", "only numbers"),
        ("status > 1", "only numbers"),
        ("a " * 51, "more than 50"),
    ):
        with pytest.raises(SearchError, match=said):
            parse_search(text)


def test_an_unknown_name_says_what_was_meant() -> None:
    metrics, config = ["val/bpb", "train/loss"], ["depth", "optimizer.lr"]

    def check(text: str) -> None:
        keys = [term.key for group in parse_search(text) for term in group if term.key]
        check_names(keys, metrics, config)

    check("val/* < 1 depth=3 min:train/loss<1")
    for text, said in (
        ("val/bbp<1", r"val/bbp'; did you mean val/bpb\?"),
        ("config.dept=1", r"did you mean depth\?"),
        ("lr=1", r"did you mean optimizer.lr\?"),
        ("min:loss<1", r"did you mean train/loss\?"),
    ):
        with pytest.raises(SearchError, match=said):
            check(text)
    with pytest.raises(SearchError, match=r"no run has 'zzz'$"):
        check_names([parse_key("zzz")], metrics, config)
