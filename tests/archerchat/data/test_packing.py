"""The packers against plain versions of their rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.data.packing import (
    BestFitPacker,
    Buffered,
    ConcatPacker,
    join_documents,
    split_documents,
)

BOS = 999


def build_documents(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that each can be traced to its place."""
    token = iter(range(1000, 1_000_000))
    return [[BOS, *(next(token) for _ in range(length - 1))] for length in lengths]


def plain_best_fit(documents: list[list[int]], row_length: int) -> list[list[int]]:
    """SPEC section 4's words, with a scan over all documents for each choice."""
    buffer = list(documents)
    rows: list[list[int]] = []
    row: list[int] = []
    while buffer:
        space = row_length - len(row)
        fitting = [document for document in buffer if len(document) <= space]
        # max and min return the first of equals
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)
        buffer.remove(chosen)
        row += chosen[:space]
        if len(row) == row_length:
            rows.append(row)
            row = []
    return rows


def drain(packer: BestFitPacker | ConcatPacker) -> list[list[int]]:
    rows = []
    while not packer.needs_documents():
        row = packer.place()
        if row is not None:
            rows.append(row.tolist())
    return rows


def pack_best_fit(documents: list[list[int]], row_length: int) -> list[list[int]]:
    """The packer's choice among all documents at once."""
    packer = BestFitPacker(row_length, buffer_size=1)
    for document in documents:
        packer.add(np.asarray(document))
    return drain(packer)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(lengths=LENGTHS, row_length=st.integers(2, 20))
def test_best_fit_equals_a_scan_over_all_documents(lengths: list[int], row_length: int) -> None:
    documents = build_documents(lengths)
    assert pack_best_fit(documents, row_length) == plain_best_fit(documents, row_length)


def test_best_fit_prefers_the_longest_then_the_first_and_crops_the_shortest() -> None:
    documents = build_documents([3, 4, 4, 6, 5])
    rows = pack_best_fit(documents, 8)
    # 6 leaves 2: nothing fits, so the shortest (3) is cropped. 5 leaves 3: the first 4 is cropped.
    assert rows == [documents[3] + documents[0][:2], documents[4] + documents[1][:3]]


def test_best_fit_leaves_its_input_alone() -> None:
    document = np.arange(9)
    packer = BestFitPacker(row_length=5, buffer_size=1)
    packer.add(document)
    assert packer.place() is not None
    assert document.tolist() == list(range(9))


def test_best_fit_asks_for_documents_before_every_choice() -> None:
    packer = BestFitPacker(row_length=10, buffer_size=3)
    documents = build_documents([2, 2, 2, 2])
    for document in documents[:3]:
        assert packer.needs_documents()
        packer.add(np.array(document))
    assert not packer.needs_documents()
    assert packer.place() is None
    assert packer.needs_documents()


def test_best_fit_takes_documents_back_in_their_order() -> None:
    generator = random.Random(3)
    documents = build_documents([generator.randint(1, 12) for _ in range(80)])
    packer = BestFitPacker(row_length=9, buffer_size=1)
    for document in documents:
        packer.add(np.array(document))
    while packer.place() is None:
        pass
    again = BestFitPacker(row_length=9, buffer_size=1)
    for kept in packer.documents():
        again.add(kept.tokens, kept.length)
    assert drain(again) == drain(packer)


@given(lengths=LENGTHS, row_length=st.integers(2, 20))
def test_concat_drops_nothing_but_an_unfilled_last_row(lengths: list[int], row_length: int) -> None:
    documents = build_documents(lengths)
    packer = ConcatPacker(row_length)
    for document in documents:
        packer.add(np.array(document))
    rows = drain(packer)
    assert all(len(row) == row_length and row[0] == BOS for row in rows)
    tokens = [token for document in documents for token in document if token != BOS]
    placed = [token for row in rows for token in row if token != BOS]
    assert placed == tokens[: len(placed)]
    # What is missing is less than a row, its documents' own BOS counted.
    assert len(tokens) - len(placed) < row_length


def test_concat_goes_on_after_a_bos() -> None:
    packer = ConcatPacker(row_length=4)
    (first, second) = build_documents([6, 4])
    packer.add(np.array(first))
    packer.add(np.array(second))
    assert drain(packer) == [
        first[:4],
        [BOS, *first[4:6], BOS],
        [BOS, *second[1:4]],
    ]


def test_concat_keeps_the_rest_of_a_document_between_rows() -> None:
    packer = ConcatPacker(row_length=4)
    (document,) = build_documents([6])
    packer.add(np.array(document))
    assert packer.place() is not None
    assert [kept.rest().tolist() for kept in packer.documents()] == [[BOS, *document[4:]]]


def plain_padding(documents: list[list[int]], row_length: int, buffer_size: int) -> list[list[int]]:
    """SPEC section 7's words: nothing is cropped, what is left of a row is padded."""
    waiting, buffer, rows, row = list(documents), [], [], []
    while waiting or buffer or row:
        while waiting and len(buffer) < buffer_size:
            buffer.append(waiting.pop(0))
        fitting = [document for document in buffer if len(document) <= row_length - len(row)]
        if fitting:
            chosen = max(fitting, key=len)
            buffer.remove(chosen)
            row = row + chosen
        else:
            row = row + [-7] * (row_length - len(row))
        if len(row) == row_length:
            rows.append(row)
            row = []
    return rows


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60),
    row_length=st.integers(20, 40),
    buffer_size=st.integers(1, 12),
)
def test_padding_equals_a_scan_over_the_buffer(
    lengths: list[int], row_length: int, buffer_size: int
) -> None:
    documents = build_documents(lengths)
    packer = BestFitPacker(row_length, buffer_size, -7)
    waiting, rows = list(documents), []
    while waiting or len(packer):
        while waiting and packer.needs_documents():
            packer.add(np.array(waiting.pop(0)))
        rows.append(packer.place())
    rows.append(packer.finish())
    made = [row.tolist() for row in rows if row is not None]
    assert made == plain_padding(documents, row_length, buffer_size)
    assert packer.finish() is None


def test_a_document_that_fits_no_row_is_not_buffered() -> None:
    with pytest.raises(AssertionError, match="no row would ever take it"):
        BestFitPacker(4, 10, -7).add(np.arange(5))


@pytest.mark.parametrize("lengths", [(), (1,), (5, 1, 9)])
def test_documents_survive_being_joined(lengths: tuple[int, ...]) -> None:
    documents = [np.arange(length, dtype=np.uint16) + length for length in lengths]
    for row_length in (4, 9):  # a row of each is kept, or all
        kept = [Buffered(d[:row_length], len(d)) for d in documents]
        joined = join_documents(kept, np.uint16)
        assert joined["tokens"].numpy().dtype == np.uint16
        again = split_documents(joined, row_length)
        assert [(d.tokens.tolist(), d.length) for d in again] == [
            (d.tokens.tolist(), d.length) for d in kept
        ]
        assert all(document.tokens.dtype == np.uint16 for document in again)
    whole = join_documents([Buffered(d, len(d)) for d in documents], np.uint16)  # older states
    assert [len(d.tokens) for d in split_documents(whole, 4)] == list(lengths)


def test_best_fit_keeps_a_row_of_a_long_document_and_its_place() -> None:
    packer = BestFitPacker(row_length=4, buffer_size=1)
    for document in (np.arange(1000), np.arange(900), np.arange(3)):
        packer.add(document)
    assert [(len(d.tokens), d.length) for d in packer.documents()] == [(4, 1000), (4, 900), (3, 3)]
    assert drain(packer) == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert packer.dropped == 899 + 996
