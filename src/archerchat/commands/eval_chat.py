"""`archerchat eval chat`: what a model that converses answers rightly; ChatCORE."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from archerchat.console import build_console
from archerchat.data.task_files import task_files
from archerchat.distributed import Ranks, joined_ranks
from archerchat.errors import UsageError, require_positive, require_seed
from archerchat.evals.chat.evaluate import ChatEvaluator, limited
from archerchat.evals.chat.generative import Answer, Sampling
from archerchat.evals.chat.results import TaskResult, chatcore
from archerchat.files import write_bytes, write_json
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tasks.base import Task
from archerchat.tasks.registry import CHATCORE, TASKS, build_task

PLAIN_LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class EvalChatConfig:
    """Evaluate a model that converses, on ChatCORE's tasks or others."""

    model_tag: str | None = None
    """The model's name; by default the one that was saved last."""
    source: Literal["sft", "rl", "base"] = "sft"
    """Which stage of it."""
    step: int | None = None
    """Which of its checkpoints; by default the latest."""
    tasks: str | None = None
    """Tasks, separated by commas, each with a limit if need be: GSM8K:200,MMLU; by default the
    six of ChatCORE."""
    max_problems: int | None = None
    """Problems of each task that has no limit of its own; by default all."""
    num_samples: int = 1
    """Answers to each generative problem; with several, pass@k is told too."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_k: int | None = 50
    """Draw from so many of the most likely tokens; None draws from all."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""
    device_batch_size: int = 64
    """Answers that are generated at a time."""
    seed: int = 42
    """Of the draws."""
    data_dir: Path | None = None
    """Folder with the tasks' files; by default they are downloaded once."""
    json: Path | None = None
    """Write the figures to this file; by default under the home's `evals`."""
    answers: Path | None = None
    """Also write every generated answer to this file, one JSON object a line."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to run; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""


def evaluate(config: EvalChatConfig, home: Home) -> dict[str, Any]:
    """Evaluate the tasks one by one, keeping the results so far on disk; return them.

    Raises:
        UsageError: there is no such model or task, or a number makes no sense.
        DataError: a task's files are missing or broken.
        SandboxError: HumanEval is asked for and there is no sandbox on this machine.
        CheckpointError, TokenizerError: what is there is damaged.
    """
    limits = parse_tasks(config.tasks, config.max_problems)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.num_samples, config.seed
    )
    _check(config)
    runtime = build_runtime(config.device, config.dtype)
    prepare_process(runtime)
    quiet = not runtime.is_master
    console = build_console(quiet=quiet)
    loaded = load_model(home, runtime, config.source, config.model_tag, config.step)
    console.print(f"{loaded.path}", style="dim")
    with joined_ranks(runtime) as ranks:
        tasks = _build_tasks(config, home, limits, ranks, console)
        evaluator = ChatEvaluator(
            loaded.model, loaded.tokenizer, sampling, config.device_batch_size, ranks
        )
        return _run(config, home, loaded, runtime, evaluator, tasks, console)


def parse_tasks(text: str | None, max_problems: int | None = None) -> dict[str, int | None]:
    """Return each task's limit by its name, None for all of it.

    Args:
        text: `GSM8K:200,MMLU`; None stands for ChatCORE's tasks.
        max_problems: the limit of tasks without one of their own.

    Raises:
        UsageError: a task is unknown or named twice, or a limit is no positive number.
    """
    if max_problems is not None and max_problems < 1:
        raise UsageError(f"--max-problems is {max_problems}; it must be at least 1")
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


def _check(config: EvalChatConfig) -> None:
    require_positive(config, "num_samples", "max_new_tokens", "top_k", "device_batch_size")
    if not (config.temperature == 0 or 0.001 <= config.temperature <= 100):
        raise UsageError(
            f"--temperature is {config.temperature}; it must be 0, or from 0.001 to 100"
        )
    require_seed(config.seed)


def _build_tasks(
    config: EvalChatConfig,
    home: Home,
    limits: dict[str, int | None],
    ranks: Ranks,
    console: Console,
) -> list[Task]:
    """Read every task's files before the first is evaluated; one rank downloads what is missing."""

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
            "sampling": asdict(evaluator.sampling),
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
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, unit: str, bar: Progress | None, console: Console) -> None:
        self._title, self._unit, self._bar, self._console = title, unit, bar, console
        self._task = None if bar is None else bar.add_task(title, total=None, rate="")
        self._started = self._shown = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Take note of how much is done."""
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
    """Say how a task went, in a line."""
    low, high = result.interval
    text = (
        f"{result.name}: {100 * result.accuracy:.2f} % of {len(result.right):,} "
        f"(95 %: {100 * low:.2f} to {100 * high:.2f}), {result.seconds:.1f} s"
    )
    if result.num_samples > 1:
        rates = (f"pass@{k} {100 * value:.2f} %" for k, value in result.pass_at.items())
        text += f"; {', '.join(rates)}"
    if result.cut_prompts:
        text += f"; {result.cut_prompts:,} prompts were cut to the context"
    if result.cut_answers:
        text += f"; {result.cut_answers:,} answers were cut"
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
