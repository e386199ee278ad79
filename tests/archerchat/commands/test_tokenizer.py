"""`archerchat tokenizer train|eval`, called as the command line calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archerchat.commands import tokenizer as command
from archerchat.commands.tokenizer import (
    TokenizerEvalConfig,
    TokenizerTrainConfig,
    evaluate,
    train,
)
from archerchat.data.shards import write_shards
from archerchat.errors import ArcherChatError, DataError, TokenizerError, UsageError
from archerchat.home import Home
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.compression import GPT2, load_samples, measure_compression

TRAIN_DOCUMENTS = [f"document {i} says that the cat sat on mat {i * 7}" for i in range(30)]
CONFIG = TokenizerTrainConfig(data="toy", name="toy", vocab_size=300)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with a source `toy`: three train shards of ten documents, one of validation."""
    home = Home(tmp_path / "home")
    documents = [*TRAIN_DOCUMENTS, "zzzzzzzz qqqqqqqq"]
    write_shards(documents, home.data_dir("toy"), documents_per_shard=10)
    return home


def files(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file, to see that nothing was touched."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(error: type[ArcherChatError], message: str, call: Callable[[], None]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_training_on_the_corpus_gives_the_reference_ranks(tmp_path: Path, oracle_dir: Path) -> None:
    home = Home(tmp_path)
    train(TokenizerTrainConfig(data=str(oracle_dir / "corpus"), vocab_size=4096), home)
    expected = (oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken").read_bytes()
    assert (home.tokenizer_dir("default") / "ranks.tiktoken").read_bytes() == expected


def test_training_reads_all_shards_but_the_last(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    train(CONFIG, home)
    tokenizer = Tokenizer.load(home.tokenizer_dir("toy"))
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("zzzzzzzz")) == 8
    assert len(tokenizer.provenance["shards"]) == 3
    assert tokenizer.provenance["characters"] == sum(map(len, TRAIN_DOCUMENTS))
    output = capsys.readouterr().out
    assert "learning 35 merges" in output
    assert "trained 300 tokens on" in output


def test_training_again_changes_nothing(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(CONFIG, home)
    before = files(home.root)
    with monkeypatch.context() as patch:
        patch.setattr(command, "train_tokenizer", None)
        train(CONFIG, home)
    assert "already exists" in capsys.readouterr().out
    assert files(home.root) == before

    train(replace(CONFIG, force=True), home)
    after = files(home.root)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert after != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 301}, "--vocab-size 300 (now 301)"),
        ({"doc_cap": 20}, "--doc-cap 10000 (now 20)"),
        ({"max_chars": 500}, "--max-chars 2000000000 (now 500)"),
    ],
)
def test_another_tokenizer_of_the_same_name_is_kept(
    home: Home, change: dict[str, Any], message: str
) -> None:
    train(CONFIG, home)
    before = files(home.root)
    refused(UsageError, message, lambda: train(replace(CONFIG, **change), home))
    assert files(home.root) == before
    train(replace(CONFIG, **change, force=True), home)
    assert files(home.root) != before


def test_other_text_is_noticed(home: Home) -> None:
    train(CONFIG, home)
    changed = [document.replace("cat", "dog") for document in TRAIN_DOCUMENTS]
    write_shards([*changed, "end"], home.data_dir("toy"), documents_per_shard=10)
    refused(UsageError, "other text", lambda: train(CONFIG, home))


def test_more_shards_matter_only_if_they_would_be_read(home: Home) -> None:
    limited = replace(CONFIG, max_chars=600)
    train(limited, home)
    train(replace(CONFIG, name="whole"), home)
    assert len(Tokenizer.load(home.tokenizer_dir("toy")).provenance["shards"]) == 2
    before = files(home.root / "tokenizers")
    write_shards(["more text"], home.data_dir("toy"), first_index=4)
    train(limited, home)
    assert files(home.root / "tokenizers") == before
    refused(UsageError, "other text", lambda: train(replace(CONFIG, name="whole"), home))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 100}, UsageError, "vocabulary size 100 is too small"),
        ({"vocab_size": 9000}, DataError, "too short for a vocabulary of 9000"),
        ({"max_chars": 0}, UsageError, "--max-chars is 0"),
        ({"doc_cap": -1}, UsageError, "--doc-cap is -1"),
        ({"name": "../x"}, UsageError, "tokenizer name '../x'"),
        ({"data": "absent"}, UsageError, "there is toy. Choose one of them"),
        ({"data": "./absent"}, UsageError, "./absent is not a directory"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    home: Home, change: dict[str, Any], error: type[ArcherChatError], message: str
) -> None:
    refused(error, message, lambda: train(replace(CONFIG, **change), home))
    assert not (home.root / "tokenizers").exists()


def test_one_shard_only_is_refused(home: Home, tmp_path: Path) -> None:
    write_shards(TRAIN_DOCUMENTS, tmp_path / "one")
    refused(DataError, "1 shard", lambda: train(replace(CONFIG, data=str(tmp_path / "one")), home))


def test_a_broken_shard_leaves_the_old_tokenizer(home: Home) -> None:
    train(CONFIG, home)
    before = files(home.root / "tokenizers")
    shard = sorted(home.data_dir("toy").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-30])
    refused(DataError, shard.name, lambda: train(replace(CONFIG, force=True), home))
    assert files(home.root / "tokenizers") == before


