"""The command line: what it offers, and what it says and does to bad input."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from archerchat import __version__, cli
from archerchat.cli import COMMANDS, RARE, Command, main, parse
from archerchat.errors import CheckpointError, UsageError
from archerchat.training.pretrain import PretrainConfig


def all_commands() -> Iterator[tuple[str, Command]]:
    for name, entry in COMMANDS.items():
        if isinstance(entry, Command):
            yield name, entry
        else:
            yield from ((f"{name} {sub}", command) for sub, command in entry.items())


def exit_of(words: list[str]) -> int:
    """Return the exit code of `archerchat` with these words."""
    try:
        return main(words)
    except SystemExit as stopped:
        return cast(int, stopped.code)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert exit_of(words) == 0
    output = capsys.readouterr().out
    for name, command in all_commands():
        assert f"  {name:22} {command.help}\n" in output


GROUPS = {
    "dial": "depth",
    "checkpoint": "save_every",
    "telemetry": "push_checkpoints",
    "corpus": "val_fraction",
    "sampling": "temperature",
    "runtime": "device",
    "prices": "price_per_kwh",
}
"""One flag of each group of flags, by the name of its field."""


@pytest.mark.parametrize("name", [name for name, _ in all_commands()])
def test_every_flag_of_every_command_has_help(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert exit_of([*name.split(), "--help"]) == 0
    output = capsys.readouterr().out
    command = dict(all_commands())[name]
    function, config = command.load()
    assert callable(function)
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field in dataclasses.fields(config):
        shown = GROUPS.get(field.name, field.name)
        assert f"--{shown.replace('_', '-')}" in output or shown.upper() in output
    for nothing in ("None", "False", ")"):
        assert f"default: {nothing}" not in output


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert exit_of([*words]) == 0
    return capsys.readouterr().out


def test_h_lists_the_usual_flags_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    short, full = (help_of(capsys, "pretrain", word) for word in ("-h", "--help"))
    assert help_of(capsys, "pretrain", "-H") == full
    assert len(short.splitlines()) < 50 < 120 < len(full.splitlines())
    assert "`archerchat pretrain --help` has all" in short
    assert "--save-every {none}|INT|{time}" in short
    groups = [short.index(name) for name in ("dial options", "--depth INT", "--max-seq-len")]
    assert groups == sorted(groups)
    assert groups[-1] < short.index("checkpoint options")


def test_what_h_leaves_out_is_in_the_full_help(capsys: pytest.CaptureFixture[str]) -> None:
    full = "".join(help_of(capsys, name, "--help") for name in ("pretrain", "sft"))
    short = "".join(
        help_of(capsys, name, "-h") for name, command in all_commands() if command.stage
    )
    for name in RARE.split():
        flag = re.compile(rf"--{name.replace('_', '-')}[ ,\n]")
        assert flag.search(full)
        assert not flag.search(short)
    assert parse(["pretrain", "--depth", "4", "--matrix-lr", "0.1"]).config.dial.matrix_lr == 0.1


def test_the_help_of_sft_says_what_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("-h", "--help"):
        output = " ".join(help_of(capsys, "sft", word).split())
        assert "The default is downloaded." in output
        assert "--mixture none --jsonl FILE" in output


def test_the_references_flags_keep_their_names() -> None:
    words = "--depth 4 --device-batch-size 8 --total-batch-size 8192 --target-param-data-ratio 8"
    more = "--num-iterations 9 --window-pattern L --max-seq-len 256 --eval-every 5 --run r"
    parsed = parse(["pretrain", *words.split(), *more.split(), "--model-tag", "m"])
    config: PretrainConfig = parsed.config
    assert (config.dial.depth, config.dial.window_pattern) == (4, "L")
    assert (config.dial.total_batch_size, config.dial.num_iterations) == (8192, 9)
    assert (config.dial.target_param_data_ratio, config.dial.max_seq_len) == (8.0, 256)
    assert (config.device_batch_size, config.eval_every) == (8, 5)
    assert (config.run, config.model_tag, config.checkpoint.resume_from_step) == ("r", "m", None)
    off = "--eval-every -1 --sample-every None --save-every=-1 --core-metric-every none"
    config = parse(["pretrain", "--depth", "4", *off.split(), "--num_iterations", "-1"]).config
    assert (config.eval_every, config.sample_every, config.checkpoint.save_every) == (
        None,
        None,
        None,
    )
    assert (config.core_metric_every, config.dial.num_iterations) == (None, None)


def test_none_is_a_text_where_texts_are_expected() -> None:
    for text in ("none", "None", "NONE", "-1"):
        assert parse(["chat", "-p", text, "--top-k", text]).config.prompt == text
        assert parse(["chat", f"--prompt={text}", "--top-k", text]).config.sampling.top_k is None
    assert parse(["compare", "a", "b", "--json", "none"]).config.json == Path("none")


def test_flags_have_their_usual_names_in_every_command() -> None:
    assert parse(["sample", "-p", "Hi", "--max-tokens", "3"]).config.prompt == "Hi"
    for command in ("chat", "sample", "eval chat"):
        words = [*command.split(), "--max-tokens=3"]
        assert parse(words).config.sampling.max_new_tokens == 3


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(["--version"]) == 0
    assert capsys.readouterr().out == f"archerchat {__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from archerchat.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "pretrian",
            "archerchat has no command 'pretrian'; did you mean pretrain?\n",
        ),
        ("eval core", "archerchat eval has no command 'core'; choose from base, chat\n"),
        ("pretrain --depth 2 --bogus 7", "--bogus"),
        ("pretrain --depht 6", "--depht"),
        ("tokenizer train --nam x", "Perhaps you meant"),
        ("pretrain --depth 2 --num-iteration", "--num-iteration"),
        ("pretrain --depth 2 surplus", "surplus"),
        ("pretrain", "--depth"),
        ("pretrain --depth", "--depth"),
        ("pretrain --depth two", "'two'"),
        ("pretrain --depth 2 --device tpu", "'tpu'"),
        ("pretrain --depth 2 --dtype int8", "'int8'"),
        ("pretrain --depth 2 --packing worst-fit", "'worst-fit'"),
        ("sample --temperature warm", "'warm'"),
        ("pretrain --resume", "Missing value for argument '--resume'"),
        ("sft --resume --num-iterations 2", "Missing value for argument '--resume'"),
    ],
)
def test_what_cannot_be_parsed_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert exit_of(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UsageError("no such thing"), 2, "error: no such thing\n"),
        (CheckpointError("broken"), 1, "error: broken\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 1, ""),
        (OSError(28, "No space left", "x"), 1, "error: [Errno 28] No space left: 'x'; check the"),
    ],
)
def test_failures_become_exit_codes_and_messages(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(config: Any, home: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "parse", lambda argv: cli.Parsed(fail, None))
    assert main([]) == code
    assert capsys.readouterr().err.startswith(message)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parse", lambda argv: cli.Parsed(lambda config, home: 1 / 0, None))
    with pytest.raises(ZeroDivisionError):
        main([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 0}, "--num-iterations is 0; it must be at least 1"),
        ({"num_iterations": -5}, "--num-iterations is -5"),
        ({"depth": 0}, "--depth is 0"),
        ({"aspect_ratio": -1}, "--aspect-ratio is -1"),
        ({"head_dim": 7}, "head dimension 7"),
        ({"max_seq_len": 0}, "--max-seq-len is 0"),
        ({"window_pattern": "SXL"}, "'SXL' may hold only the letters S and L"),
        ({"total_batch_size": 0}, "--total-batch-size is 0"),
        ({"device_batch_size": 0}, "--device-batch-size is 0"),
        ({"device_batch_size": 3}, "use --total-batch-size 576 or --device-batch-size 2"),
        ({"matrix_lr": "nan"}, "--matrix-lr is nan"),
        ({"matrix_lr": -0.1}, "--matrix-lr is -0.1"),
        ({"warmdown_ratio": 1.5}, "--warmdown-ratio is 1.5"),
        ({"target_flops": "inf"}, "--target-flops is inf"),
        ({"eval_every": 0}, "--eval-every is 0; it must be at least 1"),
        ({"eval_tokens": 0}, "--eval-tokens is 0"),
        ({"save_every": -2}, "--save-every is -2"),
        ({"sample_every": 0}, "--sample-every is 0"),
        ({"keep_last": 0}, "--keep-last is 0"),
        ({"seed": -1}, "--seed is -1; it must be at least 0 and at most 2**63 - 1"),
        ({"seed": 2**70}, "--seed is 118"),
        ({"model_tag": "../elsewhere"}, "model tag '../elsewhere' cannot be a directory's name"),
        ({"run": "a/b"}, "run name 'a/b' cannot be"),
        ({"tokenizer": ""}, "tokenizer name '' cannot be"),
        ({"resume_from_step": 2, "model_tag": "new"}, "leave --resume-from-step out"),
        ({"attention": "flash"}, "flash"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    before = tiny_home.listing()
    assert tiny_home.pretrain(**changes) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert tiny_home.listing() == before


def test_a_device_that_is_not_here_is_named_with_those_that_are(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tiny_home.pretrain(device="cuda") == 2
    assert "device 'cuda' is not on this machine, which has: cpu" in capsys.readouterr().err
    assert tiny_home.run("sample", "--device", "cuda") == 2


def fails(home: Any, words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run a command that must fail; return its message, after comparing what was on disk."""
    before = home.listing()
    assert home.run(*words) == code
    after = home.listing()
    assert {name: after.get(name) for name in before} == before
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


