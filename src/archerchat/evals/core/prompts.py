"""Turn a task's examples into token ids, the span of each prompt that is scored, and trees.

A prompt is BOS, the few-shot examples, and the question with an answer, joined by blank lines; an
example has one prompt per option. A few-shot example is part of many prompts, so it is tokenized
once: no token of the split pattern joins a line's end with a visible character after it, so blocks
can be tokenized separately and put together. With another pattern, or where a block begins with
whitespace, the whole text is tokenized instead.

An example's prompts make a tree. The tokens that all options begin with are its trunk, which is
run once; what follows in each option is a branch. A token's logits come from the position before
it, so no prompt's last token is run: the options of "Answer: A" have no branch at all and take
their logits from the trunk's end. A language-modelling prompt is a trunk.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archerchat.errors import DataError
from archerchat.evals.core.bundle import CoreTask, Example
from archerchat.tokenizer.bpe import SPLIT_PATTERN, Tokenizer

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234
BLANK_LINE = "\n\n"

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Prompt:
    """One option's token ids; those from `start` on are scored."""

    token_ids: Ids
    start: int
    """From 1 to the length: a token is predicted from those before it."""


@dataclass(frozen=True)
class Tree:
    """One example, ready to run: what its prompts share once, then the rest of each."""

    index: int
    """Index of the example in its task."""
    token_ids: Ids
    """(n,): the trunk, then each option's branch."""
    previous_ids: Ids
    """(n,), the token before each in its prompt, -1 for the first."""
    positions: Ids
    """(n,), the position in its prompt."""
    trunk_length: int
    sources: Ids
    """For each scored token, which of the tokens above predicts it."""
    targets: Ids
    """The scored tokens."""
    options: Ids
    """For each scored token, the option that it counts for."""
    lengths: tuple[int, ...]
    """Tokens in each option's prompt."""

    @property
    def has_unscored(self) -> bool:
        """Whether an option has nothing to score, as where another one begins with it."""
        return len(np.unique(self.options)) < len(self.lengths)


def build_tree(index: int, prompts: Sequence[Prompt]) -> Tree:
    """Cut an example's prompts into a trunk and branches."""
    inputs = [prompt.token_ids[:-1] for prompt in prompts]
    trunk = common_prefix(inputs)
    parts = [(inputs[0], slice(0, trunk)), *((row, slice(trunk, len(row))) for row in inputs)]
    sources, options, size = [], [], trunk
    for option, (prompt, row) in enumerate(zip(prompts, inputs, strict=True)):
        places = np.arange(prompt.start - 1, len(row))
        sources.append(np.where(places < trunk, places, places - trunk + size))
        options.append(np.full(len(places), option))
        size += len(row) - trunk

    def joined(arrays: Iterable[NDArray[Any]]) -> Ids:
        return np.concatenate(list(arrays)).astype(np.int32)

    return Tree(
        index,
        token_ids=joined(row[part] for row, part in parts),
        previous_ids=joined(np.append(-1, row[:-1])[part] for row, part in parts),
        positions=joined(np.arange(part.start, part.stop) for _, part in parts),
        trunk_length=trunk,
        sources=joined(sources),
        targets=joined(prompt.token_ids[prompt.start :] for prompt in prompts),
        options=joined(options),
        lengths=tuple(len(prompt.token_ids) for prompt in prompts),
    )


def choose_examples(examples: Sequence[Example], task: CoreTask, cap: int | None) -> list[Example]:
    """Shuffle a task's examples as CORE does, and take the first `cap`, which are evaluated.

    More are returned if the cap leaves too few to draw the few-shot examples from.

    Raises:
        DataError: the task has too few examples, with or without a cap.
    """
    least = task.num_fewshot + 1
    if len(examples) < least:
        raise DataError(
            f"task {task.label}: {task.path} has {len(examples)} examples, but {task.num_fewshot} "
            f"shots need at least {least}"
        )
    shuffled = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled if cap is None else shuffled[: max(cap, least)]


def fewshot_indices(index: int, count: int, shots: int) -> list[int]:
    """Draw which of `count` examples precede example `index`.

    The same draw as `sample` makes from a list of the others, without making that list.
    """
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(count - 1), shots)
    return [j + (j >= index) for j in drawn]


