"""`archerchat eval chat`: evaluate a chat model on ChatCORE's tasks or others.

The figures go to `evals/<stage>/<tag>/chat_step_<step>.json` under the home. Other tasks, limits or
sampling options get another file name, so they never replace the whole of ChatCORE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from archerchat.config import PositiveInt, StageName
from archerchat.console import LiveLine, build_console, build_table
from archerchat.distributed import joined_ranks
from archerchat.errors import UsageError
from archerchat.evals.chat import (
    ANSWER_TOKENS,
    Answer,
    ChatTaskResult,
    chatcore,
    evaluate_task,
    limited,
)
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import ModelOptions
from archerchat.inference.sampling_params import SamplingParams
from archerchat.runtime import dtype_name
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import write_lines
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import CHATCORE, TASKS, build_task, parse_choices

SAMPLING = SamplingParams(max_new_tokens=ANSWER_TOKENS, temperature=0.0, top_k=50)


@dataclass(frozen=True)
class EvalChatConfig(ModelOptions):
    """Evaluate a chat model on ChatCORE's tasks or others."""

    source: StageName = "sft"
    """Stage to load: base, sft or rl."""
    tasks: str | None = None
    """Tasks, separated by commas, each with an optional limit, such as GSM8K:200,MMLU. Defaults to
    the six of ChatCORE."""
    max_problems: PositiveInt | None = None
    """Most problems per task, for tasks without their own limit. Defaults to all."""
    sampling: SamplingParams = SAMPLING
    device_batch_size: PositiveInt = 64
    """Most answers to generate at a time. Halve it if you run out of memory."""
    data_dir: Path | None = None
    """Folder with the tasks' files. By default they are downloaded once."""
    json: Path | None = None
    """File for the figures. Defaults to one under the home's `evals`."""
    answers: Path | None = None
    """File for every generated answer, one JSON object per line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampling = self.sampling
        sampling.refuse_changes("logprobs")
        if sampling.num_samples > 1 and sampling.temperature == 0:
            raise UsageError(
                f"{sampling.num_samples} samples at temperature 0 are all the same: give a "
                "temperature, such as 1, or a single sample"
            )


def evaluate(config: EvalChatConfig, home: Home) -> None:
    """Evaluate task by task; print the figures, and write them, at first to a `.partial.json`."""
    limits, sampling = parse_tasks(config.tasks, config.max_problems), config.sampling
    loaded, runtime = config.load(home, config.source)
    console = build_console(quiet=not runtime.is_master)
    files = TaskFiles(home.cache_dir / "tasks", config.data_dir, notify=console.print)
    figures: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "model_tag": loaded.tag,
        "source": config.source,
        "step": loaded.step,
        "dtype": dtype_name(runtime.compute_dtype),
        "device": runtime.device_name,
        "ranks": runtime.world_size,
        "sampling": asdict(sampling),
        "limits": limits,
    }
    name = file_name(loaded.step, limits, sampling)
    path = config.json or home.eval_dir(config.source, loaded.tag) / name
    unfinished = path.with_suffix(".partial.json")
    results, answers = list[ChatTaskResult](), list[dict[str, Any]]()
    with joined_ranks(runtime) as ranks:
        # All files are read before any task is evaluated; one rank downloads what is missing.
        tasks = ranks.first_alone(
            lambda: [limited(build_task(name, "test", files), n) for name, n in limits.items()]
        )
        on_cuda = loaded.model.device.type == "cuda"
        engine = Engine(loaded.model, config.device_batch_size, compile=on_cuda)
        for task in tasks:
            keep = partial(_keep, answers, task)
            with LiveLine(console, task.name) as line:
                show = partial(_show, line, task)
                result = evaluate_task(engine, loaded.tokenizer, task, sampling, ranks, show, keep)
            console.print(_sentence(result))
            results.append(result)
            complete = len(results) == len(tasks)
            figures |= {"complete": complete, "tasks": {r.label: r.to_json() for r in results}}
            if core := chatcore(results):
                figures |= {"chatcore": core[0], "chatcore_interval_95": list(core[1])}
            if runtime.is_master:
                write_json(path if complete else unfinished, figures)
            if config.answers is not None:
                suffix = f".rank{runtime.rank}" if runtime.rank else ""
                write_lines(config.answers.with_name(config.answers.name + suffix), answers)
    if runtime.is_master:
        unfinished.unlink(missing_ok=True)
    console.print(_table(results, f"{config.source} {loaded.tag}, step {loaded.step}"))
    console.print(f"figures in {path}", style="dim")


def parse_tasks(text: str | None, max_problems: int | None = None) -> dict[str, int | None]:
    """Return the limit of each task in a list such as `GSM8K:200,MMLU`; None is a whole task.

    Without a list they are ChatCORE's tasks. `max_problems` limits those without their own limit.

    Raises:
        UsageError: the list cannot be read, or a task is unknown or named twice.
    """
    if text is None:
        return dict.fromkeys(CHATCORE, max_problems)
    choices = parse_choices(text, "--tasks", TASKS)
    limits = {choice.name: choice.size or max_problems for choice in choices}
    if len(limits) < sum(choice.times for choice in choices):
        raise UsageError(f"--tasks {text}: a task is named twice; name each of them once")
    return limits


def file_name(step: int, limits: Mapping[str, int | None], sampling: SamplingParams) -> str:
    """Return the file name for an evaluation's figures, one per set of conditions."""
    name = f"chat_step_{step:06d}"
    if limits != dict.fromkeys(CHATCORE):
        parts = (task if n is None else f"{task}-{n}" for task, n in sorted(limits.items()))
        name = "_".join([name, *parts])
    if sampling != SAMPLING:
        name += f"_{hashlib.sha256(repr(sampling).encode()).hexdigest()[:8]}"
    return f"{name}.json"


