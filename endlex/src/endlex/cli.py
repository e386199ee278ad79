"""`endlex`: one command with subcommands; the only place that parses arguments.

What a subcommand does is a function of `endlex.commands`, imported when it is asked for, so that
`--help` is quick and the client needs nothing but Python. Failures exit with 1, wrong usage with 2.

    endlex --help
    endlex verify RUN && echo "nothing is left on this machine"
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from endlex.client.process import replace_unencodable
from endlex.protocol import LEVELS, SCOPES, EndlexError
from endlex.search import HELP

Add = Callable[[argparse.ArgumentParser], None]
STDOUT = 1
FORMATS = ("csv", "json", "parquet", "html")
RUN_HELP = "a run's directory here, or its id, name or project/name on the server"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure, 2 for wrong usage, 130."""
    replace_unencodable()
    words = list(sys.argv[1:] if argv is None else argv)
    options = vars(build_parser().parse_args(_shield(words)))
    module, function = options.pop("command_function").split(":")
    try:
        command = getattr(importlib.import_module(f"endlex.commands.{module}"), function)
        return int(command(**options))
    except EndlexError as error:
        print(f"endlex: {error}", file=sys.stderr)
        return int(getattr(error, "exit_status", 1))
    except BrokenPipeError:  # `endlex ls | head`: no error, and nobody to flush the rest to
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return 1
    except OSError as error:
        print(f"endlex: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nendlex: interrupted", file=sys.stderr)
        return 130


def _shield(words: list[str]) -> list[str]:
    """Let `--sort -NAME`, and `-word` in a search, pass: argparse takes both for options."""
    if "--sort" in words[:-1] and words[words.index("--sort") + 1][:1] == "-":
        at = words.index("--sort")
        words[at : at + 2] = [f"--sort={words[at + 1]}"]
    if words[:1] == ["ls"]:
        words = [f" {w}" if w[:1] == "-" != w[1:2] and w not in ("-", "-h") else w for w in words]
    return words


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="endlex",
        description="Telemetry and checkpoints of training runs, kept on your own server.",
        epilog="The server is --url or ENDLEX_URL; the token is ENDLEX_TOKEN or the file "
        "~/.config/endlex/token, never an argument, where other users could read it.",
    )
    parser.add_argument("--version", action="version", version=f"endlex {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, function, text, add in COMMANDS:
        _add_command(commands, name, function, text, add)
    _add_group(commands, "import", "bring runs of other tools into a run directory", IMPORTS)
    _add_group(commands, "token", "make, list and revoke a server's tokens", TOKENS)
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("endlex")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add_command(commands: Any, name: str, function: str, text: str, add: Add) -> None:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command_function=function)
    add(parser)


def _add_group(
    commands: Any, name: str, text: str, members: Sequence[tuple[str, str, str, Add]]
) -> None:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    group = parser.add_subparsers(metavar="COMMAND", required=True)
    for member in members:
        _add_command(group, *member)


