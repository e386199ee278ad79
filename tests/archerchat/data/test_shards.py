"""Shards: written whole, read in order, and refused with a reason when they are broken."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archerchat.data.shards import (
    Shard,
    data_directory,
    iter_documents,
    list_shards,
    split_shards,
    write_shards,
)
from archerchat.errors import DataError, UsageError
from archerchat.home import Home

DOCUMENTS = [f"document {i} — ünïcode" for i in range(50)] + ["", "the end"]


def test_documents_come_back_in_order(tmp_path: Path) -> None:
    written = write_shards(DOCUMENTS, tmp_path, documents_per_row_group=4, documents_per_shard=20)
    assert [path.name for path in written] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_00002.parquet",
    ]
    assert list_shards(tmp_path) == written
    assert list(iter_documents(written)) == DOCUMENTS
    with Shard(written[0]) as shard:
        assert (shard.num_row_groups, shard.num_documents) == (5, 20)
        assert shard.read_row_group(1) == DOCUMENTS[4:8]


def test_the_last_shard_by_name_is_validation(tmp_path: Path) -> None:
    written = write_shards(DOCUMENTS, tmp_path, documents_per_shard=20)
    assert split_shards(list(reversed(written))) == (written[:2], written[2:])


def test_one_shard_is_refused(tmp_path: Path) -> None:
    written = write_shards(DOCUMENTS, tmp_path)
    with pytest.raises(DataError, match=r"holds 1 shard; two are needed.*archerchat data"):
        split_shards(written)


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_shards_is_named(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path / "climbmix"
    if exists:
        directory.mkdir()
        (directory / ".shard_00000.parquet.x.tmp").touch()
        (directory / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no \*\.parquet shard in .*climbmix: .*data download"):
        list_shards(directory)


def test_large_strings_and_nulls_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", None], pa.large_string())}), path)
    assert list(iter_documents([path])) == ["a", ""]


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        *(pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    ],
)
def test_text_is_read_however_arrow_holds_it(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "shard_00000.parquet"
    nested = pa.array([{"a": 1, "b": 2}] * 3)
    column = pa.array(["ü", None, "b"]).cast(kind)
    pq.write_table(pa.table({"meta": nested, "content": column}), path)
    with Shard(path, "content") as shard:
        assert shard.read_row_group(0) == ["ü", "", "b"]
        assert shard.text_bytes > 0


@pytest.mark.parametrize("keep", [0, 3, 50, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    (path,) = write_shards(DOCUMENTS, tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"shard_00000\.parquet as Parquet .*delete it"):
        Shard(path)


def test_a_corrupt_row_group_is_named(tmp_path: Path) -> None:
    (path,) = write_shards(DOCUMENTS, tmp_path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_00000\.parquet as Parquet .*delete it"):
        list(iter_documents([path]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": pa.array(["a"])}, r"no column 'text' \(it has content\)"),
        ({"text": pa.array([1])}, r"column 'text' holds int64: it must hold strings"),
        ({"text": pa.array([["a"]])}, r"column 'text' holds list"),
    ],
)
def test_a_wrong_column_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=message) as error:
        Shard(path)
    # The error's traceback still holds the shard.
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()], error


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    (path,) = write_shards(DOCUMENTS, tmp_path)
    content = path.read_bytes()
    middle = len(content) // 4  # inside the only page
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DataError, match=r"shard_00000\.parquet as Parquet"):
        list(iter_documents([path]))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    binary = pa.array([b"\xff\xfe"], pa.binary())
    array = pa.Array.from_buffers(pa.string(), 1, binary.buffers())
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table({"text": array}), path)
    with pytest.raises(DataError, match=r"shard_00000\.parquet as Parquet .*utf-8"):
        list(iter_documents([path]))


def test_a_full_disk_leaves_only_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("archerchat.files.os.fsync", full)
    monkeypatch.setattr("archerchat.files.fsync_path", lambda path: None)
    with pytest.raises(DataError, match=r"shard_00001\.parquet \(No space left.*free some space"):
        write_shards(DOCUMENTS, tmp_path, documents_per_shard=20)
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000.parquet"]
    assert list(iter_documents(list_shards(tmp_path))) == DOCUMENTS[:20]


def test_a_name_is_looked_up_under_the_home_and_a_path_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = Home(tmp_path / "home")
    write_shards(DOCUMENTS, home.data_dir("climbmix"))
    for name in ("climbmix", "some/climbmix"):  # what is here does not shadow a name
        (tmp_path / name).mkdir(parents=True)
    assert data_directory("climbmix", home) == home.root / "data" / "climbmix"
    assert data_directory("./climbmix", home) == Path("climbmix")
    assert data_directory("some/climbmix", home) == Path("some/climbmix")
    assert data_directory(str(tmp_path / "some"), home) == tmp_path / "some"
    assert data_directory("~/some", home) == tmp_path / "some"
    assert data_directory("..", home) == Path("..")


def test_a_name_that_does_not_exist_is_refused_with_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home(tmp_path / "home")
    first = (
        r"no data 'mine' under .*data: make it .* `archerchat data build DIRECTORY --name mine`,"
    )
    with pytest.raises(UsageError, match=first) as none:
        data_directory("mine", home)
    assert "./mine" not in str(none.value)
    for name in ("b", "a"):
        write_shards(DOCUMENTS, home.data_dir(name))
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        UsageError, match=r"there is a, b\. Choose .* mine that is here, write ./mine"
    ):
        data_directory("mine", home)
    for path in ("./gone", "~nobody-of-this-name/x"):
        with pytest.raises(UsageError, match=f"{path} is not a directory"):
            data_directory(path, home)
