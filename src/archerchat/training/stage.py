"""What every training command does around the loop: start or resume, announce, train, conclude.

A stage's own file (`pretrain.py`, `sft.py`, `rl.py`) derives `Stage` and says what is trained on
what; `Stage.run` is the skeleton that all three share.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console

import archerchat
from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from archerchat.config import (
    AttentionName,
    DeviceConfig,
    PositiveInt,
    as_json,
    compare_configs,
)
from archerchat.console import ProgressLine, build_console, bytes_text
from archerchat.distributed import joined_ranks
from archerchat.errors import UsageError
from archerchat.files import exclusive, hash_ends, remove_directory, write_json
from archerchat.home import Home
from archerchat.model.attention import Backend
from archerchat.model.config import ModelConfig
from archerchat.planning.peak_flops import PeakFlops, peak_flops
from archerchat.runtime import (
    build_runtime,
    describe_hardware,
    dtype_name,
    explained_memory,
    prepare_process,
)
from archerchat.training.fitting import choose_attention
from archerchat.training.loop import OVERFITTING, Loop
from archerchat.training.recipe import Metric, Recipe
from archerchat.training.resume import CheckpointWriter, changed_circumstances, find_start
from archerchat.training.telemetry import TelemetryConfig, open_run
from archerchat.training.throughput import Outcome

SUMMARY = "summary.json"
"""File in the run's directory that is there once the run is finished."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(DeviceConfig):
    """Options that every training stage has."""

    attention: AttentionName | None = None
    """Attention backend. Defaults to the fastest that works on this machine."""
    compile: bool = True
    """Compile the model and the optimizer; plain code runs where there is no compiler."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass: much less memory, but more time."""
    run: str | None = None
    """Name of the run in the metrics. Defaults to the model's name, with -sft or -rl."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    sample_every: PositiveInt | None = 2000
    """Steps between printed samples, which the end prints too; `none` prints no samples."""
    sample_prompt: tuple[str, ...] = ()
    """Your own prompts for the samples. Defaults to a few of the stage's."""
    save_every: PositiveInt | Literal["time"] | None = "time"
    """Steps between checkpoints. By default one is saved every 15 minutes; `none` saves only at
    the end, where one is saved in any case."""
    keep_last: PositiveInt = 2
    """Number of checkpoints to keep."""
    resume_from_step: int | None = None
    """Step of the checkpoint to resume from. Defaults to the latest, if there is one."""
    resume: str | None = None
    """Name of a model whose run to resume with its saved settings; flags beside it replace them.
    `auto` means what happens anyway: the same command goes on with its own run."""
    overwrite: bool = False
    """Start over: the model's checkpoints of this stage are deleted."""