def _number(
    kind: Callable[[str], Any], smallest: float, largest: float = inf
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        number = kind(text)
        if not smallest <= number <= largest:
            bounds = f"from {smallest:g}" + (f" to {largest:g}" if largest < inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return number

    parse.__name__ = "number"
    return parse


def _at_least(smallest: int) -> Callable[[str], Any]:
    return _number(int, smallest)


def _url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the server's address (default: ENDLEX_URL)")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"search:\n  {HELP.replace(chr(10), chr(10) + '  ')}"
    parser.add_argument("query", nargs="*", help="a search, as shown below")
    parser.add_argument("--project", help="only this project's runs")
    parser.add_argument("--group", help="only this group's runs")
    parser.add_argument("--sort", help="a column or a metric; -NAME turns the order round")
    parser.add_argument("--archived", action="store_true", help="the archived runs instead")
    parser.add_argument("--limit", type=_at_least(1), default=50, help="rows (default 50)")
    parser.add_argument("--ids", action="store_true", help="print ids alone, for other commands")
    parser.add_argument(
        "--local", action="store_true", help="the run directories on this machine instead"
    )
    _url(parser)
    _json(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    _url(parser)
    _json(parser)


def _watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument(
        "--metric", action="append", default=[], help="plot this one; may be repeated"
    )
    parser.add_argument(
        "--every", type=_number(float, 0.1, 86_400), default=2.0, help="seconds between looks (2)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    _url(parser)


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="run", help=RUN_HELP)
    parser.add_argument("--metric", action="append", default=[], help="only these metrics")
    _url(parser)
    _json(parser)


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="id, name or project/name")
    _url(parser)


def _tag(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    for name in ("add", "remove"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="TAG")


def _note(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="id, name or project/name")
    parser.add_argument("text", help="the notes; - reads them from standard input")
    _url(parser)


def _group(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    parser.add_argument("--name", required=True, help="the group; '' takes the runs out of theirs")


def _rename(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="id, name or project/name")
    parser.add_argument("name", help="the new name")
    _url(parser)


def _archive(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    parser.add_argument("--undo", action="store_true", help="bring them back")


def _delete(parser: argparse.ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _alert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "add", "remove"))
    parser.add_argument("rule", nargs="?", help="a comparison such as 'val/bpb > 2'")
    parser.add_argument("--project", help="whose runs it is for (default: all)")
    parser.add_argument(
        "--minutes", type=_number(float, 0), default=0.0, help="how long it must hold (0)"
    )
    parser.add_argument("--level", choices=LEVELS, default="warning", help="(warning)")
    _url(parser)
    _json(parser)


def _sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="run directories (default: every run on this machine)",
    )
    parser.add_argument(
        "--drop-failed",
        action="store_true",
        help="give up checkpoints that can never be sent, such as those that were rewritten",
    )
    parser.add_argument(
        "--resend",
        action="store_true",
        help="send journals that differ from the server's copies as new sessions, so both are kept",
    )
    _url(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run directories, or ids or names of runs here (default: every run on this machine)",
    )
    _url(parser)
    _json(parser)


def _pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="RUN, RUN@STEP, RUN@last, RUN@best or RUN@NAME")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where its files go")
    _url(parser)


def _push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="the checkpoint: a file or a directory")
    parser.add_argument("--run", help=f"{RUN_HELP} (default: a new run)")
    parser.add_argument("--project", help="of a new run (default: the directory's name)")
    parser.add_argument("--name", help="the checkpoint's (default: the file's or directory's)")
    parser.add_argument("--step", type=_at_least(0), default=0, help="the step it is of (0)")
    parser.add_argument(
        "--alias", action="append", default=[], help="such as best; may be repeated"
    )
    _url(parser)


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="only this run's checkpoints: id, name or project/name")
    parser.add_argument("--project", help="only this project's")
    parser.add_argument("--keep-last", type=_at_least(1), help="keep the newest N of each run")
    parser.add_argument("--keep-best", metavar="METRIC", help="keep the one with the best METRIC")
    parser.add_argument("--mode", choices=("min", "max"), default="min", help="what is best (min)")
    parser.add_argument("--keep-every", type=_at_least(1), help="keep steps divisible by N")
    parser.add_argument("--deleted", action="store_true", help="remove deleted runs for good")
    parser.add_argument("--dry-run", action="store_true", help="only print what would go")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    _url(parser)
    _json(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("--format", choices=FORMATS, help="default: by the file's name, else csv")
    parser.add_argument("-o", "--output", type=Path, help="a file (default: standard output)")
    _url(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument(
        "--port",
        type=_number(int, 0, 65_535),
        default=None,
        help="default 8817; 0 takes a free one",
    )
    _data(parser)
    parser.add_argument(
        "--public", action="store_true", help="ask everyone for a token; needed beyond loopback"
    )
    parser.add_argument("--trusted-proxy", help="address of a proxy whose headers are believed")
    parser.add_argument(
        "--root-path", default="", help="path under which a proxy shows it: /endlex"
    )
    parser.add_argument("--tls-cert", type=Path, help="certificate (PEM), to serve HTTPS itself")
    parser.add_argument("--tls-key", type=Path, help="the certificate's private key (PEM)")
    parser.add_argument(
        "--alert",
        action="append",
        default=[],
        metavar="URL",
        dest="alerts",
        help="where alerts go: https:// (JSON, or Slack's or Discord's form by the host), "
        "slack+https://, discord+https://, ntfy+https://, smtps://USER:PASSWORD@HOST/?to=ADDRESS; "
        "may be repeated; ENDLEX_ALERTS holds more, with spaces between them",
    )
    parser.add_argument("--alert-webhook", help="a URL that gets each alert as JSON")
    parser.add_argument("--ntfy", help="URL of an ntfy topic that gets each alert as text")
    parser.add_argument(
        "--stall-minutes",
        type=_number(float, 1e-9),
        default=10.0,
        help="silence that is an alert (10)",
    )
    parser.add_argument(
        "--min-free-gb",
        type=_number(float, 1e-9),
        help="disk that uploads leave free (1, or 2 %% of the disk)",
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        help="the server's data directory (default: ENDLEX_HOME or ~/.local/share/endlex)",
    )


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="*", type=Path, help="run directories to look at too")
    _url(parser)
    _json(parser)


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="the file, or a directory that holds some")
    parser.add_argument("--project", help="instead of the runs' own")
    parser.add_argument(
        "--to", type=Path, help="where run directories go (default: ENDLEX_DIR or endlex-runs)"
    )