def test_a_broken_tokenizer_is_replaced_only_by_force(home: Home) -> None:
    train(CONFIG, home)
    (home.tokenizer_dir("toy") / "ranks.tiktoken").unlink()
    refused(TokenizerError, "--force", lambda: train(CONFIG, home))
    train(replace(CONFIG, force=True), home)
    assert Tokenizer.load(home.tokenizer_dir("toy")).vocab_size == 300


def test_a_full_disk_leaves_the_old_tokenizer(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    train(CONFIG, home)
    before = files(home.root)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archerchat.files.os.fsync", full)
    forced = replace(CONFIG, force=True)
    refused(TokenizerError, "No space left on device", lambda: train(forced, home))
    assert files(home.root) == before


def test_plain_lines_tell_the_rate_while_reading(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archerchat.console.PLAIN_LINE_SECONDS", 0.0)
    train(CONFIG, home)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.fullmatch(r"read 0\.0 M characters .* M/s", line)]) > 9


def test_evaluation_without_published_vocabularies_says_so(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(CONFIG, home)
    target = tmp_path / "figures.json"
    evaluate(TokenizerEvalConfig(name="toy", json=target), home)
    output = capsys.readouterr().out
    assert "no GPT-2 vocabulary to compare with: give r50k_base.tiktoken" in output
    assert "no GPT-4 vocabulary to compare with: give cl100k_base.tiktoken" in output
    figures = json.loads(target.read_text())
    assert list(figures["texts"]) == ["train", "validation", *load_samples()]
    assert figures["texts"]["train"]["bytes"] == sum(map(len, TRAIN_DOCUMENTS))
    assert figures["texts"]["validation"]["tokens"] == {"ArcherChat": 17}
    assert figures["texts"]["train"]["bytes_per_token"]["ArcherChat"] > 1.5


def test_evaluation_against_gpt2_and_gpt4(
    home: Home, shared_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(CONFIG, home)
    ranks = shared_data_dir / "gpt2"
    given = TokenizerEvalConfig(
        name="toy",
        gpt2_ranks=ranks / "r50k_base.tiktoken",
        gpt4_ranks=ranks / "cl100k_base.tiktoken",
        json=tmp_path / "given.json",
    )
    evaluate(given, home)
    evaluate(TokenizerEvalConfig(name="toy", json=tmp_path / "cached.json"), home)
    figures = json.loads((tmp_path / "given.json").read_text())
    assert figures == json.loads((tmp_path / "cached.json").read_text())
    assert figures["vocabulary_sizes"] == {"ArcherChat": 291, "GPT-2": 50256, "GPT-4": 100256}
    news = figures["texts"]["news"]
    assert news["tokens"]["ArcherChat"] > news["tokens"]["GPT-2"] > news["tokens"]["GPT-4"] > 100
    assert news["ratio"]["GPT-2"] == pytest.approx(
        news["tokens"]["GPT-2"] / news["tokens"]["ArcherChat"]
    )
    assert "GPT-4" in capsys.readouterr().out


def test_published_vocabularies_encode_as_published(shared_data_dir: Path) -> None:
    gpt2 = GPT2.load(shared_data_dir / "gpt2" / "r50k_base.tiktoken")
    assert gpt2.encode("hello world") == [31373, 995]


def test_evaluation_falls_back_to_the_samples(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(CONFIG, home)
    for shard in home.data_dir("toy").iterdir():
        shard.unlink()
    evaluate(TokenizerEvalConfig(name="toy", json=tmp_path / "figures.json"), home)
    assert "built-in samples only" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "figures.json").read_text())["texts"]) == list(
        load_samples()
    )
    refused(
        DataError, "no *.parquet", lambda: evaluate(TokenizerEvalConfig("toy", data="toy"), home)
    )


def test_a_wrong_ranks_file_is_refused(home: Home, tmp_path: Path) -> None:
    train(CONFIG, home)
    wrong = home.tokenizer_dir("toy") / "ranks.tiktoken"
    for config, error, message in (
        (TokenizerEvalConfig("toy", gpt2_ranks=wrong), TokenizerError, "damaged or another file"),
        (TokenizerEvalConfig("toy", gpt4_ranks=tmp_path / "no"), UsageError, "--gpt4-ranks"),
        (TokenizerEvalConfig("absent"), UsageError, "no tokenizer 'absent' under"),
        (TokenizerEvalConfig("absent"), UsageError, "there is toy. Choose one of them, or make"),
        (TokenizerEvalConfig("toy", data="absent"), UsageError, "no data 'absent' under"),
    ):
        refused(error, message, lambda config=config: evaluate(config, home))
    assert not home.cache_dir.exists()


def test_compression_counts_bytes_and_needs_text() -> None:
    encoders = {"characters": lambda text: [0] * len(text), "bytes": lambda t: list(t.encode())}
    row = measure_compression("greek", ["αβ", "γ"], encoders)
    assert (row.num_bytes, dict(row.tokens)) == (6, {"characters": 3, "bytes": 6})
    assert row.bytes_per_token("characters") == 2.0
    assert row.ratio("characters", "bytes") == 2.0
    with pytest.raises(DataError, match="the empty text is empty"):
        measure_compression("empty", [""], encoders)
