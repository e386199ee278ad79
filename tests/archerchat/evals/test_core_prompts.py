"""Few-shot draws, prompts put together from pieces, spans, stripping, cropping."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archerchat.errors import DataError
from archerchat.evals.core.bundle import CoreTask, Example, TaskType
from archerchat.evals.core.prompts import Prompter, choose_examples, common_prefix, fewshot_indices
from archerchat.tokenizer.bpe import Tokenizer


def make_task(kind: TaskType, shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask("trial", Path("trial.jsonl"), kind, shots, delimiter, 0.0)


def texts_of(prompter: Prompter, index: int) -> list[tuple[str, str]]:
    """Return what stands before the scored span and the span, of each option, without BOS."""
    decode = prompter.tokenizer.decode
    parts = []
    for prompt in prompter.prompts(index):
        assert prompt.token_ids[0] == prompter.tokenizer.bos_id
        parts.append(
            (decode(prompt.token_ids[1 : prompt.start]), decode(prompt.token_ids[prompt.start :]))
        )
    return parts


@given(st.integers(1, 60), st.data())
def test_draws_are_those_from_a_list_of_the_others(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    shots = data.draw(st.integers(0, count - 1))
    others = [j for j in range(count) if j != index]
    assert fewshot_indices(index, count, shots) == Random(1234 + index).sample(others, shots)


def test_a_cap_leaves_room_for_the_shots() -> None:
    examples = [Example((str(i),), ("x", "y"), 0) for i in range(20)]
    shuffled = list(examples)
    Random(1337).shuffle(shuffled)
    task = make_task("multiple_choice", shots=4)
    assert choose_examples(examples, task, None) == shuffled
    assert choose_examples(examples, task, 7) == shuffled[:7]
    assert choose_examples(examples, task, 2) == shuffled[:5]
    with pytest.raises(DataError, match=r"trial.jsonl has 4 examples, but 4 shots need at least 5"):
        choose_examples(examples[:4], task, None)


def test_multiple_choice(small_tokenizer: Tokenizer) -> None:
    examples = [
        Example(("apple river",), ("stone", "green"), 1),
        Example(("night",), ("house", "music"), 0),
    ]
    prompter = Prompter(make_task("multiple_choice", 1, "\nAnswer: "), examples, small_tokenizer)
    before = "apple river\nAnswer: green\n\nnight\nAnswer:"
    assert texts_of(prompter, 1) == [(before, " house"), (before, " music")]


def test_schema_scores_what_the_options_end_with(small_tokenizer: Tokenizer) -> None:
    examples = [
        Example(("the apple", "the river"), ("stone.",), 0),
        Example(("one night", "one house"), ("music.",), 1),
    ]
    prompter = Prompter(make_task("schema", 1), examples, small_tokenizer)
    shot = "one house music.\n\nthe"
    assert texts_of(prompter, 0) == [
        (f"{shot} apple", " stone."),
        (f"{shot} river", " stone."),
    ]


def test_language_modelling_strips_contexts_and_gives_the_space_to_the_span(
    small_tokenizer: Tokenizer,
) -> None:
    examples = [
        Example(("  apple \n",), ("river",), 0),
        Example(("\tnight\n\n",), ("house",), 0),
    ]
    prompter = Prompter(make_task("language_modeling", 1), examples, small_tokenizer)
    assert texts_of(prompter, 0) == [("night house\n\napple", " river")]


def test_a_continuation_that_changes_the_tokens_before_it_is_refused(
    small_tokenizer: Tokenizer,
) -> None:
    ids = small_tokenizer.encode("apple")
    assert len(ids) < len("apple")  # merged, so that "app" ends in another token
    example = Example(("riverapp",), ("le",), 0)
    prompter = Prompter(make_task("language_modeling", 0, ""), [example], small_tokenizer)
    with pytest.raises(DataError, match="task trial: the tokens before the continuation of exam"):
        prompter.prompts(0)


PIECES = st.text(st.sampled_from("ab1 .,\n\t\r'é"), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(PIECES, PIECES, PIECES), min_size=3, max_size=4),
    st.sampled_from([" ", "\nAnswer: ", "\n", ""]),
)
def test_pieces_give_the_tokens_of_the_whole_text(
    merging_tokenizer: Tokenizer, rows: list[tuple[str, str, str]], delimiter: str
) -> None:
    examples = [Example((query,), (one, other), 0) for query, one, other in rows]
    task = make_task("multiple_choice", 2, delimiter)
    prompts = Prompter(task, examples, merging_tokenizer).prompts(0)
    shots = [examples[j] for j in fewshot_indices(0, len(examples), 2)]
    solved = [shot.questions[0] + delimiter + shot.answers[0] for shot in shots]
    for answer, prompt in zip(examples[0].answers, prompts, strict=True):
        text = "\n\n".join([*solved, examples[0].questions[0] + delimiter + answer])
        whole = [merging_tokenizer.bos_id, *merging_tokenizer.encode(text)]
        assert prompt.token_ids.tolist() == whole


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(PIECES, PIECES), min_size=3, max_size=4),
    st.sampled_from([" ", "\nAnswer: "]),
)
def test_language_modelling_strips_as_the_whole_text_does(
    merging_tokenizer: Tokenizer, rows: list[tuple[str, str]], delimiter: str
) -> None:
    examples = [Example((context,), (continuation,), 0) for context, continuation in rows]
    task = make_task("language_modeling", 2, delimiter)
    shots = [examples[j] for j in fewshot_indices(0, len(examples), 2)]
    solved = [shot.questions[0].strip() + delimiter + shot.answers[0] for shot in shots]
    last = examples[0].questions[0].strip() + delimiter
    before = "\n\n".join([*solved, last])
    bos = merging_tokenizer.bos_id
    without = [bos, *merging_tokenizer.encode(before.strip())]
    whole = [bos, *merging_tokenizer.encode(before + examples[0].answers[0])]
    prompter = Prompter(task, examples, merging_tokenizer)
    if whole[: len(without)] != without:
        with pytest.raises(DataError):
            prompter.prompts(0)
        return
    (prompt,) = prompter.prompts(0)
    assert (prompt.token_ids.tolist(), prompt.start) == (whole, len(without))


def test_another_split_pattern_is_not_cut(small_tokenizer: Tokenizer) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"\n\n": 256, b"\n\nn": 257}
    whole = Tokenizer(ranks, pattern=r"[\s\S]+")
    examples = [Example(("a",), ("b", "c"), 0), Example(("n",), ("x", "y"), 0)]
    prompter = Prompter(make_task("multiple_choice", 1), examples, whole)
    assert 257 in prompter.prompts(1)[0].token_ids.tolist()


def test_long_prompts_lose_as_much_of_every_option(small_tokenizer: Tokenizer) -> None:
    examples = [Example(("apple river stone",), ("green", "winter house music"), 0)]
    task = make_task("multiple_choice")
    whole = Prompter(task, examples, small_tokenizer).prompts(0)
    longest = max(len(prompt.token_ids) for prompt in whole)
    prompter = Prompter(task, examples, small_tokenizer, max_length=longest - 2)
    for cropped, prompt in zip(prompter.prompts(0), whole, strict=True):
        assert cropped.token_ids.tolist() == prompt.token_ids[2:].tolist()
        assert cropped.start == prompt.start - 2
    assert prompter.cropped == 1
    assert prompter.prompts(0)[0].start >= 1
    exact = Prompter(task, examples, small_tokenizer, max_length=longest)
    exact.prompts(0)
    assert exact.cropped == 0


def test_common_prefix() -> None:
    rows = [np.array(row, dtype=np.int32) for row in ([1, 2, 3], [1, 2, 4, 5], [1, 2])]
    assert common_prefix(rows) == 2
    assert common_prefix(rows[:2]) == 2
    assert common_prefix([rows[0], rows[0]]) == 3
