"""`archerchat`: one command with subcommands; the only place that parses arguments.

Each subcommand is a frozen dataclass beside the function that runs it; tyro turns its fields into
flags and their docstrings into help. Only the subcommand that needs a heavy module imports it.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, cast, get_args, get_type_hints

import tyro
from tyro import constructors as tc

from archerchat import __version__
from archerchat.errors import ArcherChatError
from archerchat.home import Home


@dataclass(frozen=True)
class Command:
    """One subcommand; its configuration is the type of its function's argument `config`."""

    function: str
    """Module below `archerchat` and name, such as "commands.data:build"."""
    help: str
    positional: bool = False
    """Whether required fields are positional arguments."""
    stage: str = ""
    """Stage whose saved settings `--resume TAG` loads; empty for commands without it."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Usual names of flags by their aliases."""

    def load(self) -> tuple[Callable[[Any, Home], object], type[Any]]:
        """Import the function; return it and the type of its configuration."""
        module, name = self.function.split(":")
        function = getattr(importlib.import_module(f"archerchat.{module}"), name)
        return function, get_type_hints(function)["config"]


OFF = ("none", "None", "NONE", "-1")
"""Words that switch an optional flag off."""
MAX_TOKENS = {"--max-tokens": "--max-new-tokens"}
# A subcommand named "" is what its command does where no other follows.
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "data": {
        "download": Command("commands.data:download", "download text shards from the hub"),
        "build": Command("commands.data:build", "convert text files to shards", positional=True),
        "info": Command("commands.data:info", "list the data on this machine"),
        "identity": Command(
            "commands.data:identity", "write conversations about the assistant's identity"
        ),
    },
    "tokenizer": {
        "train": Command("commands.tokenizer:train", "train a tokenizer"),
        "eval": Command(
            "commands.tokenizer:evaluate", "compare its compression with GPT-2's and GPT-4's"
        ),
    },
    "plan": Command("commands.plan:plan", "estimate memory, time and cost of a depth"),
    "pretrain": Command("training.pretrain:pretrain", "train a base model", stage="base"),
    "sft": Command("training.sft:finetune", "fine-tune a base model on conversations", stage="sft"),
    "rl": Command("training.rl:reinforce", "train a chat model by reinforcement", stage="rl"),
    "chat": Command(
        "commands.chat:chat",
        "chat with a model in the terminal",
        short={"-p": "--prompt", **MAX_TOKENS},
    ),
    "serve": Command("commands.serve:serve", "serve OpenAI's API and a chat page"),
    "sample": Command("commands.sample:sample", "print text that a model writes", short=MAX_TOKENS),
    "eval": {
        "base": Command("commands.eval_base:evaluate", "evaluate a base model"),
        "chat": Command("commands.eval_chat:evaluate", "evaluate a chat model"),
    },
    "report": {
        "": Command("commands.report:report", "write a model's training report", positional=True),
        "scaling": Command(
            "commands.report:report_scaling",
            "fit a scaling law to several runs",
            positional=True,
        ),
    },
    "compare": Command("commands.compare:run_comparison", "compare two runs", positional=True),
    "models": {
        "": Command("commands.models:show", "list the models on this machine"),
        "rename": Command("commands.models:rename", "rename a model", positional=True),
        "remove": Command(
            "commands.models:remove", "delete a model's checkpoints", positional=True
        ),
        "prune": Command(
            "commands.models:prune", "delete a model's older checkpoints", positional=True
        ),
    },
    "import": {
        "nanochat": Command(
            "commands.imports:import_nanochat",
            "import nanochat's checkpoint and tokenizer",
            positional=True,
        ),
        "huggingface": Command(
            "commands.imports:import_huggingface",
            "import a Hugging Face folder",
            positional=True,
        ),
    },
    "export": {
        "huggingface": Command(
            "commands.exports:export_huggingface",
            "write a model as a Hugging Face folder",
            positional=True,
        ),
        "conversations": Command(
            "commands.exports:export_conversations",
            "write conversations in a layout of other tools",
            positional=True,
        ),
    },
    "push": Command(
        "commands.exports:push", "upload a model to the Hugging Face hub", positional=True
    ),
    "pull": Command("commands.imports:pull", "download a model from the hub", positional=True),
    "doctor": Command("commands.doctor:doctor", "describe this machine and what is missing"),
}


@dataclass(frozen=True)
class Parsed:
    """A subcommand's function with the configuration that the arguments gave it."""

    function: Callable[[Any, Home], object]
    config: Any


