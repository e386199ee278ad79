"""`archerchat chat` and `archerchat sample`: what a model writes, in the terminal.

archerchat chat                          # /help lists the commands
archerchat chat -p "What is 6 times 7?"  # one answer
archerchat sample                        # text with and without a prompt
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from archerchat.config import StageName
from archerchat.console import build_console
from archerchat.errors import UsageError
from archerchat.files import explained_writes
from archerchat.home import Home
from archerchat.inference.chat import CHAT_SAMPLING, ChatSession
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, ModelOptions
from archerchat.inference.sampling_params import SamplingParams, derive_seed
from archerchat.inference.sequence import Event, Request
from archerchat.inference.tools import PartType
from archerchat.tasks.conversation import write_lines

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
OPENING = {"text": "", "python": "[", "python_output": "[= "}
ENDINGS = {
    "length": "the context is full: /clear begins a new conversation",
    "max_tokens": "cut at /max_tokens",
}
SAMPLE_SAMPLING = SamplingParams(max_new_tokens=96, temperature=0.7, top_k=50, num_samples=3)
PROMPTS = (
    "The capital of France is",
    "If yesterday was Friday, then tomorrow will be",
    "def __init__(self",
    "Return a list of",
)
MAX_ROWS = 16
"""Most samples to generate at a time."""
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")
"""A model may write any byte; bytes that control a terminal are replaced."""


@dataclass(frozen=True)
class ChatConfig(ModelOptions):
    """Talk to a model in the terminal."""

    prompt: str | None = None
    """Answer this one message and exit (-p). By default, chat interactively."""
    source: StageName = "sft"
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
    if sys.stdin.isatty():
        console.print("/help lists the commands", style="dim")
        _keep_history(home.root / "chat_history")
    Dialogue(session, console).run()


class Dialogue:
    """Read messages and commands, one per line, until there are no more."""

    def __init__(self, session: ChatSession, console: Console) -> None:
        self.session, self.console = session, console

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
        match word:
            case "":
                return
            case "/clear":
                self.session.clear()
                self.console.print("a new conversation", style="dim")
            case "/temperature" | "/top_k" | "/max_tokens":
                self._set(word, rest.strip())
            case "/save":
                self._save(rest.strip())
            case "/help":
                self.console.print(HELP)
            case _ if word.startswith("/") and not word.startswith("//"):
                raise UsageError(f"there is no {word}: /help lists the commands")
            case _:
                message = line.strip()[1:] if word.startswith("//") else line
                show_answer(self.session, message, self.console)

    def _set(self, command: str, text: str) -> None:
        name = "max_new_tokens" if command == "/max_tokens" else command[1:]
        kind = float if name == "temperature" else int
        if text:
            try:
                value: Any = None if (name, text.lower()) == ("top_k", "none") else kind(text)
                self.session.params = replace(self.session.params, **{name: value})
            except ValueError as error:
                raise UsageError(f"{command} takes a number, not {text!r}") from error
        self.console.print(f"{command[1:]} is {getattr(self.session.params, name)}", style="dim")

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save takes the name of a file")
        if not self.session.turns:
            raise UsageError("there is nothing to save yet")
        path = Path(text).expanduser()
        with explained_writes(path, UsageError, "choose another name"):
            if path.exists():
                raise UsageError(f"{path} exists: choose another name")
            write_lines(path, [self.session.to_conversation()])
        self.console.print(f"{len(self.session.turns)} turn(s) in {path}", style="dim")


def show_answer(session: ChatSession, message: str, console: Console) -> None:
    """Print the answer while it is generated; Ctrl-C stops it.

    A calculator call is shown as `[6*7 = 42]`.

    Raises:
        UsageError: there is nothing to answer, or no room for an answer.
    """
    pieces = session.answer(message)
    if session.forgotten:
        console.print(
            f"the context is full: the oldest {session.forgotten} turn(s) are left out", style="dim"
        )
    part: PartType = "text"
    try:
        for piece in pieces:
            if piece.starts:
                is_result = (part, piece.type) == ("python", "python_output")
                closing = "" if part == "text" or is_result else "]"
                opening = " = " if is_result else OPENING[piece.type]
                console.print(closing + opening, end="", style="cyan")
                part = piece.type
            style = None if part == "text" else "cyan"
            console.print(piece.text.translate(CONTROLS), end="", style=style)
            console.file.flush()
        ending = ENDINGS.get(session.completion.finish_reason or "")
    except KeyboardInterrupt:
        pieces.close()
        ending = "stopped"
    console.print("" if part == "text" else "]", style="cyan")
    if ending:
        console.print(ending, style="dim")


def _keep_history(path: Path) -> None:
    """Let arrow keys recall lines, including those of earlier sessions."""
    try:
        import readline  # here, since importing it changes how `input` reads
    except ImportError:  # not every Python is built with it
        return
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)

    @atexit.register
    def write() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


@dataclass(frozen=True)
class SampleConfig(ModelOptions):
    """Print samples of a model, with and without prompts."""

    source: StageName = "base"
    """Stage to load: base, sft or rl."""
    prompt: str | None = None
    """Text to continue. By default, a few built-in prompts, then samples without a prompt."""
    sampling: SamplingParams = SAMPLE_SAMPLING


def sample(config: SampleConfig, home: Home) -> None:
    """Load a model and print samples, token by token."""
    config.sampling.refuse_changes("logprobs")
    loaded, _ = config.load(home, config.source)
    print_samples(loaded, config, build_console())


def print_samples(loaded: LoadedModel, config: SampleConfig, console: Console) -> None:
    """Print the samples that `config` asks for."""
    params, tokenizer = config.sampling, loaded.tokenizer
    prompts = list(PROMPTS) if config.prompt is None else []
    prompts += [config.prompt or ""] * params.num_samples
    params = replace(
        params, stop_token_ids=(tokenizer.bos_id, *params.stop_token_ids), num_samples=1
    )
    requests = [
        Request(
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            replace(params, seed=derive_seed(params.seed, number)),
            decode=tokenizer.decode,
        )
        for number, prompt in enumerate(prompts)
    ]
    events = Engine(loaded.model, max_batch=min(len(requests), MAX_ROWS)).stream(requests)
    waiting: list[list[Event]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        console.rule("prompted" if prompt else "no prompt", align="left")
        console.print(prompt, end="", style="bold")
        for event in _in_turn(events, waiting, number):
            console.print(event.text.translate(CONTROLS), end="")
        console.print()


def _in_turn(events: Iterator[Event], waiting: list[list[Event]], number: int) -> Iterator[Event]:
    """Yield the events of request `number`; those of later requests wait for their turn."""
    for event in chain(waiting[number], events):
        if event.request != number:
            waiting[event.request].append(event)
            continue
        yield event
        if event.finish_reason is not None:
            return
