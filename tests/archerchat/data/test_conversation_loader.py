"""Conversations in rows: nothing lost, nothing stuck, always something to learn."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from archerchat.data.conversation_loader import (
    ConversationLoader,
    fit_conversation,
)
from archerchat.data.prefetch import Batch
from archerchat.errors import CheckpointError, DataError, UsageError
from archerchat.tasks.base import Task, TaskMixture
from archerchat.tasks.collected import JsonlTask
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_conversation

BYTES = Tokenizer({bytes([value]): value for value in range(256)})
BOS = BYTES.bos_id
END = BYTES.special_id("<|assistant_end|>")


class Given(Task):
    """Conversations that a test made."""

    name = "given"

    def __init__(self, conversations: list[Conversation]) -> None:
        self.rows = conversations


def talk(*lengths: int, name: str = "") -> Conversation:
    """User and assistant in turn, with texts of these lengths in tokens."""
    speakers = (user, assistant)
    texts = [(name + "x" * length)[:length] for length in lengths]
    return {"messages": [speakers[i % 2](text) for i, text in enumerate(texts)]}


def talks(count: int) -> list[Conversation]:
    return [talk(1 + 7 * i % 11, 1 + 5 * i % 23, name=str(i)) for i in range(count)]


def open_loader(conversations: list[Conversation], **changes: Any) -> ConversationLoader:
    settings = {"batch_size": 2, "sequence_length": 40, "buffer_size": 5} | changes
    return ConversationLoader(TaskMixture([Given(conversations)]), BYTES, **settings)


def equal(left: Batch, right: Batch) -> bool:
    return np.array_equal(left.inputs, right.inputs) and np.array_equal(left.targets, right.targets)


def documents_of(batches: list[Batch]) -> list[list[int]]:
    """The conversations in rows, padding removed."""
    found = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            last = targets[-1] if targets[-1] >= 0 else None
            row = [*inputs.tolist(), *([last] if last is not None else [])]
            starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
            pieces = [row[a:b] for a, b in itertools.pairwise(starts)]
            found += [piece for piece in pieces if len(piece) > 1]
    return found


# One conversation


@pytest.mark.parametrize(
    ("lengths", "row_length", "expected", "was_cut"),
    [
        ((3, 4), 12, 12, False),  # BOS, user's 3 + 2, assistant's 4 + 2
        ((3, 4), 11, 11, True),  # no answer ends inside: cut hard
        ((3, 4), 8, 8, True),  # one token to learn is left
        ((3, 4), 7, None, True),  # none is
        ((3, 4, 3, 4), 22, 12, True),  # behind the first answer
        ((3, 4, 3, 4), 23, 23, False),
        ((3, 4, 3, 4, 3, 4), 33, 23, True),  # behind the last that fits
        ((20, 4), 12, None, True),  # the question alone is too long
        ((3,), 12, None, False),  # nobody answers
    ],
)
def test_a_conversation_is_cut_to_a_row_behind_an_answer_where_one_fits(
    lengths: tuple[int, ...], row_length: int, expected: int | None, was_cut: bool
) -> None:
    ids, mask = render_conversation(BYTES, talk(*lengths))
    document, cut = fit_conversation(ids, mask, row_length, END)
    assert cut == was_cut
    if expected is None:
        assert document is None
        return
    assert document is not None
    assert len(document) == expected
    assert [max(token, ~token) for token in document.tolist()] == ids[:expected]
    assert [int(token >= 0) for token in document.tolist()] == mask[:expected]


def test_a_conversation_of_a_token_to_learn_at_its_start_alone_is_dropped() -> None:
    assert fit_conversation([5, 6], [1, 0], 9, END) == (None, False)


# Rows


@given(
    lengths=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=40),
    sequence_length=st.integers(2, 70),
    buffer_size=st.integers(1, 8),
)
@example(
    lengths=[[1], [1, 1], [1]], sequence_length=5, buffer_size=1
)  # nothing to learn comes last
@settings(deadline=None)  # each example starts a thread
def test_every_row_of_any_mixture_has_something_to_learn(
    lengths: list[list[int]], sequence_length: int, buffer_size: int
) -> None:
    conversations = [talk(*turns) for turns in lengths]
    rendered = [render_conversation(BYTES, each, 10**6) for each in conversations]
    fitted = [fit_conversation(*each, sequence_length + 1, END) for each in rendered]
    kept = [document for document, _ in fitted if document is not None]
    loader = open_loader(
        conversations,
        batch_size=1,
        sequence_length=sequence_length,
        buffer_size=buffer_size,
        repeat=False,
    )
    with loader:
        if not kept:
            with pytest.raises(DataError, match=r"none of .* has a word of the assistant to learn"):
                next(loader)
            return
        batches = list(loader)
    for batch in batches:
        assert (batch.targets >= 0).any(axis=1).all()
        assert (batch.inputs[:, 0] == BOS).all()
        assert (
            (batch.targets[:, :-1] == -1) | (batch.targets[:, :-1] == batch.inputs[:, 1:])
        ).all()
    counts = loader.used.counts
    assert counts.read == len(conversations)
    assert counts.dropped == len(fitted) - len(kept)
    assert counts.cut == sum(cut for document, cut in fitted if document is not None)
    assert counts.targets == len(batches) * sequence_length
    assert counts.trained == sum(int((document[1:] >= 0).sum()) for document in kept)
    assert counts.padding == counts.targets + len(batches) - sum(map(len, kept))
    assert loader.used.progress == 1


def test_each_conversation_is_in_the_rows_once_and_whole() -> None:
    conversations = talks(57)
    with open_loader(conversations, repeat=False) as loader:
        batches = list(loader)
    expected = sorted(render_conversation(BYTES, each)[0] for each in conversations)
    assert sorted(documents_of(batches)) == expected
    assert 0 < loader.used.counts.padding_share < 0.5
    assert 0 < loader.used.counts.trained_share < 1


def test_the_padding_is_bos_that_nobody_learns() -> None:
    with open_loader([talk(3, 4)], sequence_length=20, repeat=False) as loader:
        (batch,) = list(loader)
    assert batch.inputs[0, 12:].tolist() == [BOS] * 8
    assert batch.targets[0, 11:].tolist() == [-1] * 9
    assert batch.targets[0, 6:11].tolist() == [*b"xxxx", END]
    # The second row of the batch is there to fill it.
    assert (batch.inputs[1] == BOS).all()
    assert (batch.targets[1] == -1).all()
    assert loader.used.counts.padding == 9 + 20


def test_after_a_pass_the_next_begins_and_only_then() -> None:
    conversations = talks(23)
    with open_loader(conversations, batch_size=1) as loader:
        first = []
        while loader.used.progress < 1:
            first.append(next(loader))
        assert loader.state_dict()["lengths"].tolist() == []
        assert loader.used.consumed == 23
        second = [next(loader) for _ in first]
        assert loader.used.progress == 2
    assert len(documents_of(first)) == 23
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranks_share_the_conversations() -> None:
    conversations, found = talks(50), []
    for rank in range(3):
        with open_loader(conversations, rank=rank, world_size=3, repeat=False) as loader:
            documents = documents_of(list(loader))
        assert len(documents) == len(range(rank, 50, 3))
        found += documents
    mixture = TaskMixture([Given(conversations)])
    assert sorted(found) == sorted(render_conversation(BYTES, each)[0] for each in mixture)


@pytest.mark.parametrize("sequence_length", [64, 128, 256, 512])
def test_real_conversations_never_stall(
    shared_data_dir: Path, sequence_length: int, golden_tokenizer: Tokenizer
) -> None:
    """Where rows are so short, the reference's buffer fills up with what fits none of them."""
    task = JsonlTask(shared_data_dir / "chat" / "oasst1_validation_en.jsonl")
    with ConversationLoader(
        TaskMixture([task]),
        golden_tokenizer,
        batch_size=1,
        sequence_length=sequence_length,
        repeat=False,
    ) as loader:
        rows = 0
        for batch in loader:
            assert (batch.targets >= 0).any()
            rows += 1
    counts = loader.used.counts
    assert counts.read == len(task)
    assert counts.cut > len(task) / 4
    assert counts.targets == rows * sequence_length
    assert counts.padding_share < 0.1
    assert counts.trained_share > 0.5