def _token_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="what it is for, such as the box's name")
    parser.add_argument(
        "--scope",
        required=True,
        help="comma-separated: "
        + "; ".join(f"{scope}: {allowed}" for scope, allowed in SCOPES.items()),
    )
    parser.add_argument(
        "--run", action="append", default=[], help="id of a run to make its own; may be repeated"
    )
    _data(parser)


def _token_grant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("token", help="the token's name or id, as `endlex token list` prints them")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="id of a run")
    _data(parser)


def _token_list(parser: argparse.ArgumentParser) -> None:
    _data(parser)
    _json(parser)


def _token_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("token", help="its name or id, as `endlex token list` prints them")
    _data(parser)


COMMANDS: tuple[tuple[str, str, str, Add], ...] = (
    ("ls", "listing:ls", "list runs", _ls),
    ("show", "listing:show", "print one run: metrics, configuration, checkpoints", _show),
    ("watch", "watch:watch", "plot a run in the terminal while it goes on", _watch),
    ("compare", "listing:compare", "print what differs between runs", _compare),
    ("tag", "edit:tag", "add and remove tags of runs", _tag),
    ("note", "edit:note", "replace a run's notes", _note),
    ("group", "edit:group", "put runs into a group", _group),
    ("rename", "edit:rename", "give a run another name", _rename),
    ("archive", "edit:archive", "hide runs from the lists", _archive),
    ("delete", "edit:delete", "delete runs", _delete),
    ("alert", "edit:alert", "list, add or remove rules that raise alerts", _alert),
    ("sync", "sync:sync", "send run directories to the server, until all is there", _sync),
    ("verify", "verify:verify", "say whether this machine can be torn down", _verify),
    ("pull", "checkpoints:pull", "download a checkpoint, verified", _pull),
    ("push", "checkpoints:push", "upload a checkpoint", _push),
    ("prune", "prune:prune", "remove checkpoints that no rule keeps", _prune),
    ("export", "export:export", "write a run as CSV, JSON, Parquet or HTML", _export),
    ("serve", "serve:serve", "run the server and its dashboard", _serve),
    ("doctor", "doctor:doctor", "check the installation, the server and the journals", _doctor),
)
IMPORTS: tuple[tuple[str, str, str, Add], ...] = (
    ("wandb", "imports:from_wandb", "import wandb's offline runs", _import),
    ("trackio", "imports:from_trackio", "import trackio's databases", _import),
    ("neptune", "imports:from_neptune", "import neptune-exporter's Parquet files", _import),
    ("tensorboard", "imports:from_tensorboard", "import TensorBoard's event files", _import),
)
TOKENS: tuple[tuple[str, str, str, Add], ...] = (
    ("create", "tokens:create", "make a token and print it, once", _token_create),
    (
        "grant",
        "tokens:grant",
        "make runs a token's own, such as those of another box",
        _token_grant,
    ),
    ("list", "tokens:list_all", "list the tokens, without their secrets", _token_list),
    ("revoke", "tokens:revoke", "make a token worthless", _token_revoke),
)
