"""Conversations in which the assistant says who it is, from a template that you can edit.

A few hundred of them, mixed into fine-tuning, give a model its name. The template is TOML (the
package's own is `identity.toml` beside this file): greetings and farewells with their answers, and
topics, each a question and its answer in several wordings.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from archerchat.errors import DataError
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tasks.generated import check_split

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
MAX_TOPICS = 3
DEFAULT_VALUES = {"name": "Archer", "creator": "the person who runs me"}
TRAIN_SIZE, TEST_SIZE = 1000, 64
LISTS = ("greetings", "greeting_answers", "farewells", "farewell_answers")

Exchange = tuple[tuple[str, ...], tuple[str, ...]]
"""A question and its answer, each in several wordings."""


class IdentityTemplate(NamedTuple):
    """Questions that the assistant may be asked about itself, and its answers."""

    greeting: Exchange
    farewell: Exchange
    topics: list[Exchange]


def default_template() -> str:
    """Return the text of the package's own template."""
    return Path(__file__).with_name("identity.toml").read_text(encoding="utf-8")


def parse_template(text: str, values: Mapping[str, str], where: str) -> IdentityTemplate:
    """Read a template and replace placeholders such as `{name}` by `values`.

    Args:
        where: the file to name in errors.

    Raises:
        DataError: the text is not a template, or has a placeholder that `values` lack.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{where} is not TOML ({error}): fix it") from error
    topics = content.pop("topic", None)
    if not isinstance(topics, list) or not topics:
        raise DataError(f"{where} has no [[topic]]: add one with questions and answers")
    if unknown := set(content) - set(LISTS):
        raise DataError(
            f"{where} has unknown {', '.join(sorted(unknown))}: beside topics there are "
            f"{', '.join(LISTS)}"
        )

    def exchange(source: Any, questions: str, answers: str, where: str) -> Exchange:
        return _texts(source, questions, values, where), _texts(source, answers, values, where)

    return IdentityTemplate(
        exchange(content, "greetings", "greeting_answers", where),
        exchange(content, "farewells", "farewell_answers", where),
        [
            exchange(topic, "questions", "answers", f"{where}, topic {number}")
            for number, topic in enumerate(topics, start=1)
        ],
    )


def _texts(content: Any, name: str, values: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Return a list of wordings, filled in."""
    texts = content.get(name) if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where} has no {name}: give a list of at least one wording")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}, {name}: {text!r} is not a wording: write some text")
        if unknown := set(_PLACEHOLDER.findall(text)) - values.keys():
            known = ", ".join(f"{{{value}}}" for value in values)
            raise DataError(
                f"{where}, {name}: nothing is known for {{{min(unknown)}}}: use {known}"
            )
    return tuple(_PLACEHOLDER.sub(lambda match: values[match[1]], text) for text in texts)


def draw_identity(template: IdentityTemplate, count: int, seed: int) -> list[Conversation]:
    """Return `count` conversations, the same for the same template and `seed`."""
    return [_draw(template, Random(f"identity {seed} {index}")) for index in range(count)]


class IdentityTask(Task):
    """Conversations drawn from the package's template, with different draws for the test split."""

    name = "identity"

    def __init__(self, split: str) -> None:
        check_split(split)
        self.split = split
        self._text = default_template()
        template = parse_template(self._text, DEFAULT_VALUES, "the template")
        size, seed = (TRAIN_SIZE, 0) if split == "train" else (TEST_SIZE, 1)
        self.rows = draw_identity(template, size, seed)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return super().describe() | {"template": digest}


def _draw(template: IdentityTemplate, random: Random) -> Conversation:
    exchanges = [template.greeting] if random.random() < 0.25 else []
    number = min(random.choice(range(1, MAX_TOPICS + 1)), len(template.topics))
    exchanges += random.sample(template.topics, number)
    if random.random() < 0.25:
        exchanges.append(template.farewell)
    messages = []
    for questions, answers in exchanges:
        question = random.choice(questions)
        if random.random() < 0.25:
            question = question.lower()
        messages += [user(question), assistant(random.choice(answers))]
    return {"messages": messages}
