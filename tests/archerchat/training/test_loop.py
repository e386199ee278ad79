"""The step loop: order, cadence, signals, accumulation, gradient scaling, figures."""

from __future__ import annotations

import gc
import io
import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.archerchat.conftest import signal_this_process
from torch import Tensor, nn

from archerchat.console import ProgressLine
from archerchat.errors import ArcherChatError
from archerchat.home import Home
from archerchat.optim.optimizer import AdamGroup, Optimizer
from archerchat.runtime import Runtime
from archerchat.training.loop import SAVE_SECONDS, Loop
from archerchat.training.recipe import Evaluation, Metric, StepSettings
from archerchat.training.state import LoopState, Speed
from archerchat.training.telemetry import MetricsLog, Occasion, open_run


@dataclass(frozen=True)
class Plan:
    """How long a run is and how often the loop does more than train."""

    num_iterations: int = 4
    grad_accum_steps: int = 2
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None


PLAN = Plan()


class StubRecipe:
    """Fit four weights to 1, and write down what the loop asks for."""

    metric = Metric("val/bpb", "validation bits per byte")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.runtime = Runtime(torch.device("cpu"), dtype, "a CPU", "forced")
        self.model = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        group = AdamGroup(("weight",), 0.1, (0.8, 0.95), 0.0)
        self.optimizer = Optimizer(self.model, [group])
        self.plan, self.state = PLAN, LoopState()
        self.at_start = True
        self.progress: ProgressLine | None = None
        self.calls: list[str] = []
        self.batches = 0
        self.on_call: dict[str, Callable[[], None]] = {}
        """What else happens at a call, by its name."""

    @property
    def weight(self) -> Tensor:
        return self.model.weight.detach().flatten().clone()

    @property
    def grad_accum_steps(self) -> int:
        return self.plan.grad_accum_steps

    @property
    def evaluations(self) -> list[Evaluation]:
        return [
            Evaluation(
                lambda: self.evaluate(self.state.step),
                self.plan.eval_every,
                at_start=self.at_start,
            )
        ]

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.on_call.get(call, lambda: None)()

    def total_steps(self, step: int) -> int:
        return self.plan.num_iterations

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        self.batches += 1
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.batches))
        self.note(f"batch {self.batches}")
        return inputs, inputs.sum(1)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return (self.model(inputs)[:, 0] - targets).square().mean()

    def settings(self, step: int) -> StepSettings:
        self.note(f"step {step}")
        return StepSettings(1.0, 0.9, 0.0)

    def step_tokens(self) -> int:
        return 16

    def step_flops(self) -> int:
        return 1000

    def step_metrics(self) -> Mapping[str, float]:
        return {"stub/batches": float(self.batches)}

    def evaluate(self, step: int) -> Mapping[str, float]:
        self.note(f"evaluate {step}")
        return {"val/bpb": 3.0 - abs(step - 2) / 10}

    def sample(self) -> Mapping[str, str]:
        self.note(f"sample {self.state.step}")
        return {"prompt": "text"}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"model": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["model"] == {}

    # It writes the checkpoints too.

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        self.saved = LoopState(**state["loop"]), dict(state["scaler"])
        assert finished == (step == self.plan.num_iterations)
        self.note(f"save {step}")

    is_writing = False

    def wait(self) -> None:
        pass

    def note_measured(self, step: int, loop: Mapping[str, Any]) -> None:
        self.noted = step, LoopState(**loop)

    def find(self, step: int) -> Path | None:
        return Path(f"step_{step:06d}") if f"save {step}" in self.calls else None

    def events(self) -> list[str]:
        return [call for call in self.calls if not call.startswith("batch")]


def build_loop(recipe: StubRecipe, plan: Plan = PLAN, state: LoopState | None = None) -> Loop:
    recipe.plan = plan
    given: Any = recipe
    loop = Loop(given, 1e9, plan.save_every, plan.sample_every)
    loop.state = recipe.state = state or loop.state
    return loop


