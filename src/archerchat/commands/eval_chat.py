"""`archerchat eval chat`: evaluate a chat model on ChatCORE's tasks or others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from archerchat.config import Config, DeviceConfig, PositiveInt
from archerchat.console import build_console
from archerchat.data.task_files import task_files
from archerchat.distributed import Ranks, joined_ranks
from archerchat.errors import UsageError
from archerchat.evals.chat.evaluate import ChatEvaluator, limited
from archerchat.evals.chat.generative import Answer, check_sampling
from archerchat.evals.chat.results import TaskResult, chatcore
from archerchat.files import write_bytes, write_json
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tasks.base import Task
from archerchat.tasks.registry import CHATCORE, TASKS, build_task

SAMPLING = SamplingParams(max_new_tokens=512, temperature=0.0, top_k=50)
PLAIN_LINE_SECONDS = 10.0
"""Time between lines of progress if there is no terminal."""


@dataclass(frozen=True)
class EvalChatConfig(Config):
    """Evaluate a chat model on ChatCORE's tasks or others."""

    model_tag: str | None = None
    """Name of the model. Defaults to the one saved last."""
    source: Literal["sft", "rl", "base"] = "sft"
    """Stage to load: base, sft or rl."""
    step: int | None = None
    """Step of the checkpoint to load. Defaults to the latest."""
    tasks: str | None = None
    """Tasks, separated by commas, each with a limit if need be: GSM8K:200,MMLU. Defaults to the
    six of ChatCORE."""
    max_problems: PositiveInt | None = None
    """Number of problems of each task that has no limit of its own. Defaults to all."""
    sampling: SamplingParams = SAMPLING
    device_batch_size: PositiveInt = 64
    """Most answers to generate at a time."""
    data_dir: Path | None = None
    """Folder with the tasks' files. By default they are downloaded once."""
    json: Path | None = None
    """File for the figures. Defaults to one under the home's `evals`."""
    answers: Path | None = None
    """File for every generated answer, one JSON object per line."""
    runtime: DeviceConfig = field(default_factory=DeviceConfig)


def evaluate(config: EvalChatConfig, home: Home) -> dict[str, Any]:
    """Evaluate the tasks one by one, keeping the results so far on disk; return them.

    Raises:
        UsageError: there is no such model or task, or the samples would all be the same.
        DataError: a task's files are missing or broken.
        SandboxError: HumanEval is asked for and there is no sandbox on this machine.
        CheckpointError, TokenizerError: the model or its tokenizer is damaged.
    """
    limits = parse_tasks(config.tasks, config.max_problems)
    check_sampling(config.sampling)
    config.sampling.refuse_changes("logprobs")
    runtime = build_runtime(config.runtime.device, config.runtime.dtype)
    prepare_process(runtime)
    quiet = not runtime.is_master
    console = build_console(quiet=quiet)
    loaded = load_model(home, runtime, config.source, config.model_tag, config.step)
    console.print(f"{loaded.path}", style="dim")
    with joined_ranks(runtime) as ranks:
        tasks = _build_tasks(config, home, limits, ranks, console)
        evaluator = ChatEvaluator(
            loaded.model, loaded.tokenizer, config.sampling, config.device_batch_size, ranks
        )
        return _run(config, home, loaded, runtime, evaluator, tasks, console)


def parse_tasks(text: str | None, max_problems: int | None = None) -> dict[str, int | None]:
    """Return each task's limit by its name; None stands for all of it.

    Args:
        text: `GSM8K:200,MMLU`; None stands for ChatCORE's tasks.
        max_problems: limit of tasks without one of their own.

    Raises:
        UsageError: a task is unknown or named twice, or a limit is no positive number.
    """
    if text is None:
        return dict.fromkeys(CHATCORE, max_problems)
    known = {name.lower(): name for name in TASKS}
    limits: dict[str, int | None] = {}
    for word in text.split(","):
        given, _, limit = (each.strip() for each in word.partition(":"))
        name = known.get(given.lower())
        if name is None:
            raise UsageError(
                f"--tasks {text}: there is no task {given!r}; choose from {', '.join(TASKS)}"
            )
        if name in limits:
            raise UsageError(f"--tasks {text}: {name} is named twice")
        if ":" in word and not (limit.isascii() and limit.isdigit() and int(limit) > 0):
            raise UsageError(
                f"--tasks {text}: the limit {limit!r} of {name} must be a number of problems, as "
                f"in {name}:200"
            )
        limits[name] = int(limit) if limit else max_problems
    return limits


def _build_tasks(
    config: EvalChatConfig,
    home: Home,
    limits: dict[str, int | None],
    ranks: Ranks,
    console: Console,
) -> list[Task]:
    """Read the files of all tasks before evaluating any; one rank downloads what is missing."""

    def build() -> list[Task]:
        files = task_files(home, config.data_dir, notify=console.print)
        return [limited(build_task(name, "test", files), limits[name]) for name in limits]

    return ranks.first_alone(build)


