"""`archerchat chat`: talk to a model in the terminal.

archerchat chat                          # /help lists the commands
archerchat chat -p "What is 6 times 7?"  # one answer
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from archerchat.commands.sample import CONTROLS
from archerchat.console import build_console
from archerchat.errors import UsageError
from archerchat.files import write_bytes
from archerchat.home import Home
from archerchat.inference.chat import CHAT_SAMPLING, ChatSession
from archerchat.inference.engine import Engine
from archerchat.inference.loading import ModelOptions
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import PartType, Piece

HELP = """\
/clear            start a new conversation
/temperature X    0 always takes the most likely token, larger values vary more
/top_k N          sample from the N most likely tokens; `none` samples from all
/max_tokens N     most tokens of an answer
/save FILE        write the conversation as a line of JSON, which `archerchat sft` can read
/help             this list
/quit             leave (or Ctrl-D)
Ctrl-C stops an answer. To send a message that starts with a slash, type two slashes."""
HISTORY_LINES = 1000


@dataclass(frozen=True)
class ChatConfig(ModelOptions):
    """Talk to a model in the terminal."""

    prompt: str | None = None
    """Answer this one message and exit (-p). By default, chat interactively."""
    source: Literal["sft", "rl", "base"] = "sft"
    """Stage to load: base, sft or rl."""
    system: str | None = None
    """System message, which comes before the first message."""
    sampling: SamplingParams = CHAT_SAMPLING
    compile: bool = False
    """Compile the model on CPUs: takes some seconds and makes answers faster."""


def chat(config: ChatConfig, home: Home) -> None:
    """Load a model and answer."""
    config.sampling.refuse_changes("num_samples", "logprobs")
    loaded, _ = config.load(home, config.source)
    engine = Engine(loaded.model, max_batch=1, compile=config.compile)
    session = ChatSession(engine, loaded.tokenizer, config.sampling, config.system)
    console = build_console()
    if config.prompt is not None:
        show_answer(session, config.prompt, console)
        return
    if not sys.stdin.isatty():
        Dialogue(session, console).run()
        return
    console.print("/help lists the commands", style="dim")
    _keep_history(home.root / "chat_history")
    Dialogue(session, console).run()


class Dialogue:
    """Read messages and commands, one per line, until there are no more."""

    def __init__(self, session: ChatSession, console: Console) -> None:
        self.session, self.console = session, console
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/temperature": lambda text: self._set("temperature", float, text),
            "/top_k": lambda text: self._set("top_k", _count_or_none, text),
            "/max_tokens": lambda text: self._set("max_new_tokens", int, text),
            "/save": self._save,
            "/help": lambda text: self.console.print(HELP),
        }

    def run(self) -> None:
        """Read until /quit or the end of the input."""
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("\n/quit or Ctrl-D leaves", style="dim")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except UsageError as error:
                self.console.print(f"error: {error}", style="red")

    def take(self, line: str) -> None:
        """Answer a message or run a command.

        Raises:
            UsageError: the line cannot be understood; the conversation is unchanged.
        """
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        if word.startswith("//"):
            show_answer(self.session, line.strip()[1:], self.console)
        elif not word.startswith("/"):
            show_answer(self.session, line, self.console)
        elif word in self._commands:
            self._commands[word](rest.strip())
        else:
            raise UsageError(f"there is no {word}: /help lists the commands")

    def _clear(self, text: str) -> None:
        self.session.clear()
        self.console.print("a new conversation", style="dim")

    def _set(self, name: str, parse: Callable[[str], Any], text: str) -> None:
        command = name.replace("_new", "")
        if text:
            try:
                self.session.params = replace(self.session.params, **{name: parse(text)})
            except ValueError as error:
                raise UsageError(f"/{command} takes a number, not {text!r}") from error
        self.console.print(f"{command} is {getattr(self.session.params, name)}", style="dim")

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save takes the name of a file")
        if not self.session.turns:
            raise UsageError("there is nothing to save yet")
        path = Path(text).expanduser()
        if path.exists():
            raise UsageError(f"{path} exists: choose another name")
        try:
            line = json.dumps(self.session.to_conversation(), ensure_ascii=False)
            write_bytes(path, f"{line}\n".encode())
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        self.console.print(f"{len(self.session.turns)} turn(s) in {path}", style="dim")


def _count_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def show_answer(session: ChatSession, message: str, console: Console) -> None:
    """Print the answer while it is generated; Ctrl-C stops it.

    Raises:
        UsageError: there is nothing to answer, or no room for an answer.
    """
    pieces = session.answer(message)
    if session.forgotten:
        console.print(
            f"the context is full: the oldest {session.forgotten} turn(s) are left out", style="dim"
        )
    printer, stopped = _AnswerPrinter(console), False
    try:
        for piece in pieces:
            printer.show(piece)
    except KeyboardInterrupt:
        pieces.close()
        stopped = True
    printer.end()
    if stopped:
        console.print("stopped", style="dim")
    elif session.completion.finish_reason == "length":
        console.print("the context is full: /clear begins a new conversation", style="dim")
    elif session.completion.finish_reason == "max_tokens":
        console.print("cut at /max_tokens", style="dim")


class _AnswerPrinter:
    """Print pieces of an answer; a calculator call is shown as `[6*7 = 42]`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open: PartType = "text"

    def show(self, piece: Piece) -> None:
        """Print a piece, and the bracket or sign between it and the part before."""
        if piece.starts:
            if piece.type == "python_output" and self._open == "python":
                self._write(" = ")
            else:
                self._close()
                if piece.type != "text":
                    self._write("[" if piece.type == "python" else "[= ")
            self._open = piece.type
        self._write(piece.text.translate(CONTROLS))

    def end(self) -> None:
        """End the answer's last line."""
        self._close()
        self._console.print()

    def _close(self) -> None:
        if self._open != "text":
            self._write("]")
            self._open = "text"

    def _write(self, text: str) -> None:
        style = None if self._open == "text" and text not in ("[", "]", "[= ") else "cyan"
        self._console.print(text, end="", style=style)
        self._console.file.flush()


def _keep_history(path: Path) -> None:
    """Let arrow keys recall lines, including those of earlier sessions."""
    try:
        import readline  # here, since importing it changes how `input` reads
    except ImportError:  # not every Python is built with it
        return
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)

    def write() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(write)
