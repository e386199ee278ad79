"""Spelling: to write a word letter by letter, and to count a letter in a word.

A model sees tokens, not letters, so both are harder than they look. SpellingBee counts by hand,
letter by letter, and then checks itself with the calculator; SimpleSpelling is the first half of
that alone, many times over.
"""

from __future__ import annotations

import string
from random import Random

from archerchat.tasks.base import NumberTask
from archerchat.tasks.conversation import Conversation, assistant, part, user
from archerchat.tasks.generated import GeneratedTask, load_words

COUNT_QUESTIONS = (
    # English
    "How many {letter} are in {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter}s are in the word {word}?",
    "How often does {letter} occur in {word}?",
    "How often is the letter {letter} used in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many times can you find {letter} in {word}?",
    "What number of {letter} does {word} have?",
    "What is the count of {letter} in {word}?",
    "Count the {letter} in {word}.",
    "Count how many {letter} there are in {word}.",
    "Please count the letter {letter} in the word {word}.",
    "Can you count the {letter}s in {word}?",
    "Could you tell me how many {letter} {word} contains?",
    "Tell me the number of {letter} in {word}.",
    "Number of {letter} in {word}?",
    "In {word}, how many {letter} are there?",
    "Does {word} have any {letter}, and how many?",
    "I need to know how many {letter} I write when I write {word}.",
    "{word}: how many {letter}?",
    # German
    "Wie viele {letter} sind in {word}?",
    "Wie oft kommt {letter} in {word} vor?",
    "Zähle die {letter} im Wort {word}.",
    # French
    "Combien de {letter} y a-t-il dans {word} ?",
    "Compte les {letter} dans le mot {word}.",
    # Spanish
    "¿Cuántas {letter} hay en {word}?",
    "Cuenta las {letter} en la palabra {word}.",
    # Italian
    "Quante {letter} ci sono in {word}?",
    # Portuguese
    "Quantas letras {letter} há em {word}?",
    # Dutch
    "Hoeveel keer staat {letter} in {word}?",
    # Swedish
    "Hur många {letter} finns det i {word}?",
    # Polish
    "Ile liter {letter} jest w słowie {word}?",
    # Turkish
    "{word} kelimesinde kaç tane {letter} var?",
    # Russian
    "Сколько букв {letter} в слове {word}?",
    # Chinese, Japanese, Korean
    "{word} 中有多少个 {letter}？",
    "{word} に {letter} はいくつありますか？",
    "{word}에 {letter}가 몇 개 있나요?",
)
SPELL_QUESTIONS = (
    "Spell {word}.",
    "Spell the word {word}.",
    "How do you spell {word}?",
    "Please spell {word} letter by letter.",
    "Which letters are in {word}?",
    "Write {word} one letter at a time.",
)
QUOTES = ("", "", "'", '"')
"""What may stand around a word or a letter; most people write nothing."""


class SpellingBeeTask(NumberTask, GeneratedTask):
    """Count a letter in a word: by hand, then with Python; the answer ends on `#### count`."""

    name = "SpellingBee"

    def draw(self, random: Random) -> Conversation:
        word = random.choice(load_words(str(self.split)))
        # Mostly a letter that is there, else the answer would mostly be 0.
        letter = random.choice(word if random.random() < 0.9 else string.ascii_lowercase)
        question = random.choice(COUNT_QUESTIONS).format(
            letter=_quoted(letter, random), word=_quoted(word, random)
        )
        count = word.count(letter)
        parts = [
            part("text", _count_by_hand(word, letter) + "\n\nNow with Python: "),
            part("python", f"'{word}'.count('{letter}')"),
            part("python_output", str(count)),
            part(
                "text", f"\n\nBoth ways, '{letter}' is in '{word}' {count} times.\n\n#### {count}"
            ),
        ]
        return {"messages": [user(_as_typed(question, random)), assistant(parts)]}


class SimpleSpellingTask(GeneratedTask):
    """Write a word letter by letter."""

    name = "SimpleSpelling"

    def draw(self, random: Random) -> Conversation:
        word = random.choice(load_words(str(self.split)))
        question = random.choice(SPELL_QUESTIONS).format(word=_quoted(word, random))
        return {"messages": [user(_as_typed(question, random)), assistant(_spell(word))]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        expected: str = conversation["messages"][-1]["content"]
        return completion.strip() == expected


def _spell(word: str) -> str:
    return f"{word}: {','.join(word)}"


def _count_by_hand(word: str, letter: str) -> str:
    """Write the word, its letters, and the running count beside each letter that is looked for."""
    lines, count = [f"I spell {_spell(word)}", "", f"Looking for '{letter}':"], 0
    for number, each in enumerate(word, start=1):
        count += each == letter
        lines.append(f"{number}. {each}" + (f" yes, {count}" if each == letter else ""))
    return "\n".join([*lines, "", f"By hand I count {count}."])


def _quoted(text: str, random: Random) -> str:
    quote = random.choice(QUOTES)
    return f"{quote}{text}{quote}"


def _as_typed(question: str, random: Random) -> str:
    """Return the question as some people type: without capitals, or without the last sign."""
    if random.random() < 0.3:
        question = question.lower()
    if random.random() < 0.3:
        question = question.rstrip("?.？ ")
    return question