class Stage(ABC):
    """One training command. A subclass sets the attributes below when it is built.

    Raises:
        UsageError: the device is not here.
    """

    name: ClassVar[str]
    """Directory of its checkpoints: base, sft or rl."""
    command: ClassVar[str]
    done: ClassVar[str]
    """How its models are called: trained, fine-tuned, reinforced."""
    metric: ClassVar[Metric] = Recipe.metric
    evaluates_first: ClassVar[bool] = True
    """Whether the model that training starts from is evaluated."""

    tag: str
    run_name: str
    seed: int
    """Seed of torch's generators at the start."""
    num_iterations: int | None
    """Steps of the run; None where the data decides."""
    extend: bool = False
    files: Sequence[Path] = ()
    """Files that hold the data: every rank needs the same."""
    meta: dict[str, Any]
    """What every checkpoint and journal says of the run; `identity` in it decides the weights."""

    def __init__(self, config: StageConfig, home: Home, console: Console | None = None) -> None:
        self.settings, self.home = config, home
        self.runtime = runtime = build_runtime(config.device, config.dtype)
        self.console = console or build_console(quiet=not runtime.is_master)
        prepare_process(runtime)
        self._joined = ExitStack()
        self.ranks = self._joined.enter_context(joined_ranks(runtime, runtime.device))

    @abstractmethod
    def build_recipe(self, start: Checkpoint | None) -> Recipe:
        """Build the model, its optimizer and its loaders.

        Args:
            start: the checkpoint whose state the recipe will be given; None for a new run.
        """

    @abstractmethod
    def announce(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Yield a label and a sentence for each choice that was made for the user."""

    def is_finished(self, start: Checkpoint) -> bool:
        """Whether a checkpoint is the last of its run."""
        return start.step == self.num_iterations

    def prepare_resume(self, start: Checkpoint) -> list[str]:
        """Do what else a resumed run needs, on the first rank; return lines to print."""
        return []

    def closing_lines(self, recipe: Recipe, finished: bool) -> list[str]:
        """Return what else to print at a run's end."""
        return []

    def choose_attention(
        self, model: ModelConfig, rows: int, document_masking: bool = False
    ) -> tuple[Backend, str]:
        """Pick the attention backend as the flags and this device have it."""
        return choose_attention(
            self.runtime,
            self.ranks,
            self.home.cache_dir,
            model,
            rows,
            forced=self.settings.attention,
            compile=self.settings.compile,
            document_masking=document_masking,
        )

    def describe_result(self, figures: Mapping[str, Any]) -> str:
        """Say what a finished run's summary holds of the stage's metric."""
        key = _summary_key(self.metric)
        if figures[key] is None:
            return "it was not evaluated"
        return f"{self.metric.name} {figures[f'{key}_first']:.4f} -> {figures[key]:.4f}"

    @property
    def directory(self) -> Path:
        """Directory of the model's checkpoints."""
        return self.home.checkpoint_dir(self.name, self.tag)

    def describe(
        self,
        model_config: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        identity: Mapping[str, Any],
        **facts: Any,
    ) -> dict[str, Any]:
        """Return the run's `meta`, with what all stages say in it."""
        return {
            "stage": self.name,
            "source": f"archerchat {self.command}",
            "model_config": dict(model_config),
            "tokenizer": dict(tokenizer),
            "identity": {"dtype": dtype_name(self.runtime.compute_dtype), **identity},
            "config": as_json(self.settings),
            "compile": self.settings.compile,
            "hardware": describe_hardware(self.runtime),
            **facts,
        }

    def run(self) -> Outcome:
        """Train until the last step, or until a signal stops it; do nothing if it is done already.

        Raises:
            UsageError: the settings contradict the run that is there.
            DataError, CheckpointError: something on disk is missing or broken.
        """
        self._refuse_contradictions()
        summary = self.home.run_dir(self.run_name) / SUMMARY
        alone = exclusive(self.directory) if self.ranks.is_master else nullcontext()
        with self._joined, alone:
            start = self._find_start()
            if start is not None and (result := self._find_result(start, summary)) is not None:
                self.console.print(
                    f"model {self.tag!r} is already {self.done}: step {start.step} is in "
                    f"{self.directory}; {result}"
                )
                return Outcome(finished=True)
            with explained_memory():
                recipe = self.build_recipe(start)
            with closing(recipe.loader):
                loop, outcome = self._train(recipe, start, summary)
            # Still among the ranks: some figures are sums over all of them.
            if outcome.finished:
                figures = summarize(outcome, loop, self.metric) | dict(recipe.final_metrics())
                if self.ranks.is_master:
                    write_json(summary, figures)
            self._report_end(outcome, loop)
            for line in self.closing_lines(recipe, outcome.finished):
                self.console.print(line)
        return outcome

    def _refuse_contradictions(self) -> None:
        settings = self.settings
        resumes = settings.resume or self.extend or settings.resume_from_step is not None
        if settings.overwrite and resumes:
            raise UsageError(
                "--overwrite starts over: leave it out to resume, or --resume, --resume-from-step "
                "and --extend"
            )

    def _find_start(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, the same on all ranks."""
        start, settings = None, self.settings
        if not settings.overwrite:
            start = find_start(self.directory, self.meta, settings.resume_from_step, self.extend)
        self._require_same_run(start)
        return start

    def _require_same_run(self, start: Checkpoint | None) -> None:
        """Compare what the ranks are about to do.

        Raises:
            UsageError: on all ranks, where one differs.
        """
        if self.ranks.world_size == 1:
            return
        names, code = ("identity", "validation", "compile"), Path(archerchat.__file__).parent
        own = {name: self.meta[name] for name in names} | {
            "archerchat": f"{archerchat.__version__} {hash_ends(*sorted(code.rglob('*.py')))}",
            "data": {path.name: hash_ends(path) for path in self.files},
            "step": start.step if start else 0,
        }
        runs = self.ranks.gather(own)
        for rank, run in enumerate(runs):
            if differences := compare_configs(runs[0], run):
                raise UsageError(
                    f"rank {rank} would train another run than rank 0 (there saved, here now): "
                    f"{'; '.join(differences)}. Start all ranks with the same command, code and "
                    "data"
                )

    def _train(
        self, recipe: Recipe, start: Checkpoint | None, summary: Path
    ) -> tuple[Loop, Outcome]:
        """Say what will be trained, restore what was saved, and run the loop."""
        settings, peak = self.settings, peak_flops(self.runtime, self.home.cache_dir)
        for label, text in (*self.announce(recipe), *self._announce_device(peak)):
            self.console.print(f"{label:<10} {text}")
        loop = Loop(recipe, peak, settings.save_every, settings.sample_every, self.evaluates_first)
        torch.manual_seed(self.seed)
        resumed_from = None if start is None else start.path
        if start is not None:
            loop.load_state_dict(start.state)
            start.state.clear()  # copied: it would take its memory until the run ends
            self._announce_resume(start)
        if self.ranks.is_master:
            for line in self.prepare_resume(start) if start else ():
                self.console.print(line)
            if settings.overwrite:
                for step in list_checkpoints(self.directory):
                    remove_directory(find_checkpoint(self.directory, step))
            summary.unlink(missing_ok=True)
        return loop, self._run_loop(loop, resumed_from)

    def _run_loop(self, loop: Loop, resumed_from: Path | None) -> Outcome:
        """Run the loop and record what it does."""
        settings, step = self.settings, loop.state.step
        self.runtime.reset_peak_memory()
        with (
            open_run(
                self.home,
                self.run_name,
                self.meta,
                settings.telemetry,
                group=self.command,
                resumed_from=resumed_from,
                rank=self.ranks.rank,
            ) as metrics,
            ProgressLine(self.console, loop.recipe.total_steps(step), step) as progress,
        ):
            tokenizer = self.home.tokenizer_dir(self.meta["tokenizer"]["name"])
            if problem := metrics.push_tokenizer(tokenizer):
                progress.note(f"the tokenizer is not pushed: {problem}")
            checkpoints = CheckpointWriter(self.directory, self.meta, settings.keep_last)
            return loop.run(checkpoints, metrics, progress)

    def _announce_device(self, peak: PeakFlops) -> Iterator[tuple[str, str]]:
        runtime = self.runtime
        dtype = dtype_name(runtime.compute_dtype)
        yield "device", f"{runtime.device_name}, {dtype} ({runtime.dtype_reason})"
        yield "peak", f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})"
        yield "attention", self.meta["attention"]

    def _announce_resume(self, start: Checkpoint) -> None:
        self.console.print(f"resuming from {start.path}")
        if changed := changed_circumstances(start.meta, self.meta):
            self.console.print(
                "note: results will match closely but not bit for bit after this point: "
                + "; ".join(changed)
            )

    def _find_result(self, start: Checkpoint, summary: Path) -> str | None:
        """Return a finished run's result; None where there is something left to do.

        The summary is written last: without it the final evaluation is missing.
        """
        if not self.is_finished(start):
            return None
        try:
            figures = json.loads(summary.read_text())
            return self.describe_result(figures) if figures["steps"] == start.step else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _report_end(self, outcome: Outcome, loop: Loop) -> None:
        """Print how the run ended."""
        console, state = self.console, loop.state
        if not outcome.finished:
            where = f"the checkpoint is in {self.directory}" if state.step else "nothing is saved"
            given = {
                "--resume-from-step": self.settings.resume_from_step is not None,
                "--overwrite": self.settings.overwrite,
            }
            again = "".join(f"without {flag} " for flag, is_given in given.items() if is_given)
            console.print(
                f"stopped at step {state.step} of {loop.recipe.total_steps(state.step)}; {where}. "
                f"Run the same command {again}to resume"
            )
            return
        if math.isfinite(outcome.tokens_per_second):
            console.print(
                f"trained on {state.tokens:,} tokens in {state.training_seconds / 60:.1f} min: "
                f"{outcome.tokens_per_second:,.0f} tok/s, mfu {100 * outcome.mfu:.1f} %, "
                f"{100 * outcome.data_wait_share:.1f} % of the time waiting for data, peak memory "
                f"{bytes_text(self.runtime.peak_memory_bytes())}"
            )
        if math.isfinite(state.last_val):
            console.print(
                f"{self.metric.label}: {state.first_val:.4f} -> {state.last_val:.4f} "
                f"(best {self.metric.score(state.best_val):.4f})"
            )
        if state.overfitting:
            console.print(f"warning: {OVERFITTING.format(self.metric.label)}")


def summarize(outcome: Outcome, loop: Loop, metric: Metric) -> dict[str, Any]:
    """Return the figures of a finished run, for its `summary.json`."""
    state, key = loop.state, _summary_key(metric)
    figures = {
        "steps": state.step,
        "tokens": state.tokens,
        f"{key}_first": state.first_val,
        key: state.last_val,
        f"{key}_best": metric.score(state.best_val),
        "overfitting": state.overfitting,
        "training_seconds": state.training_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "peak_flops_per_second": loop.peak.flops_per_second,
        "peak_memory_bytes": loop.runtime.peak_memory_bytes(),
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _summary_key(metric: Metric) -> str:
    return metric.name.replace("/", "_")
