"""Whole evaluations: figures, ranks, what is kept after an interruption, estimates, bad input."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.config import from_json
from archerchat.distributed import Ranks
from archerchat.errors import DataError, UsageError
from archerchat.evals.core.bundle import load_bundle, read_examples
from archerchat.evals.core.evaluate import (
    CoreEvaluation,
    CoreOptions,
    CoreResult,
    CoreTaskResult,
    PartialResults,
    describe,
)
from archerchat.evals.core.prompts import Prompter, choose_examples
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer

Build = Callable[..., Transformer]


def figures(result: CoreResult) -> dict[str, Any]:
    """Return everything but times."""
    return {
        task.label: {k: v for k, v in task.to_json().items() if "second" not in k}
        for task in result.tasks
    }


def test_figures_are_those_of_one_example_at_a_time(
    small_bundle: Path,
    small_tokenizer: Tokenizer,
    build_small_model: Build,
    score_plainly: Callable[..., tuple[list[float], bool]],
) -> None:
    bundle, model = load_bundle(small_bundle), build_small_model()
    result = CoreEvaluation(bundle, small_tokenizer).run(model)
    assert [task.label for task in result.tasks] == [task.label for task in bundle.tasks]
    centred = []
    for task, found in zip(bundle.tasks, result.tasks, strict=True):
        examples = choose_examples(read_examples(task), task, None)
        prompter = Prompter(task, examples, small_tokenizer)
        right = tokens = 0
        for index, example in enumerate(examples):
            prompts = prompter.prompts(index)
            tokens += sum(len(prompt.token_ids) for prompt in prompts)
            means, all_predicted = score_plainly(model, prompts)
            is_text = task.task_type == "language_modeling"
            right += all_predicted if is_text else means.index(min(means)) == example.gold
        assert (found.examples, found.correct) == (12, right)
        assert found.prompt_tokens == tokens
        assert 0 < found.tokens_run < tokens
        assert found.examples_per_second == pytest.approx(12 / found.seconds)
        baseline = task.random_baseline
        centred.append((right / 12 - baseline) / (1 - baseline))
        assert found.centred == pytest.approx(centred[-1])
    assert result.core == pytest.approx(sum(centred) / 3)


def test_a_cap_and_a_length(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build
) -> None:
    options = CoreOptions(max_per_task=2, max_length=20)
    result = CoreEvaluation(load_bundle(small_bundle), small_tokenizer, options).run(
        build_small_model()
    )
    assert [task.examples for task in result.tasks] == [2, 2, 2]  # though two shots take three
    assert sum(task.cropped for task in result.tasks) > 0
    assert any("cropped on the left" in note for note in describe(result))


@dataclass
class Meeting:
    """Collects what threads bring."""

    size: int
    parts: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.parts[rank] = value
        self.barrier.wait()
        values = [self.parts[r] for r in range(self.size)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads."""

    meeting: Any = None

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self.meeting.gather(self.rank, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(dim=0)


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_find_together_what_one_finds(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build, size: int
) -> None:
    bundle, model = load_bundle(small_bundle), build_small_model()
    expected = CoreEvaluation(bundle, small_tokenizer, CoreOptions(max_length=30)).run(model)
    meeting = Meeting(size)

    def run(rank: int) -> CoreResult:
        ranks = ThreadRanks(rank=rank, world_size=size, meeting=meeting)
        evaluation = CoreEvaluation(bundle, small_tokenizer, CoreOptions(max_length=30), ranks)
        return evaluation.run(model)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for result in results:
        assert figures(result) == figures(expected)


@pytest.mark.parametrize("first_kept", [0, 1])
def test_ranks_skip_what_the_first_has_kept(
    small_bundle: Path,
    small_tokenizer: Tokenizer,
    build_small_model: Build,
    tmp_path: Path,
    first_kept: int,
) -> None:
    bundle, model, meeting = load_bundle(small_bundle), build_small_model(), Meeting(2)
    expected = CoreEvaluation(bundle, small_tokenizer).run(model)
    seen: list[list[str]] = [[], []]

    def run(rank: int) -> CoreResult:
        kept = PartialResults(tmp_path / "partial.json" if rank == 0 else None, {})
        for task in expected.tasks[first_kept:] if rank == 0 else ():
            kept.add(task)
        evaluation = CoreEvaluation(
            bundle, small_tokenizer, ranks=ThreadRanks(rank=rank, world_size=2, meeting=meeting)
        )
        return evaluation.run(
            model, kept, on_progress=lambda label, share: seen[rank].append(label)
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert figures(first) == figures(second) == figures(expected)
    kept = {task.label for task in bundle.tasks[first_kept:]}
    assert not kept & {*seen[0], *seen[1]}


def test_an_interrupted_evaluation_goes_on(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build, tmp_path: Path
) -> None:
    bundle, model, path = load_bundle(small_bundle), build_small_model(), tmp_path / "p.json"
    expected = CoreEvaluation(bundle, small_tokenizer).run(model)

    def interrupt(label: str, share: float) -> None:
        if label == "schema" and share > 0:
            raise KeyboardInterrupt

    evaluation = CoreEvaluation(bundle, small_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(model, PartialResults(path, {"model": 1}), on_progress=interrupt)
    kept = PartialResults(path, {"model": 1})
    assert list(kept.tasks) == ["multiple_choice"]
    assert list(PartialResults(path, {"model": 2}).tasks) == []
    begun: list[str] = []
    result = evaluation.run(model, kept, on_progress=lambda label, share: begun.append(label))
    assert "multiple_choice" not in begun
    assert figures(result) == figures(expected)
    assert result.tasks[0] == kept.tasks["multiple_choice"]
    kept.remove()
    assert not path.exists()


OTHER_TASKS = ['{"key": {}, "tasks": [{"label": "x"}]}', '{"key": {}, "tasks": [{"label": [1]}]}']


@pytest.mark.parametrize("content", ["", "[]", '{"key":', *OTHER_TASKS])
def test_a_broken_partial_file_is_started_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "partial.json"
    path.write_text(content)
    assert PartialResults(path, {}).tasks == {}


def test_prompts_can_be_kept(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build
) -> None:
    evaluation = CoreEvaluation(load_bundle(small_bundle), small_tokenizer, keep_prompts=True)
    first = evaluation.run(build_small_model())
    for path in (small_bundle / "eval_data").iterdir():
        path.unlink()
    assert figures(evaluation.run(build_small_model())) == figures(first)
    again = CoreEvaluation(evaluation.bundle, small_tokenizer)
    with pytest.raises(DataError, match=r"cannot read .*multiple_choice.jsonl"):
        again.run(build_small_model())


def test_a_broken_task_leaves_the_finished_ones(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build, tmp_path: Path
) -> None:
    path = tmp_path / "partial.json"
    (small_bundle / "eval_data" / "language_modeling.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"jsonl:1 is no example of task language_modeling"):
        CoreEvaluation(load_bundle(small_bundle), small_tokenizer).run(
            build_small_model(), PartialResults(path, {})
        )
    assert list(PartialResults(path, {}).tasks) == ["multiple_choice", "schema"]


def test_an_estimate_counts_what_is_left(
    small_bundle: Path, small_tokenizer: Tokenizer, build_small_model: Build
) -> None:
    bundle, model = load_bundle(small_bundle), build_small_model()
    evaluation, windows = CoreEvaluation(bundle, small_tokenizer), model.config.windows
    result, expected = evaluation.run(model), evaluation.estimate(windows)
    assert list(expected) == [task.label for task in bundle.tasks]
    for task in result.tasks:
        assert expected[task.label].examples == task.examples
        assert expected[task.label].tokens == pytest.approx(task.tokens_run, rel=0.5)
    left = evaluation.estimate(windows, ["schema"])
    assert list(left) == ["multiple_choice", "language_modeling"]
    assert evaluation.estimate(windows, [task.label for task in bundle.tasks]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_per_task": 0}, "--max-per-task is 0; it must be at least 1"),
        ({"max_length": 1}, "--max-length is 1; it must be at least 2"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CoreOptions(**options)


def task_result(
    label: str, correct: int, examples: int, baseline: float = 0.0, **more: Any
) -> CoreTaskResult:
    return CoreTaskResult(
        label=label,
        task_type="schema",
        examples=examples,
        correct=correct,
        random_baseline=baseline,
        seconds=2.0,
        num_fewshot=0,
        prompt_tokens=100,
        tokens_run=50,
        **more,
    )


def test_the_interval_is_that_of_a_mean_of_shares() -> None:
    tasks = task_result("a", 30, 100, 0.5), task_result("b", 0, 96)
    result = CoreResult(tasks)
    assert result.core == pytest.approx((-0.4 + 0) / 2)
    (low, high), zero = tasks[0].interval, tasks[1].interval
    assert (low, zero[0]) == pytest.approx((0.21895, 0), abs=1e-5)
    below, above = 0.3 - low, high - 0.3  # twice as wide when centred: guessing is right half
    expected = -0.2 - below, -0.2 + ((2 * above) ** 2 + zero[1] ** 2) ** 0.5 / 2
    assert result.interval == pytest.approx(expected)


def test_results_as_json_and_in_notes() -> None:
    tied = task_result("a", 3, 4, 0.5, near_ties=(1, 2), cropped=1)
    result = CoreResult((tied, task_result("b", 1, 2)))
    content = json.loads(json.dumps(result.to_json()))
    assert content["num_tasks"] == 2
    assert content["core"] == result.core == 0.5
    assert content["interval"][0] < 0.5 < content["interval"][1]
    assert from_json(CoreTaskResult, content["tasks"][0]) == tied
    without = {k: v for k, v in content["tasks"][0].items() if k != "num_samples"}
    assert from_json(CoreTaskResult, without) == tied  # as earlier versions wrote it
    notes = describe(result)
    assert any("near-ties (closer than 1e-05), by example: a 1, 2" in note for note in notes)
    assert any("is not the published CORE" in note for note in notes)


def test_notes_name_the_tasks_or_count_them() -> None:
    results = [replace(task_result(label, 1, 2), unscored=3) for label in "abcde"]
    said = "examples have an option with nothing to score, which wins only if it stands first"
    assert f"6 {said}: a 3, b 3" in describe(CoreResult(tuple(results[:2])))
    assert f"15 {said}: in 5 tasks" in describe(CoreResult(tuple(results)))
