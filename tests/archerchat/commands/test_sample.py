"""`archerchat sample`: what it prints, and that nothing in a text is obeyed."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from archerchat.cli import main
from archerchat.commands import chat as command
from archerchat.commands.chat import PROMPTS, SampleConfig, print_samples
from archerchat.inference.loading import LoadedModel
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Event, Request
from archerchat.inference.sequence import Sequence as Row
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer

Samples = list[tuple[str, str]]
Say = Callable[[bytes], list[str]]


def samples(output: str) -> Samples:
    """Split what was printed into kind and text of each sample."""
    pieces = re.split(r"^(prompted|no prompt) ─+\n", output, flags=re.M)
    return list(zip(pieces[1::2], pieces[2::2], strict=True))


def test_by_default_prompts_are_continued_then_nothing(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run("sample", "--max-tokens", "4") == 0
    output, said = capsys.readouterr()
    assert said.startswith(f"model: {trained_home.checkpoint_dir('base', 'tiny') / 'step_000004'}")
    assert "\x1b" not in output
    printed = samples(output)
    assert [kind for kind, _ in printed] == ["prompted"] * len(PROMPTS) + ["no prompt"] * 3
    for prompt, (_, text) in zip(PROMPTS, printed, strict=False):
        assert text.startswith(prompt)
        assert len(text.rstrip("\n")) > len(prompt)
    assert len({text for _, text in printed[-3:]}) == 3


def test_a_prompt_is_continued_as_often_as_asked_and_repeatably(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--prompt", "a b", "--max-tokens", "8", "--num-samples", "2"]
    printed = []
    for more in ((), (), ("--seed", "7"), ("--temperature", "0")):
        assert trained_home.run(*words, *more) == 0
        printed.append(samples(capsys.readouterr().out))
    first, again, other, greedy = printed
    assert [kind for kind, _ in first] == ["prompted", "prompted"]
    assert first[0] != first[1]
    assert first == again != other
    assert greedy[0] == greedy[1]


def test_samples_do_not_depend_on_how_many_there_are(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--prompt", "a b", "--max-tokens", "8", "--num-samples"]
    printed = []
    for count in ("1", "20"):
        assert trained_home.run(*words, count) == 0
        printed.append(samples(capsys.readouterr().out))
    assert printed[0] == printed[1][:1]
    assert len(printed[1]) == 20


def test_a_prompt_longer_than_the_context_is_refused(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run("sample", "--prompt", "a b " * 200) == 2
    assert "tokens and the context 64: cut it to 63 or fewer" in capsys.readouterr().err


def test_a_stop_string_ends_a_sample(trained_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--prompt", "a b", "--max-tokens", "12", "--num-samples", "1"]
    assert trained_home.run(*words) == 0
    ((_, whole),) = samples(capsys.readouterr().out)
    text = whole.rstrip("\n").removeprefix("a b")
    stop = text[4:7]
    assert trained_home.run(*words, "--stop", "never", stop) == 0
    ((_, cut),) = samples(capsys.readouterr().out)
    assert cut == f"a b{text[: text.index(stop)]}\n"


def test_a_step_can_be_chosen(trained_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained_home.run("sample", "--step", "2", "--max-tokens", "1", "--top-k", "None") == 0
    assert "step_000002 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-tag", "big"], "no base model 'big' under"),
        (["--step", "3"], "it holds 2, 4"),
        (["--max-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--num-samples", "-1"], "--num-samples is -1"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1e-40"], "--temperature is 1e-40"),
        (["--min-p", "2"], "--min-p is 2.0; it must be at least 0 and at most 1"),
        (["--logit-bias", "5", "200"], "--logit-bias of token 5 is 200.0"),
        (["--logit-bias", "4000", "2"], "--logit-bias has token 4000; the model knows 0 to 359"),
        (["--logprobs", "2"], "--logprobs 2 has no use here"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--seed", str(2**70)], "--seed is 118"),
    ],
)
def test_nonsense_is_refused(
    trained_home: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert trained_home.run("sample", *words) == 2
    assert message in capsys.readouterr().err


def test_without_a_model_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARCHERCHAT_HOME", str(tmp_path))
    assert main(["sample"]) == 2
    assert "make one with `archerchat pretrain`, or import one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Pieces(io.StringIO):
    """Remember each write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return super().write(text)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[str]]:
    """Print a sample of a model that says certain bytes; return what was written, in pieces."""
    tokenizer = Tokenizer({bytes([value]): value for value in range(256)})
    loaded = LoadedModel(cast(Transformer, None), tokenizer, Path("step_000001"), 1, {})

    def write(said: bytes) -> list[str]:
        class Scripted:
            def __init__(self, model: object, **_: object) -> None: ...

            def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
                (request,) = requests
                assert request.params.stop_token_ids == (tokenizer.bos_id,)
                sequence = Row(0, 0, request, 1000)
                yield from (sequence.read(value) for value in (*said, tokenizer.bos_id))

        monkeypatch.setattr(command, "Engine", Scripted)
        file = Pieces()
        console = Console(file=file, markup=False, emoji=False, soft_wrap=True)
        print_samples(
            loaded, SampleConfig(prompt="[b]?[/b] :a:", sampling=SamplingParams()), console
        )
        return file.written

    return write


def test_a_character_of_several_tokens_appears_when_it_is_whole(say: Say) -> None:
    pieces = say("né 語🙂".encode())
    assert "".join(pieces).endswith("[b]?[/b] :a:né 語🙂\n")
    assert not any("\ufffd" in piece for piece in pieces)
    assert {"n", "é", "語", "🙂"} <= set(pieces)


def test_bytes_that_are_no_text_are_shown_as_such(say: Say) -> None:
    assert "".join(say(b"a\xc3b\xf0\x9f")).endswith(":a:a\ufffdb\ufffd\n")


def test_nothing_a_model_says_reaches_the_terminal_as_an_order(say: Say) -> None:
    text = "".join(say(b"[red]x[/red] :smile: \x1b[2J\x07\x0e\xc2\x9b1m\nline"))
    assert text.endswith("[red]x[/red] :smile: \ufffd[2J\ufffd\ufffd\ufffd1m\nline\n")
