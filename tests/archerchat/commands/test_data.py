"""`archerchat data download|build|info`: what they do, say and leave behind."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import tyro
from rich.console import Console

from archerchat.cli import main
from archerchat.commands import data
from archerchat.commands.data import (
    DataBuildConfig,
    DataDownloadConfig,
    DataInfoConfig,
    build,
    download,
    info,
)
from archerchat.console import LiveLine
from archerchat.data.corpus import CorpusOptions
from archerchat.data.hub import SOURCES
from archerchat.data.shards import iter_documents, list_shards, split_shards, write_shards
from archerchat.errors import DataError, UsageError
from archerchat.home import Home
from archerchat.tasks.collected import JsonlTask

Config = TypeVar("Config")
QUARTER = CorpusOptions(val_fraction=0.25)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my.texts"
    folder.mkdir()
    lines = [f'{{"text": "document {i}"}}\n' for i in range(40)]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


def cells(output: str, row: str) -> list[str]:
    """The columns of a table's row."""
    (line,) = [line for line in output.splitlines() if re.match(rf"\W*{row}\b", line)]
    return re.split(r"  +", line.strip())


def parse(config: type[Config], *args: str) -> Config:
    """Parse as `cli.py` does: what is required is positional."""
    flags = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    return tyro.cli(config, args=args, config=flags)


def test_flags_have_the_documented_names() -> None:
    assert parse(DataDownloadConfig, "--source", "fineweb-edu", "--num-shards", "3") == (
        DataDownloadConfig(source="fineweb-edu", num_shards=3)
    )
    assert parse(DataBuildConfig, "some/folder", "--val-documents", "7") == (
        DataBuildConfig("some/folder", corpus=CorpusOptions(val_documents=7))
    )
    assert parse(DataInfoConfig, "--data", "climbmix", "--shards") == (
        DataInfoConfig(data="climbmix", shards=True)
    )


