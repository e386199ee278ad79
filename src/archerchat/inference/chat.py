"""Use a model from Python: texts, scores, and conversations whose answers come piece by piece.

    from archerchat import load
    model = load("d12", stage="sft")
    (text,) = model.generate("The capital of France is", max_new_tokens=32, temperature=0.7)
    paris, rome = model.score("The capital of France is", " Paris", " Rome")
    for piece in model.chat(temperature=0.6).answer("What is 6 times 7?"):
        print(piece.text, end="")

Options of sampling are the fields of `SamplingParams`. In a conversation, answers are kept as the
tokens that the model said, results of the calculator among them, so the next prompt continues
exactly what was said. A full context drops the oldest turns, but never the system message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from archerchat.config import DeviceName, DtypeName
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.inference.calculator import evaluate as calculate
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.model_runner import score_prompts
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.scheduler import common_length
from archerchat.inference.sequence import Completion, Request
from archerchat.inference.tools import AnswerReader, Piece, ToolUse, read_parts
from archerchat.runtime import build_runtime, prepare_process
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import encode_answer

CHAT_SAMPLING = SamplingParams(max_new_tokens=512, temperature=0.6, top_k=50)
MIN_ROOM_SHARE = 4
"""One over the share of the context that is kept for the answer, unless less is asked for."""


def build_answer_request(
    tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams
) -> Request:
    """Ask for an answer: the assistant's end stops it, and it may use the calculator."""
    ends = tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id
    params = replace(params, stop_token_ids=(*ends, *params.stop_token_ids))
    decode = tokenizer.decode if params.stop else None
    return Request(prompt, params, partial(ToolUse, tokenizer, calculate), decode)


def generate_texts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[str]:
    """Return what the model says after each prompt: `params.num_samples` texts per prompt."""
    requests = [Request(prompt, params, decode=tokenizer.decode) for prompt in prompts]
    return [each.text for group in engine.generate(requests) for each in group]


class ContextFull(UsageError):
    """Report a conversation that leaves no room for an answer."""


class Turn(NamedTuple):
    message: str
    answer: Sequence[int]