def run(loop: Loop, metrics: MetricsLog | None = None) -> bool:
    recipe: Any = loop.recipe
    progress = ProgressLine(Console(file=io.StringIO()), recipe.plan.num_iterations)
    return loop.run(recipe, metrics or MetricsLog(), progress)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal_this_process(number)


def test_saves_then_evaluates_then_samples_then_trains() -> None:
    recipe = StubRecipe()
    plan = replace(PLAN, num_iterations=5, eval_every=2, sample_every=4, save_every=2)
    assert run(build_loop(recipe, plan))
    assert recipe.events() == [
        *("evaluate 0", "step 0", "step 1"),
        *("save 2", "evaluate 2", "step 2", "step 3"),
        *("save 4", "evaluate 4", "sample 4", "step 4"),
        *("save 5", "evaluate 5", "sample 5"),
    ]
    assert recipe.batches == 10
    assert torch.all(recipe.weight > 0.3)


def test_validation_that_rises_while_training_falls_is_said_once_an_evaluation() -> None:
    recipe = StubRecipe()
    values = iter([3.0, 2.9, 2.9001, 2.95, 2.8])
    recipe.evaluate = lambda step: {"val/bpb": next(values)}  # type: ignore[method-assign]
    loop, notes = build_loop(recipe, replace(PLAN, eval_every=1)), list[tuple[int, bool]]()
    recipe.on_call = {
        f"step {i}": lambda i=i: notes.append((i, loop.state.overfitting)) for i in range(4)
    }
    run(loop)
    assert notes == [(0, False), (1, False), (2, False), (3, True)]
    assert not loop.state.overfitting
    assert loop.progress._bar.console.file.getvalue().count("memorises its training data") == 1  # type: ignore[attr-defined]


def test_without_a_cadence_the_end_only_saves() -> None:
    recipe = StubRecipe()
    run(build_loop(recipe))
    assert recipe.events() == ["step 0", "step 1", "step 2", "step 3", "save 4"]


def test_a_run_shorter_than_its_cadence_is_measured_at_the_end() -> None:
    recipe = StubRecipe()
    plan = replace(PLAN, eval_every=9, sample_every=9, save_every=9)
    recipe.at_start = False
    run(build_loop(recipe, plan))
    assert recipe.events()[0] == "step 0"
    assert recipe.events()[-3:] == ["save 4", "evaluate 4", "sample 4"]


