"""`endlex`: one command with subcommands; the only place that parses arguments.

The commands and their arguments are those of `cli.toml`. What a command does is a function of
`endlex.commands`, imported when it is asked for, so that `--help` is quick and the client needs
nothing but Python; one that may fail without an error returns its exit status. Failures exit with
1, wrong usage with 2.

    endlex --help
    endlex verify RUN && echo "nothing is left on this machine"
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import endlex
from endlex.client.process import replace_unencodable
from endlex.protocol import SCOPES, EndlexError
from endlex.search import HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure, 2 for wrong usage, 130."""
    replace_unencodable()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["ls"]:  # else argparse takes `-word` and `--sort -NAME` for options
        words = [f" {w}" if w[:1] == "-" != w[1:2] and w not in ("-", "-h") else w for w in words]
    options = vars(build_parser().parse_args(words))
    module, function = options.pop("command_function").split(":")
    try:
        command = getattr(importlib.import_module(f"endlex.commands.{module}"), function)
        return int(command(**options) or 0)
    except BrokenPipeError:  # `endlex ls | head`: no error, and nobody to flush the rest to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (EndlexError, OSError, UnicodeError) as error:  # UnicodeError: of standard input
        print(f"endlex: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, EndlexError) else 1
    except (KeyboardInterrupt, EOFError):  # EOFError: Ctrl-D at a question
        print("\nendlex: interrupted", file=sys.stderr)
        return 130


def read_spec() -> dict[str, Any]:
    """Return what `cli.toml` says: shared arguments, and commands, some with their own commands."""
    return tomllib.loads(Path(__file__).with_name("cli.toml").read_text(encoding="utf-8"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="endlex",
        description="Telemetry and checkpoints of training runs, kept on your own server.",
        epilog="The server is --url or ENDLEX_URL; the token is ENDLEX_TOKEN or the file "
        "~/.config/endlex/token, never an argument, where other users could read it.",
    )
    parser.add_argument("--version", action="version", version=f"endlex {endlex.__version__}")
    spec = read_spec()
    _add_commands(parser, spec["commands"], spec["shared"])
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, commands: dict[str, Any], shared: dict[str, Any]
) -> None:
    inside = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in commands.items():
        text = command["text"]
        one = inside.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if "commands" in command:
            _add_commands(one, command["commands"], shared)
            continue
        one.set_defaults(command_function=command["does"])
        if name == "ls":
            one.formatter_class = argparse.RawDescriptionHelpFormatter
            one.epilog = "search:\n  " + HELP.replace("\n", "\n  ")
        for given in command["args"]:
            options = dict(shared[given] if isinstance(given, str) else given)
            scopes = "; ".join(f"{scope}: {allowed}" for scope, allowed in SCOPES.items())
            options["help"] = options.get("help", "").replace("SCOPES", scopes)
            if "type" in options:
                options["type"] = TYPES[options["type"]]
            one.add_argument(*options.pop("name").split(), **options)


def _number(kind: Callable[[str], Any], smallest: float, largest: float = inf) -> Any:
    def parse(text: str) -> Any:
        number = kind(text)
        if not smallest <= number <= largest:
            bounds = f"from {smallest:g}" + (f" to {largest:g}" if largest < inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return number

    parse.__name__ = "number"
    return parse


TYPES: dict[str, Callable[[str], Any]] = {
    "path": Path,
    "count": _number(int, 1),
    "step": _number(int, 0),
    "port": _number(int, 0, 65_535),
    "amount": _number(float, 0),
    "positive": _number(float, 1e-9),
    "seconds": _number(float, 0.1, 86_400),
    "stripped": str.strip,
    "webhook": lambda url: f"json+{url}" if url else None,
    "ntfy": lambda url: f"ntfy+{url}" if url else None,
}
"""What `type` may say."""
