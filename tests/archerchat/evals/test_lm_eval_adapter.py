"""The harness's requests against plain forward passes, and the harness itself where it is there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from archerchat.errors import UsageError
from archerchat.evals.core.bundle import (
    OFFLINE_BUNDLE,
    CoreTask,
    Example,
    load_bundle,
    read_examples,
)
from archerchat.evals.core.prompts import Prompt, Prompter
from archerchat.evals.lm_eval_adapter import HarnessModel, register, score_prompts
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.runtime import build_runtime

Score = Callable[..., tuple[list[float], bool]]
HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def loaded(trained_home: Home) -> LoadedModel:
    return load_model(trained_home, build_runtime("cpu", "float32"), "base", "tiny")


@pytest.fixture
def harness_model(loaded: LoadedModel) -> HarnessModel:
    return HarnessModel(loaded=loaded, batch_tokens=120)


def requests(*args: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in args]


def test_log_likelihoods_equal_plain_ones(
    harness_model: HarnessModel, score_plainly: Score
) -> None:
    """In batches of any shape, and in the order of the requests."""
    pairs = [
        ("abc", " def"),
        ("", "a"),
        ("a b c d e f g h" * 5, " ij kl mn"),
        ("no", " p"),
        ("", ""),
    ]
    got = harness_model.loglikelihood(requests(*pairs))
    for (context, continuation), (total, greedy) in zip(pairs, got, strict=True):
        prompt = harness_model.prompt(context, continuation)
        if not continuation:
            assert (total, greedy) == (0.0, True)
            continue
        means, plain_greedy = score_plainly(harness_model.model, [prompt])
        assert total == pytest.approx(-means[0] * (len(prompt.token_ids) - prompt.start), abs=1e-4)
        assert greedy == plain_greedy


def test_what_is_greedy_is_told(loaded: LoadedModel) -> None:
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("abc")]
    likely: list[int] = []
    for _ in range(3):
        likely.append(int(loaded.model(torch.tensor([ids + likely]))[0, -1].argmax()))
    unlikely = [*likely[:2], (likely[2] + 1) % 256]
    rows = [np.array(ids + said, dtype=np.int32) for said in (likely, unlikely)]
    scores = score_prompts(loaded.model, [Prompt(row, len(ids)) for row in rows])
    assert [greedy for _, greedy in scores] == [True, False]


def test_a_context_s_last_space_belongs_to_the_continuation(harness_model: HarnessModel) -> None:
    one, other = harness_model.prompt("ab ", "cd"), harness_model.prompt("ab", " cd")
    assert (one.token_ids.tolist(), one.start) == (other.token_ids.tolist(), other.start)


def test_rolling_scores_every_token_once(harness_model: HarnessModel) -> None:
    text = "abcd efgh " * 40
    ids = harness_model.tokenizer.encode(text)
    windows = harness_model.windows(text)
    room = harness_model.model.config.sequence_length
    assert len(windows) > 2
    assert [i for w in windows for i in w.token_ids[w.start :]] == ids
    assert all(len(w.token_ids) <= room + 1 for w in windows)
    assert all(len(w.token_ids) == room + 1 for w in windows)  # the last has all the room, too
    (total,) = harness_model.loglikelihood_rolling(requests((text,)))
    parts = [total for total, _ in score_prompts(harness_model.model, windows)]
    assert total == pytest.approx(sum(parts), abs=1e-3)
    assert harness_model.loglikelihood_rolling(requests(("",))) == [0.0]


def test_generation_stops_at_a_text(harness_model: HarnessModel) -> None:
    options = {"until": [], "max_gen_toks": 12}
    (whole,) = harness_model.generate_until(requests(("abc", options)))
    assert whole
    stop = whole[2:4]
    cut, other = harness_model.generate_until(
        requests(("abc", options | {"until": [stop]}), ("abc", options | {"until": stop}))
    )
    assert cut == other == whole[: whole.index(stop)]


def test_a_long_context_keeps_its_end(harness_model: HarnessModel) -> None:
    room = harness_model.model.config.sequence_length
    options = {"until": ["\n"], "max_gen_toks": 8}
    request = harness_model._request("abc def " * 200, options, room)
    assert len(request.prompt) == room - 8
    assert request.prompt[-4:] == harness_model.tokenizer.encode("abc def " * 200)[-4:]


def test_unknown_arguments_are_named(trained_home: Home) -> None:
    with pytest.raises(UsageError, match="'tagg'"):
        HarnessModel(tagg="tiny")


@pytest.mark.skipif(HARNESS, reason="the harness is installed")
def test_without_the_harness_the_remedy_is_said() -> None:
    with pytest.raises(UsageError, match=r"archerchat\[lm-eval\]"):
        register()


def option_losses(
    loaded: LoadedModel, task: CoreTask, score_plainly: Score
) -> Iterator[tuple[Example, list[float]]]:
    """Yield each example with its options' mean losses, the way CORE's oracle has them.

    The harness compares sums instead: the options must be of one length for both to agree.
    """
    examples = read_examples(task)
    prompter = Prompter(task, examples, loaded.tokenizer)
    for index, example in enumerate(examples):
        prompts = prompter.prompts(index)
        means, _ = score_plainly(loaded.model, prompts)
        assert {len(prompt.token_ids) - prompt.start for prompt in prompts} == {1}
        yield example, means


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed (extra lm-eval)")
def test_the_harness_agrees_with_core(
    loaded: LoadedModel,
    score_plainly: Score,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A local task file, no network: each option's score, and the accuracy by CORE's rule."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    bundle = load_bundle(OFFLINE_BUNDLE)
    task = next(task for task in bundle.tasks if task.label == "offline_closing_bracket")
    task = replace(task, num_fewshot=0)
    folder = tmp_path / "tasks"
    folder.mkdir()
    configuration = {
        "task": "closing_bracket",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "target_delimiter": task.delimiter,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "closing_bracket.yaml").write_text(json.dumps(configuration))
    model = register()(loaded=loaded)
    with torch.no_grad():
        results = simple_evaluate(
            model=model,
            tasks=["closing_bracket"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    ours = list(option_losses(loaded, task, score_plainly))
    theirs = results["samples"]["closing_bracket"]
    by_question = {sample["doc"]["query"]: sample for sample in theirs}
    for example, losses in ours:
        totals = [result[0] for result in by_question[example.questions[0]]["filtered_resps"]]
        assert totals == pytest.approx([-loss for loss in losses], abs=1e-4)
    right = [int(np.argmin(losses)) == example.gold for example, losses in ours]
    assert 0 < sum(right) < len(right)
    assert results["results"]["closing_bracket"]["acc,none"] == pytest.approx(np.mean(right))
