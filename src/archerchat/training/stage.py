"""What the three training commands share: their options, what they decide, what they build.

Each stage's own file (`pretrain.py`, `sft.py`, `rl.py`) derives `Stage`. Creating one decides
everything about the run, `build` makes the model, the optimizer and the data, and `run.py` trains.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint
from archerchat.config import AttentionName, Config, DeviceConfig, PositiveInt, as_json
from archerchat.console import build_console
from archerchat.data.prefetch import Batch, LoaderT, PrefetchingLoader, Streams, saved_streams
from archerchat.dial import LearningRates, grad_accum_steps
from archerchat.distributed import joined_ranks
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.attention import Backend, choose_backend, runs_varlen
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.planning.memory import RESERVED_SHARE, fit_micro_batch
from archerchat.planning.peak_flops import PeakFlops, peak_flops
from archerchat.planning.window_speed import fastest_for_windows
from archerchat.runtime import build_runtime, describe_hardware, dtype_name, prepare_process
from archerchat.training.recipe import Recipe
from archerchat.training.telemetry import TelemetryConfig


@dataclass(frozen=True)
class CheckpointOptions(Config):
    """When checkpoints are saved, and how a run resumes from them."""

    save_every: PositiveInt | Literal["time"] | None = "time"
    """Steps between checkpoints. `time` saves one every 15 minutes, and `none` only at the end."""
    keep_last: PositiveInt = 2
    """Number of checkpoints to keep."""
    resume_from_step: int | None = None
    """Step of the checkpoint to resume from. Defaults to the latest."""
    resume: str | None = None
    """Resume the run of this model with its saved settings; other flags override them. `auto` is
    the default: resume the run that this command belongs to."""
    overwrite: bool = False
    """Start over, and delete the model's checkpoints of this stage."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(DeviceConfig):
    """Options of every training stage."""

    attention: AttentionName | None = None
    """Attention backend. Defaults to the fastest that works on this machine."""
    compile: bool = True
    """Compile the model and the optimizer; without a compiler they run uncompiled."""
    device_batch_size: PositiveInt | Literal["auto"] | None = "auto"
    """Rows per micro-batch; gradient accumulation keeps the total batch the same. `auto` takes as
    many as fit in memory; in sft it takes the base model's number if that fits."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: this takes much less memory and more time."""
    run: str | None = None
    """Name of the run in the metrics. Defaults to the model's name, with -sft or -rl."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    sample_every: PositiveInt | None = 2000
    """Steps between printed samples; the last step prints some too. `none` prints none."""
    sample_prompt: tuple[str, ...] = ()
    """Prompts for the samples. Defaults to a few built-in ones."""


class Stage(Recipe):
    """One training command; `decide` of a subclass sets the attributes below.

    Raises:
        UsageError: the device is not here, or the settings contradict each other or what they name.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """

    name: ClassVar[str]
    """Directory of its checkpoints: base, sft or rl."""
    command: ClassVar[str]
    done: ClassVar[str]
    """Past participle for messages: trained, fine-tuned, reinforced."""
    adam_decay: ClassVar[float] = 1.0
    """Factor on the weight decay of AdamW's groups."""

    tag: str
    seed: int
    """Seed of torch's generators at the start."""
    num_iterations: int | None
    """Steps of the run; None where the data decides."""
    model_config: ModelConfig
    rates: LearningRates
    total_batch_tokens: int
    extend: bool = False
    state_dtype: torch.dtype = torch.float32
    """Dtype of the optimizer's moments."""
    files: Sequence[Path] = ()
    """Data files, which must be the same on every rank."""
    figures: Mapping[str, float] = {}
    """The stage's own figures for a finished run's summary, besides those of a step."""

    # What `fit_to_device` sets.
    rows: int
    """Rows per micro-batch."""
    recomputes: bool
    attention: tuple[Backend, str]
    """The backend, and the reason for it."""

    def __init__(
        self,
        config: StageConfig,
        home: Home,
        console: Console | None = None,
        most_rows: int | None = None,
    ) -> None:
        """Decide everything; choose at most `most_rows`, if more were too many."""
        self.config, self.home, self.most_rows = config, home, most_rows
        self.runtime, self.compile = build_runtime(config.device, config.dtype), config.compile
        self.console = console or build_console(quiet=not self.runtime.is_master)
        prepare_process(self.runtime)
        self.joined = ExitStack()
        self.ranks = self.joined.enter_context(joined_ranks(self.runtime, self.runtime.device))
        self.decide()
        self.meta = self.describe()

    @abstractmethod
    def decide(self) -> None:
        """Decide everything about the run, and build nothing yet."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that decides the weights, as JSON."""

    @abstractmethod
    def set_weights(self, start: Checkpoint | None) -> None:
        """Give the new model its weights; those of `start` will be loaded later."""

    @abstractmethod
    def open_data(self, start: Checkpoint | None) -> None:
        """Open the loader and set up the evaluations; the optimizer is there."""

    @abstractmethod
    def announce(self) -> Iterator[tuple[str, str]]:
        """Yield a label and a sentence for each choice that was made for the user."""

    def describe(self) -> dict[str, Any]:
        """Return what every checkpoint and journal says about the run; stages add to it.

        A command may resume the run if its `identity` is the same.
        """
        return {
            "stage": self.name,
            "source": f"archerchat {self.command}",
            "identity": {"dtype": dtype_name(self.runtime.compute_dtype), **self.identity()},
            "config": as_json(self.config),
            "compile": self.config.compile,
            "hardware": describe_hardware(self.runtime),
            "attention": "{} ({})".format(*self.attention),
        }

    def describe_steps(self, count: int) -> str:
        batch = f"{self.grad_accum_steps} x {self.rows} rows of {self.sequence_length}"
        steps = f"{count:,} step" if count == 1 else f"{count:,} steps"
        return f"{steps} of {self.total_batch_tokens:,} tokens ({batch})"

    def describe_result(self, figures: Mapping[str, Any]) -> str:
        """Describe the stage's metric as a finished run's summary has it."""
        key = self.metric.key
        if figures[key] is None:
            return "it was not evaluated"
        return f"{self.metric.name} {figures[f'{key}_first']:.4f} -> {figures[key]:.4f}"

    def closing_lines(self, finished: bool) -> list[str]:
        """Return the stage's own lines to print at the end."""
        return []

    @property
    def sequence_length(self) -> int:
        return self.model_config.sequence_length

    @property
    def directory(self) -> Path:
        """Where the model's checkpoints are."""
        return self.home.checkpoint_dir(self.name, self.tag)

    @property
    def run_name(self) -> str:
        return self.config.run or (self.tag if self.name == "base" else f"{self.tag}-{self.name}")

    @property
    def summary(self) -> Path:
        """File with the run's figures, written when the run is finished."""
        return self.home.run_dir(self.run_name) / "summary.json"

    @cached_property
    def peak(self) -> PeakFlops:
        """Peak rate of one device."""
        return peak_flops(self.runtime, self.home.cache_dir)

    @cached_property
    def saved(self) -> Checkpoint | None:
        """The checkpoint that the run would resume from, without its state; None for a new run."""
        if self.config.checkpoint.overwrite or not list_checkpoints(self.directory):
            return None
        path = find_checkpoint(self.directory, self.config.checkpoint.resume_from_step)
        return load_checkpoint(path, sections=())

    @property
    def saved_rows(self) -> int:
        """Rows per micro-batch of the saved run; 0 if there is none, or if it was imported."""
        identity = self.saved.meta.get("identity", {}) if self.saved else {}
        return int(identity.get("rollouts", identity).get("device_batch_size", 0))

    def total_steps(self, step: int) -> int:
        assert self.num_iterations is not None  # a stage whose data decides has its own
        return self.num_iterations

    def step_tokens(self) -> int:
        return self.total_batch_tokens

    def count_micro_batches(self, rows: int) -> int:
        """Return how many micro-batches of `rows` rows one rank adds up per step."""
        size, length = self.runtime.world_size, self.sequence_length
        return grad_accum_steps(self.total_batch_tokens, rows, length, size)

    def fit_to_device(
        self, usual_rows: int = 0, reserved_bytes: int = 0, document_masking: bool = False
    ) -> None:
        """Choose the rows per micro-batch, whether layers are recomputed, and the attention.

        Args:
            usual_rows: rows to use if they fit; 0 uses as many as fit.
            reserved_bytes: memory of the device that is needed for other things.
            document_masking: whether attention must keep the conversations of a row apart.

        Raises:
            UsageError: the forced attention cannot run here, or cannot keep them apart.
        """
        given, self.recomputes = self.config.device_batch_size, self.config.activation_checkpointing
        if isinstance(given, int):
            self.rows = given
        else:
            self.choose_rows(usual_rows, reserved_bytes)
        self.grad_accum_steps = self.count_micro_batches(self.rows)
        self.attention = self.choose_attention(document_masking)

    def choose_rows(self, usual: int = 0, reserved_bytes: int = 0) -> None:
        """Estimate how many rows per micro-batch fit, and whether layers must be recomputed.

        A resumed run keeps its rows on the kind of device it was saved on, to be bit-identical.
        """
        runtime, saved = self.runtime, self.saved
        per_step, streams = self.count_micro_batches(1), 1
        if saved and "loader" in saved.hashes:
            streams = saved_streams(load_checkpoint(saved.path, ("loader",)).state["loader"])
        # A step takes whole micro-batches from each stream of data.
        divided = math.gcd(per_step, per_step * runtime.world_size // streams)
        memory = max(0, runtime.total_memory_bytes() - reserved_bytes)
        estimate, fitting, recomputes = fit_micro_batch(
            self.model_config,
            runtime.compute_dtype,
            runtime.device,
            runtime.world_size,
            memory,
            divided,
            recomputes=self.recomputes,
            state_dtype=self.state_dtype,
        )
        rows, usable = fitting or 1, memory * (1 - RESERVED_SHARE)
        if usual and per_step % usual == 0 and estimate.total(usual) <= usable:
            rows = usual
        began_with = self.saved_rows
        before = (saved.meta.get("hardware") or {}).get("device") if saved else None
        if began_with > 0 and per_step % began_with == 0 and before == runtime.device_name:
            rows = began_with
        rows = min(rows, self.most_rows or rows)
        # All ranks call this, even if one lacks the saved run or has another card.
        every_rows, every_recomputes = zip(*self.ranks.gather((rows, recomputes)), strict=True)
        self.rows, self.recomputes = min(every_rows), any(every_recomputes)

    def choose_attention(self, document_masking: bool = False) -> tuple[Backend, str]:
        """Return the attention backend, and the reason for it.

        Raises:
            UsageError: the forced one cannot run here, or cannot keep conversations apart.
        """
        runtime, model, forced = self.runtime, self.model_config, self.config.attention
        try:
            backend, reason = choose_backend(runtime.device, runtime.compute_dtype, forced)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if document_masking and backend == "flash":
            if forced is not None:
                raise UsageError(
                    "--attention flash cannot keep the conversations of a row apart: leave "
                    "--attention out, or --document-masking"
                )
            backend, reason = "flex", "keeps the conversations of a row apart"
        if forced is not None or backend != "flex":
            return backend, reason
        if not self.compile:  # flex has to be compiled
            varlen = runs_varlen(runtime.device, runtime.compute_dtype)
            return "varlen" if varlen else "sdpa", "not compiled"
        whole = min(model.windows) == model.sequence_length
        if document_masking or whole or not runs_varlen(runtime.device, runtime.compute_dtype):
            return backend, reason
        timed = fastest_for_windows(runtime, model, self.rows, self.home.cache_dir)
        return cast("tuple[Backend, str]", self.ranks.gather(timed)[0])

    def build(self, start: Checkpoint | None) -> None:
        """Build model, optimizer and data, for the state of `start` to be loaded into."""
        dtype, compile = self.runtime.compute_dtype, self.config.compile
        self.model = Transformer(self.model_config, dtype, self.attention[0])
        self.set_weights(start)
        self.model.to(self.runtime.device).recomputes = self.recomputes
        groups = build_groups(self.model, self.rates, self.adam_decay)
        self.optimizer = Optimizer(self.model, groups, dtype, compile, self.ranks, self.state_dtype)
        self.open_data(start)
        self.meta = self.describe()

    def open_streams(
        self, open_loader: Callable[..., LoaderT], start: Checkpoint | None
    ) -> Streams[LoaderT]:
        """Open this rank's streams of data; a resumed run has as many as it began with.

        `open_loader` takes `rank` and `world_size`: the stream's number, and how many there are.
        """
        saved, accum = start.state.get("loader") if start else None, self.grad_accum_steps
        count = saved_streams(saved) if saved else self.ranks.world_size
        return Streams(
            lambda rank, size: open_loader(rank=rank, world_size=size), count, accum, self.ranks
        )

    def measure_bits(
        self, loader: PrefetchingLoader[Any], num_tokens: int, seen: Callable[[Batch], float]
    ) -> dict[str, float]:
        """Measure bits per byte of validation data, going over it at most once.

        Args:
            loader: yields the same batches on all ranks, which share them; closed at the end.
            seen: returns the share of the data read so far, from 0 to 1, given the last batch.
        """
        count = max(1, num_tokens // (self.rows * self.sequence_length))

        def iter_own() -> Iterator[Batch]:
            for done, batch in zip(range(1, count + 1), loader, strict=False):
                if done % self.ranks.world_size == self.ranks.rank:
                    yield batch
                share = seen(batch)
                self.show_progress("evaluating", max(done / count, share))
                if share >= 1:
                    return

        with loader:
            return {"val/bpb": self.bits_per_byte(iter_own())}