def parse(argv: Sequence[str]) -> Parsed:
    """Turn arguments into a subcommand's function and configuration, without running it.

    Raises:
        UsageError, CheckpointError: `--resume` names a model without settings.
        SystemExit: 0 after --help or --version, 2 for what cannot be parsed.
    """
    words = list(argv)
    level: Command | dict[str, Command] | dict[str, Command | dict[str, Command]] = COMMANDS
    path = "archerchat"
    while isinstance(level, dict):
        if "" in level and (not words or words[0] not in level):  # a command by itself
            level = level[""]
            continue
        name = words.pop(0) if words else "--help"
        if name == "--version" and path == "archerchat":
            print(f"archerchat {__version__}")
            raise SystemExit(0)
        if name in ("-h", "--help"):
            print(_overview(path, level))
            raise SystemExit(0)
        if name not in level:
            known = ", ".join(get_close_matches(name, level) or level)
            print(f"error: {path} has no command {name!r}; it has {known}", file=sys.stderr)
            raise SystemExit(2)
        level, path = level[name], f"{path} {name}"
    function, configuration = level.load()
    words = _renamed(words, level.short)
    saved = {}
    if level.stage and "--resume" in words[:-1]:
        at = words.index("--resume")
        tag = words[at + 1]
        if tag == "auto":  # what every stage does by itself
            del words[at : at + 2]
        else:
            resume = importlib.import_module("archerchat.training.resume")
            home = Home.from_environment()
            saved["default"] = resume.load_settings(configuration, home, level.stage, tag)
    positional = (tyro.conf.PositionalRequiredArgs,) if level.positional else ()
    config = tyro.cli(
        configuration,
        prog=path,
        args=words,
        config=(tyro.conf.OmitArgPrefixes, *positional),
        registry=_rules(),
        compact_help=not {"-h", "-H", "--help-verbose"}.isdisjoint(words),
        **saved,
    )
    return Parsed(function, config)


def _renamed(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Use each flag's usual name, and write `--resume=TAG` as two words."""
    made: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        flag = names.get(flag, flag)
        made += [flag, value] if equals and flag == "--resume" else [flag + equals + value]
    return made


def _rules() -> tc.ConstructorRegistry:
    """Return how tyro reads options that may be left out, and how it describes fields."""
    rules, is_nested = tc.ConstructorRegistry(), False

    @rules.primitive_rule
    def read_none(info: tc.PrimitiveTypeInfo) -> tc.PrimitiveConstructorSpec[None] | None:
        if info.type is not NoneType:
            return None
        return tc.PrimitiveConstructorSpec(
            1, "{none}", lambda words: None, lambda value: value is None, lambda _: ["none"], OFF
        )

    @rules.primitive_rule
    def read_text(info: tc.PrimitiveTypeInfo) -> tc.PrimitiveConstructorSpec[Any] | None:
        kinds = set(get_args(info.type))
        if kinds not in ({str, NoneType}, {Path, NoneType}):
            return None
        (kind,) = kinds - {NoneType}  # of a text, `none` is no special value
        return tc.PrimitiveConstructorSpec(
            1,
            kind.__name__.upper(),
            lambda words: kind(words[0]),
            lambda value: value is None or isinstance(value, kind),
            lambda value: [str(value)],
        )

    @rules.struct_rule
    def describe_fields(info: tc.StructTypeInfo) -> tc.StructConstructorSpec | None:
        nonlocal is_nested
        if is_nested or not is_dataclass(info.type):
            return None
        is_nested = True  # the next call gets tyro's own answer
        spec = tc.ConstructorRegistry.get_struct_spec(info)
        is_nested = False
        assert isinstance(spec, tc.StructConstructorSpec)
        return replace(spec, fields=tuple(map(_described, spec.fields)))

    return rules


def _described(field: tc.StructFieldSpec) -> tc.StructFieldSpec:
    """Put a field's help on one line, without a default that says nothing."""

    def describe() -> str:
        text = field.helptext() if callable(field.helptext) else field.helptext
        return " ".join((text or "").split())

    says = isinstance(field.default, str | float | int | Path) and field.default is not False
    hint = None if says else tyro.conf.arg(help_behavior_hint="")
    return replace(field, helptext=describe, type=cast(Any, Annotated[field.type, hint]))


def _overview(
    path: str, level: dict[str, Command] | dict[str, Command | dict[str, Command]]
) -> str:
    """Return the help of a command that has subcommands."""
    lines = [
        f"usage: {path} COMMAND [OPTIONS]. Run `{path} COMMAND --help` for its options "
        "(-h only lists them).",
        "",
    ]
    for name, entry in level.items():
        if isinstance(entry, Command):
            lines.append(f"  {name:22} {entry.help}")
        else:
            lines += [f"  {f'{name} {sub}':22} {command.help}" for sub, command in entry.items()]
    return "\n".join(lines)


def _speaker() -> str:
    """Wait for this rank's turn to report an error; return a prefix, "" for a single process."""
    if not os.environ.get("RANK"):
        return ""
    from archerchat.distributed import await_turn

    return await_turn(os.environ["RANK"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return 0, 1 for a failure, 2 for wrong usage, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show is replaced
            stream.reconfigure(errors="replace")
    try:
        parsed = parse(sys.argv[1:] if argv is None else argv)
        result = parsed.function(parsed.config, Home.from_environment())
    except ArcherChatError as error:
        print(f"{_speaker()}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk or a missing permission that no other code explained
        print(f"error: {error}; check the disk and its permissions", file=sys.stderr)
        return 1
    return 130 if result is False else 0


if __name__ == "__main__":
    sys.exit(main())
