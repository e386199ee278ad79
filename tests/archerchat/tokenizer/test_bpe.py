"""The tokenizer against the reference's goldens, and what it does with odd text and files."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.errors import DataError, TokenizerError, UsageError
from archerchat.tokenizer.bpe import (
    SPECIAL_TOKENS,
    WHITESPACE_LIMIT,
    Tokenizer,
    cut_long_whitespace,
    train_tokenizer,
)

TEXT = "the cat sat on the mat with the other cat, and then it ran"


def goldens(oracle_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((oracle_dir / "tokenizer_goldens.json").read_text())
    return loaded


def shard_texts(path: Path) -> list[str]:
    texts: list[str] = pq.read_table(path, columns=["text"])["text"].to_pylist()
    return texts


def test_every_golden_case_encodes_and_decodes_exactly(
    oracle_dir: Path, reference_tokenizer: Tokenizer
) -> None:
    cases = goldens(oracle_dir)["cases"]
    assert len(cases) == 46
    for case in cases:
        assert reference_tokenizer.encode(case["text"]) == case["ids"]
        assert (reference_tokenizer.decode(case["ids"]) == case["text"]) is case[
            "decoded_equals_text"
        ]


def test_special_tokens_have_the_reference_ids(
    oracle_dir: Path, reference_tokenizer: Tokenizer
) -> None:
    expected = json.loads((oracle_dir / "tokenizer" / "tokenizer.json").read_text())
    for name, token_id in expected["special_tokens"].items():
        assert reference_tokenizer.special_id(name) == token_id
    assert reference_tokenizer.vocab_size == expected["vocab_size"]
    assert reference_tokenizer.pattern == expected["pattern"]
    example = goldens(oracle_dir)["prepend_append_example"]
    ids = reference_tokenizer.encode_batch([example["text"]])[0]
    assert [*ids, reference_tokenizer.special_id(example["append"])] == example["ids"]


def test_golden_decodings(oracle_dir: Path, reference_tokenizer: Tokenizer) -> None:
    for example in goldens(oracle_dir)["decode_examples"]:
        assert reference_tokenizer.decode(example["ids"]) == example["text"]


def test_token_bytes_match_the_reference(oracle_dir: Path, reference_tokenizer: Tokenizer) -> None:
    token_bytes = reference_tokenizer.token_bytes
    assert token_bytes.dtype == np.int32
    expected = json.loads((oracle_dir / "tokenizer" / "token_bytes.json").read_text())
    assert token_bytes.tolist() == expected
    assert token_bytes.sum() == goldens(oracle_dir)["token_bytes_sum"]


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_shard_streams_match_the_reference(
    oracle_dir: Path, reference_tokenizer: Tokenizer, index: int
) -> None:
    expected = goldens(oracle_dir)["streams"][index]
    texts = shard_texts(oracle_dir / "corpus" / expected["file"])
    rows = reference_tokenizer.encode_batch(texts)
    assert [len(row) for row in rows[:20]] == expected["first_20_doc_lengths"]
    stream = np.concatenate([np.array(row, dtype="<u4") for row in rows])
    assert len(stream) == expected["total_tokens_including_bos"]
    assert hashlib.sha256(stream.tobytes()).hexdigest() == expected["sha256_uint32_le"]


def test_training_reproduces_the_reference_ranks(
    oracle_dir: Path, reference_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shards = sorted((oracle_dir / "corpus").glob("*.parquet"))[:-1]
    texts = [text for shard in shards for text in shard_texts(shard)]
    trained = train_tokenizer(texts, 4096)
    trained.save(tmp_path / "trained")
    expected = (oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken").read_bytes()
    assert (tmp_path / "trained" / "ranks.tiktoken").read_bytes() == expected
    assert trained.fingerprint == reference_tokenizer.fingerprint


@given(st.text())
def test_any_text_comes_back_and_never_yields_a_special_token(
    small_tokenizer: Tokenizer, text: str
) -> None:
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert all(i < small_tokenizer.vocab_size - len(SPECIAL_TOKENS) for i in ids)
    assert sum(small_tokenizer.token_bytes[i] for i in ids) == len(text.encode())


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "the", " ", "<|", "|>"])).map("".join))
def test_special_token_text_is_ordinary_text(small_tokenizer: Tokenizer, text: str) -> None:
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert all(i < small_tokenizer.bos_id for i in ids)


@given(st.lists(st.text(max_size=20), max_size=8))
def test_a_batch_is_its_texts_one_by_one(small_tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = [[small_tokenizer.bos_id, *small_tokenizer.encode(text)] for text in texts]
    assert small_tokenizer.encode_batch(texts) == expected


@given(st.lists(st.integers(0, 289)))
def test_any_ids_decode(small_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert isinstance(small_tokenizer.decode(ids), str)


@pytest.mark.parametrize("unknown", [290, -1, 1 << 40])
def test_an_unknown_id_is_named(small_tokenizer: Tokenizer, unknown: int) -> None:
    with pytest.raises(TokenizerError, match=f"{unknown} .*vocabulary of 290"):
        small_tokenizer.decode([1, unknown])


def test_an_unknown_special_token_is_named(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"<\|nope\|>"):
        small_tokenizer.special_id("<|nope|>")


def test_endless_whitespace_does_not_end_the_process(small_tokenizer: Tokenizer) -> None:
    for text in (" " * 1_200_000 + "x", "the cat\n" + " " * 2_500_000, "\n" * 1_200_000):
        assert small_tokenizer.decode(small_tokenizer.encode(text)) == text
    tokenizer = train_tokenizer([" " * 1_200_000 + "x", TEXT], 270, document_chars=2_000_000)
    assert tokenizer.vocab_size == 270


def test_whitespace_below_the_limit_is_encoded_as_if_unguarded(small_tokenizer: Tokenizer) -> None:
    text = "start" + " " * 20_000 + "end " + "word " * 80_000  # long enough to be looked at
    assert len(text) > WHITESPACE_LIMIT
    assert small_tokenizer.encode(text) == small_tokenizer.encoding.encode_ordinary(text)


@given(st.lists(st.sampled_from(["a", "bc", " ", "\n", " " * 5, "\t" * 12])).map("".join))
def test_runs_of_whitespace_are_cut_after_each_multiple_of_the_limit(text: str) -> None:
    limit = 5
    plain = [match.end() for match in re.finditer(rf"\s{{{limit}}}", text)]  # quadratic, but clear
    pieces = list(cut_long_whitespace(text, limit))
    assert list(itertools.accumulate(map(len, pieces)))[:-1] == plain
    assert "".join(pieces) == text


def test_looking_for_long_whitespace_takes_linear_time() -> None:
    def seconds(spaces: int) -> float:
        text = "start" + " " * spaces + "end"
        started = time.perf_counter()
        assert list(cut_long_whitespace(text)) == [text]
        return time.perf_counter() - started

    short, long = (min(seconds(spaces) for _ in range(5)) for spaces in (10_000, 100_000))
    assert long < 40 * short  # 10 times as much text; a search at every space takes 100 times


def test_lone_surrogates_become_replacement_characters(small_tokenizer: Tokenizer) -> None:
    assert small_tokenizer.decode(small_tokenizer.encode("a\ud800b")) == "a�b"
    assert train_tokenizer(["a\ud800b" * 3, TEXT], 270).vocab_size == 270


def test_save_and_load_give_the_same_tokenizer(tmp_path: Path) -> None:
    saved = Tokenizer(train_tokenizer([TEXT], 280)._ranks, provenance={"from": "test"})
    saved.save(tmp_path / "tok")
    loaded = Tokenizer.load(tmp_path / "tok")
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == [
        "ranks.tiktoken",
        "tokenizer.json",
    ]
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.vocab_size == saved.vocab_size == 280
    assert loaded.provenance == {"from": "test"}
    assert loaded.encode(TEXT) == saved.encode(TEXT)


def test_a_tokenizer_can_be_sent_to_another_process(small_tokenizer: Tokenizer) -> None:
    copy: Tokenizer = pickle.loads(pickle.dumps(small_tokenizer))
    assert copy.encode(TEXT) == small_tokenizer.encode(TEXT)
    assert copy.fingerprint == small_tokenizer.fingerprint


def test_the_fingerprint_covers_ranks_pattern_and_special_tokens(
    small_tokenizer: Tokenizer,
) -> None:
    ranks = small_tokenizer._ranks
    swapped = dict(ranks)
    (first, a), (second, b) = list(ranks.items())[-2:]
    swapped[first], swapped[second] = b, a
    variants = [
        Tokenizer(ranks),
        Tokenizer(swapped),
        Tokenizer(ranks, pattern=r"\s+|\S+"),
        Tokenizer(ranks, special_tokens=SPECIAL_TOKENS[:-1]),
    ]
    assert len({tokenizer.fingerprint for tokenizer in variants}) == 4
    assert variants[0].fingerprint == small_tokenizer.fingerprint


def _replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


DAMAGE = {
    "no ranks": ("ranks.tiktoken", lambda p: p.unlink()),
    "no metadata": ("tokenizer.json", lambda p: p.unlink()),
    "cut ranks": ("ranks.tiktoken", lambda p: p.write_bytes(p.read_bytes()[:-20])),
    "flipped byte": ("ranks.tiktoken", lambda p: _replace(p, b"AA== 0", b"AB== 0")),
    "cut metadata": ("tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:-20])),
    "not an object": ("tokenizer.json", lambda p: p.write_text("[1]")),
    "other format": ("tokenizer.json", lambda p: _replace(p, b'"format": 1', b'"format": 9')),
    "no pattern": ("tokenizer.json", lambda p: _replace(p, b'"pattern"', b'"patern"')),
    "bad pattern": ("tokenizer.json", lambda p: _replace(p, b"'(?i:", b"'((?i:")),
    "moved special": ("tokenizer.json", lambda p: _replace(p, b'"<|bos|>": 281', b'"<|bos|>": 7')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused_with_a_remedy(
    small_tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    directory = tmp_path / "tok"
    small_tokenizer.save(directory)
    name, break_it = DAMAGE[damage]
    break_it(directory / name)
    with pytest.raises(TokenizerError, match="archerchat tokenizer train") as caught:
        Tokenizer.load(directory)
    expected = "does not compile" if damage == "bad pattern" else str(directory / name)
    assert expected in str(caught.value)


def test_ranks_that_cannot_encode_everything_are_refused() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    with pytest.raises(TokenizerError, match="each once"):
        Tokenizer({**ranks, b"ab": 300})
    del ranks[b"\xff"]
    with pytest.raises(TokenizerError, match="0xff"):
        Tokenizer({**ranks, b"ab": 255})


@pytest.mark.parametrize("size", [0, 256, 264])
def test_a_vocabulary_too_small_is_refused_before_reading(size: int) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("the text was read")
        yield ""

    with pytest.raises(UsageError, match=f"{size} is too small.*265"):
        train_tokenizer(unread(), size)


def test_the_smallest_vocabulary_is_plain_bytes() -> None:
    tokenizer = train_tokenizer([TEXT], 265)
    assert tokenizer.encode("cat") == [99, 97, 116]


@pytest.mark.parametrize("texts", [[], [""], [TEXT]])
def test_text_that_cannot_fill_the_vocabulary_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 4096.*--vocab-size (\d+)"):
        train_tokenizer(texts, 4096)


def test_a_smaller_vocabulary_is_a_prefix_and_order_does_not_matter() -> None:
    texts = [TEXT, "a rather different text about dogs", "", "and a third one, the last"]
    large = list(train_tokenizer(texts, 300)._ranks.items())
    small = list(train_tokenizer(texts[::-1], 280)._ranks.items())
    assert small == large[: len(small)]


def test_documents_are_cropped_and_reading_stops_at_the_limit() -> None:
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for text in ("aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc", "dddddddddd"):
            taken.append(text)
            yield text

    seen: list[tuple[str, int]] = []
    tokenizer = train_tokenizer(
        texts(),
        267,
        max_chars=8,
        document_chars=4,
        on_progress=lambda phase, characters: seen.append((phase, characters)),
    )
    assert taken == ["aaaaaaaaaa", "bbbbbbbbbb"]
    assert seen == [("read", 4), ("read", 8), ("merge", 8)]
    assert [token for token, rank in tokenizer._ranks.items() if rank >= 256] == [b"aa", b"bb"]


def test_an_error_in_the_text_source_is_passed_on() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise DataError("shard_00000.parquet is broken")

    with pytest.raises(DataError, match="shard_00000"):
        train_tokenizer(texts(), 270)


def test_a_tokenizer_s_directory_is_written_whole_or_not_at_all(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    directory = tmp_path / "tokenizers" / "small"
    small_tokenizer.save(directory)
    assert Tokenizer.load(directory).fingerprint == small_tokenizer.fingerprint
    (tmp_path / "a file").write_text("")
    with pytest.raises(TokenizerError, match=r"cannot write .*a file/small .*: point ARCHERCHAT"):
        small_tokenizer.save(tmp_path / "a file" / "small")
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == ["small"]
