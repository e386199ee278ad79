"""`archerchat`: one command with subcommands; the only place that parses arguments.

Each subcommand is a frozen dataclass beside the function that runs it; tyro turns its fields into
flags and their docstrings into help. Only the subcommand that needs a heavy module imports it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from inspect import getdoc
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

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
    stage: str = ""
    """Stage whose saved settings `--resume TAG` loads; empty for commands without it."""

    def load(self) -> tuple[Callable[[Any, Home], object], type[Any]]:
        """Import the function; return it and the type of its configuration."""
        module, name = self.function.split(":")
        function = getattr(importlib.import_module(f"archerchat.{module}"), name)
        return function, get_type_hints(function)["config"]


Group = dict[str, Command]
"""Subcommands by name; the one named "" is what the command does where no other follows."""
COMMANDS: dict[str, Command | Group] = {
    "data": {
        "download": Command("commands.data:download", "download text shards from the hub"),
        "build": Command("commands.data:build", "convert text files to shards"),
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
    "chat": Command("commands.chat:chat", "chat with a model in the terminal"),
    "serve": Command("commands.serve:serve", "serve OpenAI's API and a chat page"),
    "sample": Command("commands.chat:sample", "print text that a model writes"),
    "eval": {
        "base": Command("commands.eval_base:evaluate", "evaluate a base model"),
        "chat": Command("commands.eval_chat:evaluate", "evaluate a chat model"),
    },
    "report": {
        "": Command("commands.report:report", "write a model's training report"),
        "scaling": Command("commands.report:report_scaling", "fit a scaling law to several runs"),
    },
    "compare": Command("commands.report:run_comparison", "compare two runs"),
    "models": {
        "": Command("commands.models:show", "list the models on this machine"),
        "rename": Command("commands.models:rename", "rename a model"),
        "remove": Command("commands.models:remove", "delete a model's checkpoints"),
        "prune": Command("commands.models:prune", "delete a model's older checkpoints"),
    },
    "import": {
        "nanochat": Command(
            "commands.imports:import_nanochat", "import nanochat's checkpoint and tokenizer"
        ),
        "huggingface": Command(
            "commands.imports:import_huggingface", "import a Hugging Face folder"
        ),
    },
    "export": {
        "huggingface": Command(
            "commands.exports:export_huggingface", "write a model as a Hugging Face folder"
        ),
        "conversations": Command(
            "commands.exports:export_conversations", "write conversations for other tools"
        ),
    },
    "push": Command("commands.exports:push", "upload a model to the Hugging Face hub"),
    "pull": Command("commands.imports:pull", "download a model from the hub"),
    "doctor": Command("commands.doctor:doctor", "describe this machine and what is missing"),
}
OFF = ("none", "None", "NONE", "-1")
"""Words that switch an optional flag off."""
ALIASES = {"prompt": ("-p",), "max_new_tokens": ("--max-tokens",)}
"""Other names of fields' flags."""
RARE = """
aspect_ratio head_dim num_kv_heads value_embeddings smear backout residual_lambdas qk_gain preset
embedding_lr unembedding_lr matrix_lr scalar_lr weight_decay warmup_steps warmdown_ratio
final_lr_frac attention sample_prompt packing optimizer_state core_metric_max_per_task core_bundle
mixture_seed eval_tokens push_checkpoints
"""
"""Fields that -h leaves out, since few commands set them; --help describes every one."""


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
    command, path, words = _find(argv)
    function, configuration = command.load()
    saved = {}
    if command.stage:
        resume = argparse.ArgumentParser(path, add_help=False, allow_abbrev=False)
        resume.add_argument("--resume", metavar="TAG", nargs="?", default="auto")
        found, others = resume.parse_known_args(words)
        if found.resume is not None:  # tyro reports a missing tag
            words = others
        if found.resume not in (None, "auto"):  # what every stage does by itself
            load_settings = importlib.import_module("archerchat.training.resume").load_settings
            home = Home.from_environment()
            saved["default"] = load_settings(configuration, home, command.stage, found.resume)
    is_brief = "-h" in words
    usual = f"{getdoc(configuration)}\n\nThese are the usual options; `{path} --help` has all."
    config = tyro.cli(
        configuration,
        prog=path,
        description=usual if is_brief else None,
        args=words,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=_rules(configuration, hidden=RARE.split() if is_brief else ()),
        compact_help=not {"-h", "-H", "--help-verbose"}.isdisjoint(words),
        **saved,
    )
    return Parsed(function, config)


def _find(argv: Sequence[str]) -> tuple[Command, str, list[str]]:
    """Return the subcommand that is asked for, its full name, and the other arguments."""
    words, path = list(argv), "archerchat"
    level: Command | Group | dict[str, Command | Group] = COMMANDS
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
            near = get_close_matches(name, level)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(level)}"
            print(f"error: {path} has no command {name!r}; {hint}", file=sys.stderr)
            raise SystemExit(2)
        level, path = level[name], f"{path} {name}"
    return level, path, words


def _rules(configuration: type[Any], hidden: Collection[str]) -> tc.ConstructorRegistry:
    """Return how tyro reads options that may be left out, and how it describes fields.

    Fields that have to be given come first; those of `configuration` itself are positional.
    Help does not list `hidden` fields.
    """
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
        needed = {f.name for f in fields(info.type) if f.default is f.default_factory is MISSING}
        is_top = info.type is configuration
        described = [
            _described(field, field.name in hidden, is_top and field.name in needed)
            for field in sorted(spec.fields, key=lambda field: field.name not in needed)
        ]
        return replace(spec, fields=tuple(described))

    return rules


def _described(
    field: tc.StructFieldSpec, is_hidden: bool, is_positional: bool
) -> tc.StructFieldSpec:
    """Put a field's help on one line, without a default that says nothing."""

    def describe() -> str:
        text = field.helptext() if callable(field.helptext) else field.helptext
        return " ".join((text or "").split())

    says = isinstance(field.default, str | float | int | Path) and field.default is not False
    hint = tyro.conf.arg(
        metavar=field.name.upper() if is_positional else None,
        aliases=ALIASES.get(field.name),
        help_behavior_hint=None if says else "",
    )
    kind: Any = Annotated[field.type, hint]
    if is_hidden:
        kind = Annotated[kind, tyro.conf.Suppress]
    if is_positional and not is_dataclass(field.type):
        kind = Annotated[kind, tyro.conf.Positional]
    return replace(field, helptext=describe, type=kind)


def _overview(path: str, level: Group | dict[str, Command | Group]) -> str:
    """Return the help of a command that has subcommands."""
    lines = [
        f"usage: {path} COMMAND [OPTIONS]. Run `{path} COMMAND --help` for its options "
        "(-h lists the usual ones).",
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
