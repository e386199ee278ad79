"""Identity conversations: filled in, varied, sound; and what a wrong template is told."""

from __future__ import annotations

import pytest

from archerchat.errors import DataError
from archerchat.tasks.conversation import Conversation, check_conversation
from archerchat.tasks.identity import default_template, draw_identity, parse_template

VALUES = {"name": "Zed", "creator": "Ann"}
SMALL = """
greetings = ["Hi {name}"]
greeting_answers = ["Hi"]
farewells = ["Bye"]
farewell_answers = ["Bye"]
[[topic]]
questions = ["Who?"]
answers = ["I am {name} of {creator}."]
"""


def contents(conversations: list[Conversation]) -> list[str]:
    return [each["content"] for talk in conversations for each in talk["messages"]]


def test_the_package_s_template_makes_sound_and_varied_conversations() -> None:
    template = parse_template(default_template(), VALUES, "the template")
    conversations = draw_identity(template, 500, seed=0)
    assert len(conversations) == 500
    for conversation in conversations:
        check_conversation(conversation)
        questions = [each["content"] for each in conversation["messages"][::2]]
        assert len(set(questions)) == len(questions)
    text = "\n".join(contents(conversations))
    assert "{" not in text
    assert text.count("Zed") > 200
    assert text.count("Ann") > 50
    assert len({str(each) for each in conversations}) > 400
    assert {len(each["messages"]) for each in conversations} == {2, 4, 6, 8, 10}


def test_the_seed_decides() -> None:
    template = parse_template(default_template(), VALUES, "the template")
    first = draw_identity(template, 20, seed=1)
    assert first == draw_identity(template, 30, seed=1)[:20]
    assert first != draw_identity(template, 20, seed=2)


def test_one_s_own_template_is_filled_in() -> None:
    conversations = draw_identity(parse_template(SMALL, VALUES, "mine.toml"), 50, seed=0)
    said = set(contents(conversations))
    assert "I am Zed of Ann." in said
    assert {"Hi Zed", "Bye"} <= said
    assert said <= {"I am Zed of Ann.", "Hi Zed", "hi zed", "Hi", "Bye", "bye", "Who?", "who?"}


def test_values_are_not_filled_in_again() -> None:
    template = parse_template(SMALL, {"name": "{creator}", "creator": "x"}, "mine.toml")
    assert "I am {creator} of x." in contents(draw_identity(template, 1, seed=0))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('greetings = ["Hi {name}"]', "greetings = [", "mine.toml is not TOML"),
        ('greetings = ["Hi {name}"]', "", "mine.toml has no greetings: give a list"),
        ('farewells = ["Bye"]', "farewells = []", "mine.toml has no farewells"),
        ('farewells = ["Bye"]', "farewells = [7]", "mine.toml, farewells: 7 is not a wording"),
        ('farewells = ["Bye"]', 'farewells = [" "]', "farewells: ' ' is not a wording"),
        ("greetings =", "colour = 1\ngreetings =", "mine.toml has unknown colour: beside topics"),
        ("[[topic]]", "[topic]", r"mine.toml has no \[\[topic\]\]"),
        ('questions = ["Who?"]', "", "mine.toml, topic 1 has no questions"),
        ("{creator}", "{owner}", r"topic 1, answers: nothing is known for \{owner\}: use \{name\}"),
    ],
)
def test_a_wrong_template_is_told_where(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(DataError, match=message):
        parse_template(SMALL.replace(old, new), VALUES, "mine.toml")
