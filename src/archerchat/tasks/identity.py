"""Conversations in which the assistant says who it is, from a template that anybody can edit.

A few hundred of them, mixed into fine-tuning, give a model its name. The template is TOML (the
package's own is `identity.toml` beside this file): greetings and farewells with their answers, and
topics, each a question and its answer in several wordings.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from random import Random
from typing import Any

from archerchat.errors import DataError
from archerchat.tasks.conversation import Conversation, assistant, user

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
MAX_TOPICS = 3


@dataclass(frozen=True)
class Topic:
    """A question and its answer, each in several wordings."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class IdentityTemplate:
    """What the assistant may be asked about itself, and what it answers."""

    greetings: tuple[str, ...]
    greeting_answers: tuple[str, ...]
    farewells: tuple[str, ...]
    farewell_answers: tuple[str, ...]
    topics: tuple[Topic, ...]


def default_template() -> str:
    """Return the text of the package's own template."""
    return files("archerchat.tasks").joinpath("identity.toml").read_text(encoding="utf-8")


def parse_template(text: str, values: Mapping[str, str], where: str) -> IdentityTemplate:
    """Read a template and put `values` in place of `{name}` and the like.

    Args:
        where: the file to name in errors.

    Raises:
        DataError: the text is no template, or has a placeholder that `values` lack.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{where} is not TOML ({error}): mend it") from error
    topics = content.pop("topic", None)
    if not isinstance(topics, list) or not topics:
        raise DataError(f"{where} has no [[topic]]: add one with questions and answers")
    names = [field.name for field in fields(IdentityTemplate) if field.name != "topics"]
    if unknown := set(content) - set(names):
        raise DataError(
            f"{where} has unknown {', '.join(sorted(unknown))}: beside topics there are "
            f"{', '.join(names)}"
        )
    return IdentityTemplate(
        **{name: _texts(content, name, values, where) for name in names},
        topics=tuple(
            Topic(
                _texts(topic, "questions", values, f"{where}, topic {number}"),
                _texts(topic, "answers", values, f"{where}, topic {number}"),
            )
            for number, topic in enumerate(topics, start=1)
        ),
    )


def draw_identity(template: IdentityTemplate, count: int, seed: int) -> list[Conversation]:
    """Return `count` conversations, the same for the same template and `seed`."""
    return [_draw(template, Random(f"identity {seed} {index}")) for index in range(count)]


def _texts(content: Any, name: str, values: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Return a list of wordings, filled in."""
    texts = content.get(name) if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where} has no {name}: give a list of at least one wording")

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise DataError(
                f"{where}, {name}: nothing is known for {match[0]}: use "
                f"{', '.join('{' + known + '}' for known in values)}"
            )
        return values[match[1]]

    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}, {name}: {text!r} is no wording: write some text")
    return tuple(_PLACEHOLDER.sub(fill, text) for text in texts)


def _draw(template: IdentityTemplate, random: Random) -> Conversation:
    pairs: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    if random.random() < 0.25:
        pairs.append((template.greetings, template.greeting_answers))
    number = min(random.choice(range(1, MAX_TOPICS + 1)), len(template.topics))
    topics = random.sample(template.topics, number)
    pairs += [(topic.questions, topic.answers) for topic in topics]
    if random.random() < 0.25:
        pairs.append((template.farewells, template.farewell_answers))
    messages = []
    for questions, answers in pairs:
        question = random.choice(questions)
        if random.random() < 0.25:
            question = question.lower()
        messages += [user(question), assistant(random.choice(answers))]
    return {"messages": messages}