def _run(
    config: EvalChatConfig,
    home: Home,
    loaded: LoadedModel,
    runtime: Runtime,
    evaluator: ChatEvaluator,
    tasks: Sequence[Task],
    console: Console,
) -> dict[str, Any]:
    tag = loaded.path.parent.name
    path = config.json or default_path(home, config.source, tag, loaded.step)
    results: list[TaskResult] = []
    lines: list[str] = []
    figures: dict[str, Any] = {}
    for task in tasks:
        answers: list[Answer] = []
        with _shown(task, console) as progress:
            result = evaluator.evaluate(task, on_progress=progress.update, on_answer=answers.append)
        lines += [_line(task.name, answer) for answer in answers]
        results.append(result)
        console.print(_sentence(result))
        figures = {
            "checkpoint": str(loaded.path),
            "model_tag": tag,
            "source": config.source,
            "step": loaded.step,
            "dtype": dtype_name(runtime.compute_dtype),
            "device": runtime.device_name,
            "ranks": runtime.world_size,
            "sampling": asdict(evaluator.params),
            "complete": len(results) == len(tasks),
            "tasks": {each.name: each.to_json() for each in results},
        }
        if (core := chatcore(results)) is not None:
            figures |= {"chatcore": core[0], "chatcore_interval_95": list(core[1])}
        if runtime.is_master:
            write_json(path, figures)
        if config.answers is not None:
            suffix = f".rank{runtime.rank}" if runtime.rank else ""
            target = config.answers.with_name(config.answers.name + suffix)
            write_bytes(target, "".join(lines).encode())
    console.print(_table(results, f"{config.source} {tag}, step {loaded.step}"))
    console.print(f"figures in {path}", style="dim")
    return figures


def default_path(home: Home, source: str, tag: str, step: int) -> Path:
    """Return where a checkpoint's figures are kept."""
    return home.eval_dir(source, tag) / f"chat_step_{step:06d}.json"


def _line(task: str, answer: Answer) -> str:
    """Return one line of the answers' file."""
    value = {
        "task": task,
        "problem": answer.problem,
        "sample": answer.sample,
        "right": answer.right,
        "finish_reason": answer.completion.finish_reason,
        "text": answer.text,
    }
    return json.dumps(value, ensure_ascii=False) + "\n"


class _ProgressShown:
    """Show a bar with rate and time left on a terminal, and a line now and then elsewhere."""

    def __init__(self, title: str, unit: str, bar: Progress | None, console: Console) -> None:
        self._title, self._unit, self._bar, self._console = title, unit, bar, console
        self._task = None if bar is None else bar.add_task(title, total=None, rate="")
        self._started = self._shown = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Show how much is done."""
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        shown = f"{rate:,.1f} {self._unit}/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, rate=shown)
        elif now - self._shown >= PLAIN_LINE_SECONDS:
            self._shown = now
            left = (total - done) / rate
            self._console.print(f"{self._title}: {done}/{total} | {shown} | {left:,.0f} s left")


@contextmanager
def _shown(task: Task, console: Console) -> Iterator[_ProgressShown]:
    unit = "questions" if task.kind == "categorical" else "answers"
    if not console.is_terminal:
        yield _ProgressShown(task.name, unit, None, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _ProgressShown(task.name, unit, bar, console)


def _sentence(result: TaskResult) -> str:
    """Summarise a task in one line."""
    low, high = result.interval
    text = (
        f"{result.name}: {100 * result.accuracy:.2f} % of {len(result.right):,} "
        f"(95 %: {100 * low:.2f} to {100 * high:.2f}), {result.seconds:.1f} s"
    )
    if result.num_samples > 1:
        rates = (f"pass@{k} {100 * value:.2f} %" for k, value in result.pass_at.items())
        text += f"; {', '.join(rates)}"
    if result.cut_prompts:
        text += f"; {result.cut_prompts:,} prompts were truncated to the context"
    if result.cut_answers:
        text += f"; {result.cut_answers:,} answers were truncated"
    return text


def _table(results: Sequence[TaskResult], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("task", "problems", "accuracy", "95 % interval", "guessing", "centred"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for result in results:
        low, high = result.interval
        table.add_row(
            result.name,
            f"{len(result.right):,}",
            f"{result.accuracy:.4f}",
            f"{low:.4f} .. {high:.4f}",
            f"{result.baseline:.2f}",
            f"{result.centred:.4f}",
        )
    if (core := chatcore(results)) is not None:
        low, high = core[1]
        table.add_section()
        table.add_row("ChatCORE", "", "", f"{low:.4f} .. {high:.4f}", "", f"{core[0]:.4f}")
    return table