def test_no_data(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(tiny_home, tiny_home.pretrain_words(data="nothing"), capsys, code=2)
    assert "no data 'nothing' under" in message
    assert "there is tiny" in message
    assert tiny_home.steps() == []


def test_one_shard_only(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in sorted(tiny_home.data_dir("tiny").iterdir())[1:]:
        shard.unlink()
    message = fails(tiny_home, tiny_home.pretrain_words(), capsys)
    assert "holds 1 shard; two are needed, the last being validation" in message


@pytest.mark.parametrize("shard", [0, -1])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "text"])
def test_a_broken_shard(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], shard: int, damage: str
) -> None:
    path = sorted(tiny_home.data_dir("tiny").iterdir())[shard]
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 3] ^= 1
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "altered": content,
            "empty": b"",
            "text": b"not Parquet at all",
        }[damage]
    )
    words = tiny_home.pretrain_words(eval_every=9, packing="best-fit")  # fills its buffer
    message = fails(tiny_home, words, capsys)
    assert f"cannot read {path} as Parquet" in message
    assert "delete it and download or build it again" in message


def test_no_tokenizer(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(tiny_home, tiny_home.pretrain_words(tokenizer="nothing"), capsys, code=2)
    assert "make one with `archerchat tokenizer train`" in message


def test_a_vocabulary_too_small(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer", "train", "--data", "tiny", "--vocab-size", "200", "--name", "small"]
    message = fails(tiny_home, words, capsys, code=2)
    assert "vocabulary size 200 is too small" in message
    assert not tiny_home.tokenizer_dir("small").exists()


@pytest.mark.parametrize("file", ["model", "optimizer", "loader", "rng", "meta"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_broken_checkpoint(
    trained_home: Any, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    directory = trained_home.checkpoint_dir("base", "tiny") / "step_000004"
    path = directory / (f"{file}.json" if file == "meta" else f"{file}.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-9])
    else:
        content[-40] ^= 1
        path.write_bytes(content)
    message = fails(trained_home, trained_home.pretrain_words(), capsys)
    assert f"{directory} is damaged: " in message
    assert path.name in message
    assert "step 2 in the same directory is intact: use that one" in message
    if file in ("model", "meta"):
        assert "is damaged" in fails(trained_home, ["sample"], capsys)


def test_the_way_around_a_broken_checkpoint(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = trained_home.checkpoint_dir("base", "tiny") / "step_000004"
    (directory / "model.safetensors").unlink()
    assert trained_home.pretrain(resume_from_step=2) == 0
    assert trained_home.pretrain() == 0
    assert "already trained" in capsys.readouterr().out
    assert trained_home.run("sample", "--max-tokens", "1") == 0


def test_a_model_tag_that_does_not_exist(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["sample"], ["eval", "base"]):
        message = fails(trained_home, [*words, "--model-tag", "huge"], capsys, code=2)
        assert "no base model 'huge' under" in message
        assert "; there is tiny" in message


def test_the_module_is_the_command(tiny_home: Any) -> None:
    command = [sys.executable, "-m", "archerchat.cli"]
    done = subprocess.run([*command, "no"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: archerchat has no command 'no'")
    done = subprocess.run(
        f"{sys.executable} -m archerchat.cli --help | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_what_a_terminal_cannot_show_is_replaced(trained_home: Any) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "archerchat.cli",
            "sample",
            "--prompt",
            "\u65e5\u672c",
            "--max-tokens",
            "1",
        ],
        env=os.environ
        | {
            "ARCHERCHAT_HOME": str(trained_home.root),
            "PYTHONIOENCODING": "cp1252",
            "PYTHONUTF8": "0",
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"??" in done.stdout


def test_commands_that_compile_nothing_do_not_load_the_compiler(tiny_home: Any) -> None:
    """Importing it takes as long again as all the rest."""
    code = "import sys; from archerchat.cli import main; main(['models']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "archerchat.model.attention" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib"}
