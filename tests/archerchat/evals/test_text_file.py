"""Any text file in batches: every token once, whatever the parts it is read in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archerchat.errors import DataError
from archerchat.evals.text_file import iter_text, iter_text_batches
from archerchat.tokenizer.bpe import Tokenizer


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab1 .\n\t\ré"), max_size=60), st.integers(1, 9))
def test_parts_have_the_tokens_of_the_whole(
    merging_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str, part: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(text.encode())
    parts = list(iter_text(path, part))
    assert "".join(parts) == text
    ids = [i for each in parts for i in merging_tokenizer.encode(each)]
    assert ids == merging_tokenizer.encode(text)


def test_every_token_is_a_target_once(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "apple river.\nstone green winter\n\nhouse music " * 9
    path = tmp_path / "text"
    path.write_text(text)
    batches = list(iter_text_batches(path, small_tokenizer, 2, 8, torch.device("cpu")))
    targets = torch.cat([targets.flatten() for _, targets in batches])
    ids = small_tokenizer.encode(text)
    assert targets[targets >= 0].tolist() == ids
    assert {targets.shape for _, targets in batches[:-1]} == {(2, 8)}
    for inputs, targets in batches:
        assert (inputs[:, 0] == small_tokenizer.bos_id).all()
        kept = targets[:, :-1] >= 0
        assert torch.equal(inputs[:, 1:][kept], targets[:, :-1][kept])


def test_what_cannot_be_read_is_named(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        list(iter_text(path))
    with pytest.raises(DataError, match="cannot read"):
        list(iter_text(tmp_path / "none"))