def test_build_makes_shards_under_the_folders_name_and_prints_them(
    home: Home, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(DataBuildConfig(str(folder), corpus=QUARTER), home)
    train, validation = split_shards(list_shards(home.data_dir("my.texts")))
    assert len(list(iter_documents(train))) == 30
    assert len(list(iter_documents(validation))) == 10
    output = capsys.readouterr().out
    assert cells(output, "train")[:4] == ["train", "1", "10", "30"]
    assert cells(output, "validation")[:4] == ["validation", "1", "10", "10"]

    shards = {path: path.stat().st_mtime_ns for path in (*train, *validation)}
    build(DataBuildConfig(str(folder), corpus=QUARTER), home)
    assert "is built already: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_build_keeps_named_splits_and_says_what_it_left_out(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    root.mkdir()
    rows = [f'{{"content": "document {i}"}}\n' for i in range(20)]
    (root / "train.jsonl").write_text("".join(rows) + '{"content": null}\nnot JSON\n')
    (root / "validation.json").write_text('[{"content": "held out"}]')
    (root / "test.jsonl").write_text('{"content": "for the end"}\n')
    (root / "README.md").write_text("# A data set")
    (root / "a.png").touch()
    config = DataBuildConfig(str(root), text_column="content")
    with pytest.raises(DataError, match=r"train\.jsonl:22: not JSON.*; --skip-bad leaves out"):
        build(config, home)
    build(replace(config, skip_bad=True), home)
    output = capsys.readouterr().out
    for line in (
        "left out: a.png (.png, which is not read)",
        "left out: README.md (the data set's description)",
        "left out: test.jsonl (the test split)",
        "validation: 1 files named so, such as validation.json",
        f"1 null or blank texts were left out, the first: {root}/train.jsonl:21",
        "1 bad files or rows were left out:",
    ):
        assert f"{line}\n" in output
    train, validation = split_shards(list_shards(home.data_dir("set")))
    assert (len(list(iter_documents(train))), list(iter_documents(validation))) == (
        20,
        ["held out"],
    )
    with pytest.raises(UsageError, match=r"skip_bad: True saved, absent now"):
        build(replace(config, text_column="text"), home)


def test_build_replaces_other_data_only_when_forced(home: Home, folder: Path) -> None:
    config = DataBuildConfig(str(folder), corpus=QUARTER)
    build(config, home)
    (folder / "b.txt").write_text("one more")
    before = {path: path.stat().st_mtime_ns for path in home.data_dir("my.texts").iterdir()}
    added = r"source files added \(1\): b\.txt"
    for change, difference in (
        (config, added),
        (replace(config, corpus=replace(QUARTER, seed=1)), rf"{added}; seed: 0 saved, 1 now"),
    ):
        with pytest.raises(
            UsageError,
            match=rf"my\.texts was built .*: {difference}\. Give another --name .*--force \(runs",
        ):
            build(change, home)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    build(replace(config, force=True), home)
    assert "one more" in iter_documents(list_shards(home.data_dir("my.texts")))


def test_build_names_the_source_files_that_differ(home: Home, folder: Path) -> None:
    for name in "bcd":
        (folder / f"{name}.txt").write_text(name)
    config = DataBuildConfig(str(folder), name="mine")
    build(config, home)
    (folder / "b.txt").unlink()
    (folder / "c.txt").write_text("longer")
    for number in range(7):
        (folder / f"new{number}.txt").write_text("new")
    with pytest.raises(UsageError) as refused:
        build(config, home)
    assert (
        "other settings: source files added (7): new0.txt, new1.txt, new2.txt, new3.txt, new4.txt, "
        "...; source files removed (1): b.txt; source files changed (1): c.txt. Give another --name"
    ) in str(refused.value)


def test_build_names_a_single_source_file_that_changed(home: Home, folder: Path) -> None:
    config = DataBuildConfig(str(folder / "a.jsonl"))
    build(config, home)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(UsageError, match=r"settings: source files changed \(1\): a\.jsonl\."):
        build(config, home)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for this Python's sources."""
    library = tmp_path / "lib"
    library.mkdir()
    for i in range(20):
        (library / f"module{i}.py").write_text(f'"""Module {i}."""\n' + "x = 1\n" * 40)
    monkeypatch.setattr(data, "stdlib_directory", lambda: library)
    return library


def test_build_reads_the_standard_library(home: Home, library: Path) -> None:
    build(DataBuildConfig("stdlib"), home)
    texts = list(iter_documents(list_shards(home.data_dir("stdlib"))))
    assert sum(text.startswith('"""Module') for text in texts) == 20


def test_the_standard_librarys_corpus_outlives_an_update_of_python(
    home: Home, library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(DataBuildConfig("stdlib"), home)
    directory = home.data_dir("stdlib")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    (library / "module0.py").write_text('"""Module zero."""\n' + "x = 1\n" * 40)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.1")
    capsys.readouterr()
    build(DataBuildConfig("stdlib"), home)
    output = capsys.readouterr().out
    assert re.fullmatch(
        r"\S+stdlib stays as \w+ 3\.\S+ built it: --force builds it again\n", output
    )
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    with pytest.raises(UsageError, match="seed: 0 saved, 1 now"):
        build(DataBuildConfig("stdlib", corpus=CorpusOptions(seed=1)), home)
    build(DataBuildConfig("stdlib", force=True), home)
    assert any("Module zero" in text for text in iter_documents(list_shards(directory)))


@pytest.mark.parametrize("name", ["stdlib", "climbmix"])
def test_a_folder_does_not_take_a_sources_name_by_accident(
    name: str, home: Home, folder: Path
) -> None:
    other = folder.rename(folder.with_name(name))
    with pytest.raises(UsageError, match=rf"would be called '{name}'.*give a --name"):
        build(DataBuildConfig(source=str(other)), home)
    build(DataBuildConfig(source=str(other), name="mine"), home)
    assert list_shards(home.data_dir("mine"))


def test_a_folder_with_nothing_usable_leaves_nothing(home: Home, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        build(DataBuildConfig(source=str(tmp_path / "nowhere")), home)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match="at least two documents are needed"):
        build(DataBuildConfig(source=str(tmp_path / "blank.txt")), home)
    assert list(home.data_dir("x").parent.iterdir()) == []


def test_info_adds_up_a_source_and_lists_its_shards_when_asked(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = ["x" * 1000] * 2500
    directory = home.data_dir("mine")
    write_shards(documents, directory, documents_per_shard=1000, documents_per_row_group=250)
    info(DataInfoConfig(data="mine"), home)
    output = capsys.readouterr().out
    assert str(directory) in output
    assert cells(output, "train")[:5] == ["train", "2", "8", "2,000", "1.9 MiB"]
    assert cells(output, "validation")[:5] == ["validation", "1", "2", "500", "490.3 KiB"]
    assert "shard_0000" not in output
    info(DataInfoConfig(data=str(directory), shards=True), home)
    output = capsys.readouterr().out
    assert cells(output, "shard_00002")[1:3] == ["2", "500"]


def test_info_prints_sizes_of_tiny_data(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(["x" * 50, "y"], home.data_dir("tiny"), documents_per_shard=1)
    info(DataInfoConfig("tiny"), home)
    size = cells(capsys.readouterr().out, "train")[4]
    assert re.fullmatch(r"[5-9]\d B", size), size


def test_info_without_a_name_shows_every_source(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"no data in .*data: make some with"):
        info(DataInfoConfig(), home)
    for name in ("one", "two"):
        write_shards(["a", "b"], home.data_dir(name), documents_per_shard=1)
    info(DataInfoConfig(), home)
    output = capsys.readouterr().out
    assert output.index("data/one") < output.index("data/two")


def test_info_names_what_is_wrong(home: Home) -> None:
    with pytest.raises(UsageError, match=r"no data 'climbmix' under .*data: make some with"):
        info(DataInfoConfig(data="climbmix"), home)
    home.data_dir("climbmix").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no \*\.parquet shard in .*climbmix"):
        info(DataInfoConfig(data="climbmix"), home)
    (shard,) = write_shards(["a"], home.data_dir("one"))
    with pytest.raises(DataError, match="holds 1 shard; two are needed"):
        info(DataInfoConfig(data="one"), home)
    (shard.parent / "shard_00001.parquet").write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match=r"cannot read .*shard_00001\.parquet"):
        info(DataInfoConfig(data="one"), home)


@pytest.mark.parametrize(("given", "count"), [({"num_shards": 2}, 2), ({"depth": 4}, 4)])
def test_download_with_everything_there_fetches_nothing(
    home: Home, capsys: pytest.CaptureFixture[str], given: dict[str, int], count: int
) -> None:
    """Depth 4 trains on 138 million tokens; a shard has 43 million."""
    directory = home.data_dir("climbmix")
    directory.mkdir(parents=True)
    for name in SOURCES["climbmix"].shard_names(count):
        (directory / name).touch()
    unreachable = "http://127.0.0.1:9"
    download(DataDownloadConfig(endpoint=unreachable, **given), home)
    assert f"downloaded 0 shards, {count + 1} already existed" in capsys.readouterr().out


def test_download_refuses_numbers_that_the_source_does_not_have(home: Home) -> None:
    with pytest.raises(UsageError, match=r"1822 train shards were asked for: .* has 1821"):
        download(DataDownloadConfig(source="fineweb-edu", num_shards=1822), home)
    assert not home.root.exists()


def test_progress_says_rate_and_time_left_when_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("archerchat.console.time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=200)
    with LiveLine(console, "connecting") as line:
        report = data.report_to(line, num_files=3)
        report("a", 20_000_000, 100_000_000)  # 20 MB were there already
        now = 110.0
        report("a", 60_000_000, 100_000_000)
        report("a", 70_000_000, 100_000_000)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ("0 of 3 shards, 60 of 300 MB at 4.0 MB/s, 60 s left\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def identity(*words: str) -> int:
    return main(["data", "identity", *words])


@pytest.mark.usefixtures("here")
def test_the_identity_file_is_one_that_can_be_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--name", "Zed", "--creator", "Ann", "--num-conversations", "30")
    assert identity(*words, "--output", "zed.jsonl") == 0
    assert capsys.readouterr().out == "wrote 30 conversations of Zed to zed.jsonl\n"
    assert len(JsonlTask(Path("zed.jsonl"))) == 30
    text = Path("zed.jsonl").read_text()
    assert "Zed" in text
    assert "Ann" in text
    assert identity(*words) == 0  # the default name
    assert Path("identity.jsonl").read_text() == text
    assert identity(*words, "--seed", "1") == 0
    assert Path("identity.jsonl").read_text() != text


@pytest.mark.usefixtures("here")
def test_the_template_is_saved_edited_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert identity("--save-template", "mine.toml") == 0
    assert not Path("identity.jsonl").exists()
    template = Path("mine.toml")
    template.write_text(template.read_text().replace("I'm {name}", "I am the great {name}"))
    assert identity("--template", "mine.toml") == 0
    assert "I am the great Archer" in Path("identity.jsonl").read_text()
    assert identity("--save-template", "mine.toml") == 2
    assert "mine.toml exists: name a new file" in capsys.readouterr().err
    assert "the great" in template.read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--name", " "), 2, "--name is empty"),
        (("--creator", ""), 2, "--creator is empty"),
        (("--num-conversations", "0"), 2, "--num-conversations is 0; it must be at least 1"),
        (("--template", "none.toml"), 1, "cannot read the template none.toml ([Errno 2]"),
        (("--template", "latin.toml"), 1, "cannot read the template latin.toml ('utf-8' codec"),
        (("--output", "home-file/x.jsonl"), 1, "cannot write home-file/x.jsonl"),
    ],
)
@pytest.mark.usefixtures("here")
def test_an_identity_that_cannot_be_is_refused(
    words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("home-file").write_text("not a folder")
    Path("latin.toml").write_bytes(b"a = '\xe9'")
    assert identity(*words) == code
    assert message in capsys.readouterr().err
    assert not Path("identity.jsonl").exists()
