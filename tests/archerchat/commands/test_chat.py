"""`archerchat chat`: one answer, a dialogue from standard input, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from archerchat.commands.chat import Dialogue, show_answer
from archerchat.errors import UsageError
from archerchat.inference.chat import ChatSession
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams

SCRIPT = (
    "<|assistant_start|>",
    *("So ", "<|python_start|>", "6*7", "<|python_end|>"),
    *("<|output_end|>", "####", "42", "<|assistant_end|>"),
)
SAID = "So [6*7 = 42]####42\n"


@pytest.fixture
def session(scripted: Callable[[Sequence[str]], Any]) -> ChatSession:
    speaker = scripted(SCRIPT)
    params = SamplingParams(32, temperature=0.0)
    return ChatSession(Engine(speaker.model, max_batch=1), speaker.tokenizer, params)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True, markup=False, emoji=False, highlight=False)


def output_of(console: Console) -> str:
    """Return what was printed since the last call."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    console.file.seek(0)
    console.file.truncate()
    return text


def test_calls_of_the_calculator_are_shown(session: ChatSession, console: Console) -> None:
    show_answer(session, "6 times 7?", console)
    assert output_of(console) == SAID


def test_a_dialogue_from_standard_input(
    session: ChatSession, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = ["6 times 7?", "", "/temperature 0.5", "/top_k none", "/top_k", "/clear", "//slash?"]
    lines += ["/temperature 0", "again", f"/save {saved}", f"/save {saved}", "/quit", "not read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    Dialogue(session, console).run()
    said = output_of(console)
    assert said.startswith(
        f"{SAID}temperature is 0.5\ntop_k is None\ntop_k is None\na new conversation\n"
    )
    assert said.endswith(f"2 turn(s) in {saved}\nerror: {saved} exists: choose another name\n")
    assert [turn.message for turn in session.turns] == ["/slash?", "again"]
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["/slash?", "again"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tempreature 1", "there is no /tempreature: /help lists the commands"),
        ("/temperature warm", "/temperature takes a number, not 'warm'"),
        ("/temperature -1", "--temperature is -1.0; it must be at least 0"),
        ("/temperature nan", "--temperature is nan; it must be"),
        ("/top_k 1.5", "/top_k takes a number, not '1.5'"),
        ("/max_tokens 0", "--max-new-tokens is 0; it must be at least 1"),
        ("/save", "/save takes the name of a file"),
        ("/save talk.jsonl", "there is nothing to save yet"),
        ("long " * 100, r"takes \d+ tokens and the context has 128"),
    ],
)
def test_bad_lines(session: ChatSession, console: Console, line: str, message: str) -> None:
    params = session.params
    with pytest.raises(UsageError, match=message):
        Dialogue(session, console).take(line)
    assert session.params == params
    assert session.turns == []


def test_an_error_does_not_end_the_dialogue(
    session: ChatSession, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = ["/nothing", "hello", f"/save {tmp_path}/no/{'x' * 300}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    Dialogue(session, console).run()
    said = output_of(console)
    assert said.startswith(f"error: there is no /nothing: /help lists the commands\n{SAID}error: ")
    assert "cannot write" in said


def test_help_tells_every_command(session: ChatSession, console: Console) -> None:
    dialogue = Dialogue(session, console)
    dialogue.take("/help")
    said = output_of(console)
    for command in ("/clear", "/temperature", "/top_k", "/max_tokens", "/save", "/help", "/quit"):
        assert f"\n{command} " in f"\n{said}"
    for command in ("/clear", "/temperature", "/top_k", "/max_tokens"):
        dialogue.take(command)
    assert output_of(console).splitlines() == [
        "a new conversation",
        "temperature is 0.0",
        "top_k is None",
        "max_tokens is 32",
    ]
    assert "Ctrl-C stops an answer" in said


def test_ctrl_c_stops_the_answer_and_not_the_program(
    session: ChatSession, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    write = console.print

    def interrupted(text: str = "", **options: Any) -> None:
        write(text, **options)
        if text == "*":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console, "print", interrupted)
    show_answer(session, "6 times 7?", console)
    assert output_of(console) == "So [6*]\nstopped\n"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(console, "print", write)
    show_answer(session, "again", console)
    assert output_of(console) == SAID


def test_ctrl_c_at_the_prompt_is_answered_with_how_to_leave(
    session: ChatSession, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[type[BaseException]] = [KeyboardInterrupt, EOFError]

    def read(prompt: str) -> str:
        raise events.pop(0)

    monkeypatch.setattr("builtins.input", read)
    Dialogue(session, console).run()
    assert "/quit or Ctrl-D leaves" in output_of(console)


def test_it_says_that_turns_were_left_out_and_answers_cut(
    session: ChatSession, console: Console
) -> None:
    for _ in range(6):
        show_answer(session, "a message", console)
    assert "the context is full: the oldest 1 turn(s) are left out\n" in output_of(console)
    session.clear()
    session.params = replace(session.params, max_new_tokens=2)
    show_answer(session, "a message", console)
    assert output_of(console) == "So\ncut at /max_tokens\n"


def test_what_a_terminal_would_obey_is_not_printed(
    scripted: Callable[[Sequence[str]], Any], console: Console
) -> None:
    speaker = scripted(["<|assistant_start|>", "a\x1b[2J\x07b", "<|assistant_end|>"])
    params = SamplingParams(32, temperature=0.0)
    show_answer(ChatSession(Engine(speaker.model), speaker.tokenizer, params), "hi", console)
    assert output_of(console) == "a\ufffd[2J\ufffdb\n"


def test_one_answer_from_the_command_line(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("chat", "--source", "base", "--device", "cpu", "--max-tokens", "6", "-p", "hello")
    assert trained_home.run(*words, "--seed", "1") == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert trained_home.run(*words, "--seed", "1") == 0
    assert capsys.readouterr().out == first
    assert not (trained_home.root / "chat_history").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--source", "sft"), "no sft model under"),
        (("--source", "base", "--temperature", "-1"), "--temperature is -1.0"),
        (("--source", "base", "--max-tokens", "0"), "--max-new-tokens is 0"),
        (("--source", "base", "--max-tokens=0"), "--max-new-tokens is 0"),
        (("--source", "base", "--num-samples", "2"), "--num-samples 2 has no use here"),
        (("--source", "base", "--seed", "-1"), "--seed is -1"),
        (("--source", "base", "--model-tag", "x"), "no base model 'x'"),
        (("--source", "base", "-p", " "), "nothing to answer"),
    ],
)
def test_bad_input(
    trained_home: Any, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert trained_home.run("chat", "--device", "cpu", "-p", "hello", *words) in (1, 2)
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
