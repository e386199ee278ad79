"""A conversation with a model: what was said so far, and the next answer as it comes.

    session = ChatSession(engine, tokenizer)
    for piece in session.answer("What is 6 times 7?"): print(piece.text, end="")

Answers are kept as the tokens that the model said, results of the calculator among them, so that
the next prompt continues exactly what was. When the context is full the oldest turns are left out
of the prompt; a system message stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from archerchat.errors import UsageError
from archerchat.inference.answers import AnswerReader, Piece, read_parts
from archerchat.inference.calculator import evaluate as calculate
from archerchat.inference.engine import Engine
from archerchat.inference.requests import Completion, Request
from archerchat.inference.tool_use import ToolUse
from archerchat.tokenizer.bpe import Tokenizer

LEAST_ROOM = 4
"""The share of a context that is kept for the answer is one over this, unless less is asked for."""


@dataclass(frozen=True)
class ChatRules:
    """How answers are drawn."""

    temperature: float = 0.6
    top_k: int | None = 50
    max_tokens: int = 512
    """Of one answer."""
    seed: int = 42


@dataclass(frozen=True)
class Turn:
    """What the user said and what was answered."""

    message: str
    answer: tuple[int, ...]


@dataclass
class ChatSession:
    """Hold a conversation; `answer` goes on with it."""

    engine: Engine
    tokenizer: Tokenizer
    rules: ChatRules = field(default_factory=ChatRules)
    system: str | None = None
    """Joined to the first message that the model is shown."""
    turns: list[Turn] = field(default_factory=list)
    """All of them, those that the context has no room for too."""
    forgotten: int = 0
    """How many of the oldest turns the last prompt left out."""
    completion: Completion = field(default_factory=Completion)
    """The last answer, or as much of it as there is."""

    def clear(self) -> None:
        """Begin anew."""
        self.turns.clear()
        self.forgotten, self.completion = 0, Completion()

    def set_rules(self, **changes: float | int | None) -> None:
        """Draw the next answers otherwise.

        Raises:
            UsageError: a number makes no sense; the rules then stay as they are.
        """
        rules = replace(self.rules, **changes)  # type: ignore[arg-type]
        Request([0], rules.max_tokens, rules.temperature, rules.top_k, seed=rules.seed)
        self.rules = rules

    def answer(self, message: str) -> Iterator[Piece]:
        """Yield the answer to `message` as it comes.

        An iterator that is closed early ends the answer there; what was said is kept.

        Raises:
            UsageError: the message is empty, or does not fit into the context; the conversation
                then stays as it was.
        """
        if not message.strip():
            raise UsageError("there is nothing to answer: write a message")
        prompt, self.forgotten = self._build_prompt(message)
        special = self.tokenizer.special_id
        request = Request(
            prompt,
            self.rules.max_tokens,
            self.rules.temperature,
            self.rules.top_k,
            seed=(self.rules.seed + len(self.turns)) % 2**63,
            stop_tokens=(special("<|assistant_end|>"), self.tokenizer.bos_id),
            hook=ToolUse(self.tokenizer, calculate),
        )
        self.engine.check(request)
        return self._stream(message, request)

    def _stream(self, message: str, request: Request) -> Iterator[Piece]:
        self.completion = Completion()
        reader = AnswerReader(self.tokenizer)
        try:
            with closing(self.engine.stream([request])) as events:  # type: ignore[type-var]
                for event in events:
                    self.completion.add(event)
                    if event.token is not None:
                        yield from reader.read(event.token)
            yield from reader.finish()
        finally:
            self.turns.append(Turn(message, tuple(self.completion.token_ids)))

    def to_conversation(self) -> dict[str, object]:
        """Return all answered turns as a conversation that training reads too."""
        messages: list[dict[str, object]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            parts = read_parts(self.tokenizer, turn.answer)
            if not parts:
                continue
            plain = len(parts) == 1 and parts[0]["type"] == "text"
            content: object = parts[0]["text"] if plain else parts
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": content})
        return {"messages": messages}

    def to_json_line(self) -> str:
        """Return the conversation as a line of a JSONL file."""
        return json.dumps(self.to_conversation(), ensure_ascii=False) + "\n"

    def _build_prompt(self, message: str) -> tuple[list[int], int]:
        """Return the prompt with as many turns as there is room for, and how many are left out."""
        limit = self.engine.max_length
        room = min(self.rules.max_tokens, max(1, limit // LEAST_ROOM))
        for first in range(len(self.turns) + 1):
            prompt = self._render(first, message)
            if len(prompt) + room <= limit:
                return prompt, first
        raise UsageError(
            f"the message takes {len(prompt)} tokens and the context has {limit}, of which the "
            f"answer needs {room}: write a shorter one, or lower /max_tokens"
        )

    def _render(self, first: int, message: str) -> list[int]:
        """Return the prompt of the turns from `first` on and the new message."""
        special, encode = self.tokenizer.special_id, self.tokenizer.encode
        ids = [self.tokenizer.bos_id]
        joined = "" if self.system is None else f"{self.system}\n\n"
        turns = [*self.turns[first:], Turn(message, ())]
        for number, turn in enumerate(turns, start=1):
            ids += [special("<|user_start|>"), *encode(joined + turn.message)]
            ids += [special("<|user_end|>"), special("<|assistant_start|>")]
            if number < len(turns):
                ids += [*turn.answer, special("<|assistant_end|>")]
            joined = ""
        return ids