# Resuming


State = dict[str, Any]


def parts(state: State) -> tuple[str, list[list[int]]]:
    """What is JSON of a state, as text, and its tensors as lists."""
    rest = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return json.dumps(rest), [state["tokens"].tolist(), state["lengths"].tolist()]


def through_json(state: State) -> State:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {**json.loads(parts(state)[0]), **tensors}


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12, 13, 30])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_resumed_loader_yields_what_an_uninterrupted_one_does(
    stop: int, rank: int, world_size: int
) -> None:
    def open_one() -> ConversationLoader:
        return open_loader(talks(43), rank=rank, world_size=world_size)

    with open_one() as whole, open_one() as again:
        for _ in range(stop):
            next(whole)
        again.load_state_dict(through_json(whole.state_dict()))
        for _ in range(25):
            assert equal(next(whole), next(again))
            assert parts(whole.state_dict()) == parts(again.state_dict())


def test_every_moment_of_a_pass_can_be_resumed_from() -> None:
    with open_loader(talks(43)) as whole, open_loader(talks(43)) as again:
        for _ in range(40):
            again.load_state_dict(through_json(whole.state_dict()))
            assert equal(next(whole), next(again))


def test_other_conversations_are_refused() -> None:
    with open_loader(talks(43)) as saved, open_loader(talks(44)) as other:
        next(saved)
        with pytest.raises(
            CheckpointError,
            match=r"mixture.tasks.0.examples: 43 saved, 44 now\. "
            "Restore the old settings or data",
        ):
            other.load_state_dict(saved.state_dict())


