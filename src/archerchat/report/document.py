"""What a report is made of, whichever way it is written down: sections of text, tables, charts."""

from __future__ import annotations

from dataclasses import dataclass, field

from archerchat.report.charts import Chart


@dataclass(frozen=True)
class Paragraph:
    text: str
    notice: bool = False
    """Whether it must not be overlooked."""


@dataclass(frozen=True)
class Fact:
    """A figure to be seen first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Figures side by side."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Table:
    """Rows under a heading; all but the first column are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: bool = True
    """Whether the other columns hold figures; text is aligned to the left."""


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote."""

    title: str
    text: str


@dataclass(frozen=True)
class Details:
    """A long text that is folded away where that can be done."""

    title: str
    text: str


Part = Paragraph | Facts | Table | Charts | Sample | Details


@dataclass
class Section:
    title: str
    parts: list[Part] = field(default_factory=list)


@dataclass
class Document:
    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)


def printable(text: str) -> str:
    """Return text of a model so that any page can show it: control characters as pictures.

    Lone surrogates, which no file can hold, become U+FFFD.
    """
    shown = (
        chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text.replace("\r\n", "\n")
    )
    return "".join(
        "\ufffd" if "\ud800" <= c <= "\udfff" or "\x80" <= c <= "\x9f" else c for c in shown
    )