@pytest.mark.parametrize(("push", "saves"), [("last", ["3", "4"]), ("best", ["2", "3", "4"])])
def test_checkpoints_are_saved_by_time(
    push: Any, saves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the best one is wanted, wherever the model is measured."""
    recipe, now = StubRecipe(), [0.0]
    monkeypatch.setattr("archerchat.training.loop.time.monotonic", lambda: now[0])
    recipe.on_call["step 2"] = lambda: now.append(now.pop() + SAVE_SECONDS)
    loop = build_loop(recipe, replace(PLAN, eval_every=2))
    loop.save_every = "time"
    run(loop, MetricsLog(push_checkpoints=push))
    assert [e.split()[1] for e in recipe.events() if e.startswith("save")] == saves


def test_a_resumed_loop_repeats_no_save_but_the_evaluation_that_may_be_missing() -> None:
    recipe = StubRecipe()
    plan = replace(PLAN, eval_every=2, save_every=2)
    run(build_loop(recipe, plan, LoopState(step=2)))
    assert recipe.events() == ["evaluate 2", "step 2", "step 3", "save 4", "evaluate 4"]


def test_a_loop_resumed_after_its_last_step_only_evaluates() -> None:
    recipe = StubRecipe()
    plan = replace(PLAN, eval_every=9, sample_every=9)
    loop = build_loop(recipe, plan, LoopState(step=4))
    assert run(loop)
    assert recipe.events() == ["evaluate 4", "sample 4"]
    assert math.isnan(loop.speed.tokens_per_second)
    assert math.isnan(loop.speed.mfu)


@contextmanager
def restored_process() -> Any:
    """Check that the block gives back what it took from the process."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: calls.append("freeze"))
        patch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
        yield
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert gc.isenabled()
    assert calls[-1] == "unfreeze"


def test_an_evaluation_that_fails_costs_no_training() -> None:
    recipe = StubRecipe()

    def fail() -> None:
        raise RuntimeError("the evaluation is broken")

    recipe.on_call["evaluate 2"] = fail
    with restored_process(), pytest.raises(RuntimeError, match="evaluation is broken"):
        run(build_loop(recipe, replace(PLAN, eval_every=2, save_every=2)))
    assert recipe.events() == ["evaluate 0", "step 0", "step 1", "save 2", "evaluate 2"]


def test_garbage_is_collected_only_between_steps() -> None:
    recipe = StubRecipe()
    enabled = []
    recipe.on_call["step 3"] = lambda: enabled.append(gc.isenabled())
    with restored_process():
        run(build_loop(recipe))
    assert enabled == [False]


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved() -> None:
    recipe = StubRecipe()
    recipe.on_call["step 2"] = lambda: recipe.model.weight.data.fill_(math.nan)
    loop = build_loop(recipe, replace(PLAN, save_every=1))
    message = r"loss of step 2 is nan: lower the learning rates .*last checkpoint is intact"
    with restored_process(), pytest.raises(ArcherChatError, match=message):
        run(loop)
    assert recipe.events() == ["step 0", "save 1", "step 1", "save 2", "step 2"]
    assert loop.state.step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_its_step_with_a_checkpoint(number: signal.Signals) -> None:
    recipe = StubRecipe()
    recipe.on_call["step 1"] = lambda: send(number)
    with restored_process():
        assert not run(build_loop(recipe, replace(PLAN, eval_every=1)))
    assert recipe.events() == ["evaluate 0", "step 0", "evaluate 1", "step 1", "save 2"]


def test_signals_that_come_together_are_one_request() -> None:
    recipe = StubRecipe()
    recipe.on_call["batch 3"] = lambda: send(signal.SIGINT, signal.SIGTERM)
    with restored_process():
        assert not run(build_loop(recipe))
    assert recipe.events() == ["step 0", "step 1", "save 2"]


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = StubRecipe()
    recipe.on_call["batch 3"] = lambda: send(signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr("archerchat.runtime.SAME_REQUEST_SECONDS", 0.0)
    with restored_process(), pytest.raises(KeyboardInterrupt):
        run(build_loop(recipe))
    assert recipe.calls[-1] == "batch 3"
    assert "save 1" not in recipe.calls


def test_a_signal_leaves_an_evaluation_at_once_and_saves() -> None:
    recipe = StubRecipe()

    def interrupted() -> None:
        send(signal.SIGINT)
        recipe.note("still evaluating")

    recipe.on_call["evaluate 2"] = interrupted
    with restored_process():
        assert not run(build_loop(recipe, replace(PLAN, eval_every=2)))
    assert recipe.events() == ["evaluate 0", "step 0", "step 1", "evaluate 2", "save 2"]


def test_a_signal_while_sampling_does_not_save_a_second_time() -> None:
    recipe = StubRecipe()
    recipe.on_call["sample 2"] = lambda: send(signal.SIGINT)
    assert not run(build_loop(recipe, replace(PLAN, sample_every=2, save_every=2)))
    assert recipe.events() == ["step 0", "step 1", "save 2", "sample 2"]


def test_a_signal_before_the_first_step_saves_nothing() -> None:
    recipe = StubRecipe()
    recipe.on_call["evaluate 0"] = lambda: send(signal.SIGTERM)
    assert not run(build_loop(recipe, replace(PLAN, eval_every=2)))
    assert recipe.events() == ["evaluate 0"]


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_next_run() -> None:
    recipe = StubRecipe()
    recipe.on_call["step 3"] = lambda: send(signal.SIGINT)
    assert not run(build_loop(recipe))
    assert recipe.events()[-2:] == ["step 3", "save 4"]


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    recipe = StubRecipe()
    thread = threading.Thread(target=run, args=(build_loop(recipe),))
    thread.start()
    thread.join()
    assert recipe.events()[-1] == "save 4"


def test_gradients_are_the_mean_over_micro_batches() -> None:
    recipe, whole = StubRecipe(), StubRecipe()
    seen = []
    batches = [recipe.next_micro_batch() for _ in range(4)]
    recipe.batches = 0
    recipe.optimizer.step = lambda *_: seen.append(recipe.model.weight.grad.clone())  # type: ignore[method-assign,union-attr]
    run(build_loop(recipe, replace(PLAN, num_iterations=1, grad_accum_steps=4)))
    whole.loss(*(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
    assert whole.model.weight.grad is not None
    torch.testing.assert_close(seen[0], whole.model.weight.grad)
    assert recipe.model.weight.grad is None


def test_float16_skips_a_step_whose_gradient_overflows() -> None:
    recipe = StubRecipe(torch.float16)
    weights: list[Tensor] = []
    plain = recipe.loss

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        weights.append(recipe.weight)
        overflow = 1e38 if recipe.batches == 2 else 0.0  # finite until it is scaled
        return plain(inputs, targets) + overflow * recipe.model.weight.sum() * 0.1

    recipe.loss = loss  # type: ignore[method-assign]
    loop = build_loop(recipe, replace(PLAN, grad_accum_steps=1))
    before = loop.scaler.get_scale()
    run(loop)
    assert torch.equal(weights[1], weights[2])  # the second step
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])
    assert loop.state.step == 4
    assert recipe.optimizer.steps_taken == 3
    assert loop.scaler.get_scale() == before / 2
    scaler = recipe.saved[1]
    again = build_loop(recipe)
    again.load_state_dict(loop.state_dict())
    assert again.scaler.state_dict() == loop.scaler.state_dict()
    assert again.state == loop.state
    assert json.loads(json.dumps(scaler)) == scaler


def test_float32_has_no_scaler() -> None:
    recipe = StubRecipe()
    run(build_loop(recipe))
    assert recipe.saved[1] == {}


def journal(home: Home, run: str) -> list[dict[str, Any]]:
    (file,) = (home.run_dir(run) / "journal").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_figures_are_recorded_and_never_zero_or_infinite(tmp_path: Path) -> None:
    recipe, home = StubRecipe(), Home(tmp_path)
    with open_run(home, "run", {}) as metrics:
        loop = build_loop(recipe, replace(PLAN, eval_every=2, sample_every=9))
        assert run(loop, metrics)
    records = journal(home, "run")
    steps = [r["values"] for r in records if r["type"] == "metrics" and "train/loss" in r["values"]]
    assert len(steps) == 4
    for values in steps:
        assert 0 < values["train/mfu"] < math.inf
        assert values["train/tokens_per_second"] > 0
        assert values["train/memory_bytes"] > 2**20
        assert values["train/lr_multiplier"] == 1.0
    assert [values["train/tokens"] for values in steps] == [16, 32, 48, 64]
    assert [values["train/flops"] for values in steps] == [1000, 2000, 3000, 4000]
    bits = {r["step"]: r["values"]["val/bpb"] for r in records if "val/bpb" in r.get("values", {})}
    assert bits == {0: 2.8, 2: 3.0, 4: 2.8}
    texts = [r for r in records if r["type"] == "text" and not r["name"].startswith("run/")]
    assert [r["text"] for r in texts] == ["text"]
    state = loop.state
    assert (state.first_val, state.last_val, state.best_val) == (2.8, 2.8, 2.8)
    seconds = steps[-1]["train/seconds"]
    assert state.training_seconds == pytest.approx(seconds)
    check_speed(loop.speed, seconds)


def statuses(home: Home) -> list[str]:
    return [record["status"] for record in journal(home, "run") if record["type"] == "finish"]


def test_an_interrupted_run_is_recorded_as_such(tmp_path: Path) -> None:
    recipe, home = StubRecipe(), Home(tmp_path)
    recipe.on_call["step 1"] = lambda: send(signal.SIGINT)
    with restored_process(), open_run(home, "run", {}) as metrics:
        run(build_loop(recipe), metrics)
    assert statuses(home) == ["interrupted"]


def test_a_run_that_no_signal_ends_is_finished(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with open_run(home, "run", {}) as metrics:
        run(build_loop(StubRecipe()), metrics)
    assert statuses(home) == ["finished"]


@dataclass(frozen=True)
class Pushes(MetricsLog):
    """Write down which checkpoints are offered."""

    offered: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)

    def push_checkpoint(
        self, path: Path, step: int, occasion: Occasion, metadata: Mapping[str, float]
    ) -> str | None:
        assert path == Path(f"step_{step:06d}")
        self.offered.append((occasion, step, dict(metadata)))
        return "the disk is full"


def test_each_checkpoint_is_offered_when_it_is_there_and_when_it_is_the_best() -> None:
    recipe, metrics = StubRecipe(), Pushes()
    figures = {2: 2.0, 4: 1.5, 6: 1.8, 7: 1.2}  # and better ones where no checkpoint is
    recipe.evaluate = lambda step: {"val/bpb": figures.get(step, 0.5)}  # type: ignore[method-assign]
    plan = replace(PLAN, num_iterations=7, save_every=2, eval_every=1)
    with restored_process():
        run(build_loop(recipe, plan), metrics)
    assert [(occasion, step) for occasion, step, _ in metrics.offered] == [
        *(("last", 2), ("best", 2)),
        *(("last", 4), ("best", 4)),
        ("last", 6),
        *(("last", 7), ("best", 7)),
    ]
    assert metrics.offered[3][2] == {"val/bpb": 1.5}
    assert metrics.offered[0][2]["train/tokens"] == 32
    assert 0 < metrics.offered[0][2]["train/smooth_loss"] < math.inf


def test_more_right_answers_are_better_than_fewer() -> None:
    recipe, metrics = StubRecipe(), Pushes()
    recipe.metric = Metric("val/pass_at_1", "pass@1", higher_is_better=True)
    rates = {1: 0.2, 2: 0.1, 3: 0.5, 4: 0.4}
    recipe.evaluate = lambda step: {"val/pass_at_1": rates.get(step, 0.0)}  # type: ignore[method-assign]
    with restored_process():
        run(build_loop(recipe, replace(PLAN, save_every=1, eval_every=1)), metrics)
    best = [(step, values) for occasion, step, values in metrics.offered if occasion == "best"]
    assert best == [(1, {"val/pass_at_1": 0.2}), (3, {"val/pass_at_1": 0.5})]


def test_the_best_checkpoint_s_figure_survives_a_restart() -> None:
    recipe, metrics = StubRecipe(), Pushes()
    recipe.calls.append("save 2")  # by the process before
    state = LoopState(step=2, best_saved=2.9)
    plan = replace(PLAN, save_every=2, eval_every=2)
    with restored_process():
        run(build_loop(recipe, plan, state), metrics)
    # 3.0 at step 2 and 2.8 at step 4; what was saved before is not offered as the last again.
    assert [(o, s) for o, s, _ in metrics.offered] == [("last", 4), ("best", 4)]
    assert recipe.saved[0].best_saved == 2.9


def check_speed(speed: Speed, seconds: float) -> None:
    """Even a run shorter than the warm-up says how fast it was."""
    assert 16 / seconds < speed.tokens_per_second < math.inf
    assert speed.mfu == pytest.approx(speed.tokens_per_second / 16 * 1000 / 1e9)
    assert 0 < speed.data_wait_share < 1


def test_the_smooth_loss_is_corrected_for_its_start_and_survives_a_restart() -> None:
    recipe = StubRecipe()
    loop = build_loop(recipe, replace(PLAN, num_iterations=2, grad_accum_steps=1))
    losses = []
    plain = recipe.loss

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        losses.append(plain(inputs, targets))
        return losses[-1]

    recipe.loss = loss  # type: ignore[method-assign]
    run(loop)
    first, second = (value.item() for value in losses)
    corrected = loop.state.smooth_loss / (1 - 0.9**2)
    assert corrected == pytest.approx((0.9 * first + second) / 1.9)