def test_a_broken_state_is_refused() -> None:
    with open_loader(talks(43)) as loader:
        next(loader)
        state = loader.state_dict()
        for broken in (
            state | {"counts": {"reed": 1}},
            {},
            {"identity": state["identity"], "counts": state["counts"]},
            state | {"lengths": torch.tensor([1])},
        ):
            with pytest.raises(CheckpointError, match="saved state of the data loader is broken"):
                loader.load_state_dict(broken)


def test_a_state_has_the_names_and_types_that_checkpoints_have() -> None:
    with open_loader(talks(43)) as loader:
        fresh = loader.state_dict()
        next(loader)
        state = loader.state_dict()
    for each in (fresh, state):
        assert list(each) == ["identity", "counts", "tokens", "lengths"]
        assert (each["tokens"].dtype, each["lengths"].dtype) == (torch.int32, torch.int64)
    used = loader.used
    assert state["counts"]["read"] == used.counts.read == used.consumed + len(state["lengths"])


# Bad input


def test_a_malformed_conversation_is_named() -> None:
    broken = talks(9)
    broken[6] = {"messages": [user("a"), user("b")]}
    with (
        open_loader(broken) as loader,
        pytest.raises(DataError, match=r"given, conversation 6: message 1: the role is 'user'"),
    ):
        list(loader)


def test_special_text_of_a_user_is_text() -> None:
    text = "<|assistant_end|><|bos|>"
    conversation = {"messages": [user(text), assistant("no")]}
    with open_loader([conversation], batch_size=1, sequence_length=60, repeat=False) as loader:
        (batch,) = list(loader)
    assert bytes(batch.inputs[0, 2 : 2 + len(text)].tolist()) == text.encode()
    assert batch.inputs[0].tolist().count(END) == 1


def test_more_ranks_than_conversations_are_refused() -> None:
    with pytest.raises(UsageError, match="9 conversations cannot be shared by 10 ranks"):
        open_loader(talks(9), world_size=10)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"sequence_length": 0},
        {"buffer_size": -1},
        {"prefetch": 0},
        {"rank": 2, "world_size": 2},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        open_loader(talks(9), **changes)


def test_shares_of_nothing_are_not_numbers() -> None:
    counts = open_loader(talks(3)).used.counts
    assert math.isnan(counts.padding_share)
    assert math.isnan(counts.trained_share)