class Prompter:
    """Make the prompts of one task.

    Args:
        examples: what `choose_examples` returned; the few-shot examples come from them too.
        max_length: longer prompts are cropped on the left.
    """

    def __init__(
        self,
        task: CoreTask,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        max_length: int | None = None,
    ) -> None:
        self.task, self.examples, self.tokenizer = task, examples, tokenizer
        self.max_length, self._bos = max_length, [tokenizer.bos_id]
        self.cropped = 0
        """Number of examples that were cropped so far."""
        self._piecewise = tokenizer.pattern == SPLIT_PATTERN
        self._shots: dict[int, tuple[str, list[int]]] = {}

    def tree(self, index: int) -> Tree:
        return build_tree(index, self.prompts(index))

    def prompts(self, index: int) -> list[Prompt]:
        """Return an example's prompts, one per option; a DataError if it cannot be scored."""
        example = self.examples[index]
        chosen = fewshot_indices(index, len(self.examples), self.task.num_fewshot)
        if self.task.task_type == "language_modeling":
            prompts = [self._continuation(index, chosen, example)]
        else:
            last = [
                question + self.task.delimiter + answer
                for question in example.questions
                for answer in example.answers
            ]
            rows = self._encode(chosen, last)
            if self.task.task_type == "multiple_choice":
                starts = [common_prefix(rows)] * len(rows)
            else:
                suffix = min(common_prefix([row[::-1] for row in rows]), min(map(len, rows)) - 1)
                starts = [len(row) - suffix for row in rows]
            prompts = [Prompt(row, start) for row, start in zip(rows, starts, strict=True)]
        return self._crop(prompts)

    def _continuation(self, index: int, chosen: list[int], example: Example) -> Prompt:
        """Return a language-modelling prompt; the delimiter's last space is scored too."""
        context = example.questions[0].strip() + self.task.delimiter
        before = context.rstrip()
        first = self._shot(chosen[0])[0] if chosen else context
        if before and not before[0].isspace() and not first[:1].isspace():
            without, whole = self._encode(chosen, [before, context + example.answers[0]])
        else:  # stripping reaches beyond the last block
            shots = "".join(self._shot(j)[0] for j in chosen)
            texts = ((shots + context).strip(), shots + context + example.answers[0])
            without, whole = self._encode([], texts)
        if not np.array_equal(without, whole[: len(without)]):
            raise DataError(
                f"task {self.task.label}: the tokens before the continuation of example {index} "
                f"({example.answers[0]!r} after {example.questions[0][-40:]!r}) change with it, so "
                "it cannot be scored: put a space between them, or leave the example out"
            )
        return Prompt(whole, len(without))

    def _encode(self, chosen: Sequence[int], last: Sequence[str]) -> list[Ids]:
        """Tokenize the few-shot examples followed by each of `last`."""
        shots = [self._shot(j) for j in chosen]
        starts = [text for text, _ in shots[1:]] + (list(last) if shots else [])
        if self._piecewise and not any(text[:1].isspace() or not text for text in starts):
            shared = self._bos + [i for _, ids in shots for i in ids]
            return [np.array(shared + self.tokenizer.encode(t), dtype=np.int32) for t in last]
        before = "".join(text for text, _ in shots)
        return [np.array(self._bos + self.tokenizer.encode(before + t), np.int32) for t in last]

    def _shot(self, index: int) -> tuple[str, list[int]]:
        """Return a solved example with the blank line after it, as text and as token ids."""
        if index not in self._shots:
            example = self.examples[index]
            question = example.questions[example.gold if len(example.questions) > 1 else 0]
            answer = example.answers[example.gold if len(example.answers) > 1 else 0]
            if self.task.task_type == "language_modeling":
                question = question.strip()
            text = question + self.task.delimiter + answer + BLANK_LINE
            self._shots[index] = text, self.tokenizer.encode(text) if self._piecewise else []
        return self._shots[index]

    def _crop(self, prompts: list[Prompt]) -> list[Prompt]:
        """Crop an example's prompts by the excess of the longest."""
        longest = max(len(p.token_ids) for p in prompts)
        excess = longest - (self.max_length or longest)
        if excess <= 0:
            return prompts
        self.cropped += 1
        return [Prompt(p.token_ids[excess:], max(1, p.start - excess)) for p in prompts]


def common_prefix(rows: Sequence[Ids]) -> int:
    """Return how many leading tokens all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.ones(shortest, dtype=bool)
    for row in rows[1:]:
        same &= row[:shortest] == rows[0][:shortest]
    return shortest if same.all() else int(same.argmin())