def _show(line: LiveLine, task: Task, done: int, total: int) -> None:
    unit = "questions" if task.kind == "categorical" else "answers"
    speed = f"{line.rate(done):,.1f} {unit}/s | {line.left(done, total)} left"
    line.show(f"{task.name}: {done}/{total} | {speed}", done, total)


def _keep(answers: list[dict[str, Any]], task: Task, answer: Answer) -> None:
    names = ("problem", "sample", "right", "lenient")
    judged = {"task": task.name, **{name: getattr(answer, name) for name in names}}
    reason = answer.completion.finish_reason
    answers.append({**judged, "finish_reason": reason, "text": answer.text})


def _sentence(result: ChatTaskResult) -> str:
    low, high = result.interval
    text = (
        f"{result.label}: {100 * result.accuracy:.2f} % of {result.examples:,} "
        f"(95 %: {100 * low:.2f} to {100 * high:.2f}), {result.seconds:.1f} s"
    )
    if result.lenient_accuracy is not None:
        text += f"; {100 * result.lenient_accuracy:.2f} % leniently"
    if result.num_samples > 1:
        rates = (f"pass@{k} {100 * value:.2f} %" for k, value in result.pass_at.items())
        text += f"; {', '.join(rates)}"
    if result.cut_prompts:
        text += f"; {result.cut_prompts:,} prompts were truncated to the context"
    if result.cut_answers:
        text += f"; {result.cut_answers:,} answers were truncated"
    return text


def _table(results: Sequence[ChatTaskResult], title: str) -> Table:
    columns = ("problems", "accuracy", "95 % interval", "lenient", "guessing", "centred")
    table = build_table("task", *columns, title=title)
    for result in results:
        low, high = result.interval
        lenient = result.lenient_accuracy
        table.add_row(
            result.label,
            f"{result.examples:,}",
            f"{result.accuracy:.4f}",
            f"{low:.4f}–{high:.4f}",
            "" if lenient is None else f"{lenient:.4f}",
            f"{result.random_baseline:.2f}",
            f"{result.centred:.4f}",
        )
    if core := chatcore(results):
        score, (low, high) = core
        table.add_section()
        table.add_row("ChatCORE", "", "", f"{low:.4f}–{high:.4f}", "", "", f"{score:.4f}")
    return table