@dataclass
class ChatSession:
    """Hold a conversation; `answer` continues it."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams = CHAT_SAMPLING
    """How the next answers are sampled; may be replaced."""
    system: str | None = None
    """Joined to the first message that the model is shown."""
    turns: list[Turn] = field(default_factory=list)
    """All turns, including those that the context has no room for."""
    forgotten: int = 0
    """How many of the oldest turns the last prompt left out."""
    completion: Completion = field(default_factory=Completion)
    """The last answer, or as much of it as there is."""

    def clear(self) -> None:
        """Start a new conversation."""
        self.turns.clear()
        self.forgotten, self.completion = 0, Completion()

    def resume(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
        """Take over a conversation; return its last question, and what is answered already."""
        turns = list(messages)
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        encode = partial(encode_answer, self.tokenizer)
        said = encode(turns.pop()["content"]) if turns[-1]["role"] == "assistant" else []
        *earlier, message = (each["content"] for each in turns)
        self.turns = list(map(Turn, earlier[::2], map(encode, earlier[1::2])))
        return message, said

    def answer(self, message: str) -> Generator[Piece]:
        """Yield the answer to `message` as it comes; closing the iterator ends it there.

        Raises:
            UsageError: the message is empty or too long; the conversation stays as it was.
        """
        if not message.strip():
            raise UsageError("there is nothing to answer: write a message")
        request = self.build_request(message)
        self.engine.check(request)
        seed = (self.params.seed + len(self.turns)) % 2**63
        params = replace(request.params, seed=seed, num_samples=1)
        return self._stream(message, replace(request, params=params))

    def _stream(self, message: str, request: Request) -> Generator[Piece]:
        self.completion = Completion()
        reader = AnswerReader(self.tokenizer, request.params.stop)
        try:
            with closing(self.engine.stream([request])) as events:
                for event in events:
                    self.completion.add(event)
                    if event.token is not None:
                        yield from reader.read(event.token)
            yield from reader.finish()
        finally:
            self.turns.append(Turn(message, self.completion.token_ids))

    def to_conversation(self) -> Conversation:
        """Return all answered turns as a conversation that training reads too."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in self.turns:
            parts = read_parts(self.tokenizer, turn.answer, self.params.stop)
            plain = [each["type"] for each in parts] == ["text"]
            if parts:
                messages += [user(turn.message), assistant(parts[0]["text"] if plain else parts)]
        return {"messages": messages}

    def build_request(self, message: str, said: Sequence[int] = (), forget: bool = True) -> Request:
        """Return what asks the engine for an answer that begins with what is `said`.

        Args:
            forget: leave out the oldest turns until there is room.

        Raises:
            ContextFull: the prompt leaves no room.
        """
        limit = self.engine.max_length
        most = limit - min(self.params.max_new_tokens, max(1, limit // MIN_ROOM_SHARE))
        choices = range(len(self.turns) if forget else 0)
        self.forgotten = bisect_left(
            choices, True, key=lambda first: len(self.render(message, said, first)) <= most
        )
        prompt = self.render(message, said, self.forgotten)
        if len(prompt) >= limit:
            raise ContextFull(
                f"the message takes {len(prompt)} tokens and the context has {limit}: write less"
            )
        return build_answer_request(self.tokenizer, prompt, self.params)

    def render(self, message: str, said: Sequence[int] = (), first: int = 0) -> list[int]:
        """Return the prompt of the turns from `first` on, the message, and what is said to it."""
        special, encode = self.tokenizer.special_id, self.tokenizer.encode
        ids = [self.tokenizer.bos_id]
        joined = "" if self.system is None else f"{self.system}\n\n"
        for turn in [*self.turns[first:], Turn(message, said)]:
            ids += [special("<|user_start|>"), *encode(joined + turn.message)]
            ids += [special("<|user_end|>"), special("<|assistant_start|>")]
            ids += [*turn.answer, special("<|assistant_end|>")]
            joined = ""
        return ids[:-1]


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer and the engine that runs it."""

    loaded: LoadedModel
    engine: Engine

    def generate(self, *prompts: str, **sampling: Any) -> list[str]:
        """Return texts that continue each prompt in turn: `num_samples` of them, 1 by default.

        Raises:
            UsageError: a prompt is longer than the context, or an option is out of range.
        """
        tokenizer, params = self.loaded.tokenizer, SamplingParams(**sampling)
        params = replace(params, stop_token_ids=(tokenizer.bos_id, *params.stop_token_ids))
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        return generate_texts(self.engine, tokenizer, ids, params)

    def score(self, prompt: str, *continuations: str) -> list[float]:
        """Return the log probability in nats of what each continuation adds to the prompt: of the
        tokens from the first one that the prompt alone does not have."""
        tokenizer = self.loaded.tokenizer
        texts = [prompt, *(prompt + each for each in continuations)]
        alone, *rows = ([tokenizer.bos_id, *tokenizer.encode(text)] for text in texts)
        found = score_prompts(self.engine.model, rows, top=0) if rows else []
        return [
            sum(each.logprob for each in scores[common_length(alone, row) :] if each is not None)
            for row, scores in zip(rows, found, strict=True)
        ]

    def chat(self, system: str | None = None, **sampling: Any) -> ChatSession:
        """Start a conversation, best with a model of stage sft or rl."""
        params = replace(CHAT_SAMPLING, **sampling)
        return ChatSession(self.engine, self.loaded.tokenizer, params, system)


def load(
    tag: str | None = None,
    stage: str = "base",
    step: int | None = None,
    device: DeviceName | None = None,
    dtype: DtypeName | None = None,
    home: str | Path | None = None,
) -> Model:
    """Load a model: by default the latest step of the base model saved last, on the best device.

    Args:
        stage: base, sft or rl.
        home: folder of the models; by default `ARCHERCHAT_HOME`.

    Raises:
        UsageError: there is no such model, step or device.
        CheckpointError, TokenizerError: the model or its tokenizer is damaged.
    """
    runtime = build_runtime(device, dtype)
    prepare_process(runtime)
    root = Home(Path(home)) if home else Home.from_environment()
    loaded = load_model(root, runtime, stage, tag, step)
    return Model(loaded, Engine(loaded.model))
