"""One optimizer for the whole model: AdamW groups and Muon stacks (SPEC section 3).

`build_groups` sorts a model's parameters into the groups of the specification's table.
`Optimizer` steps them with the settings that the schedule gives. The learning rates in a group are
the scaled base rates and never change; the multiplier comes with each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archerchat.dial import LearningRates
from archerchat.model.compiling import compiled
from archerchat.optim.adamw import adamw_update
from archerchat.optim.muon import muon_update, variance_shape

EPSILON = 1e-10
WORTH_COMPILING = 2**14
"""Elements below which compiling an update takes longer than it ever saves."""


@dataclass(frozen=True)
class AdamGroup:
    """Parameters that AdamW steps with the same constants."""

    names: tuple[str, ...]
    rate: float
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True)
class MuonGroup:
    """Equal-shaped matrices that Muon steps as one stack; the decay comes with the step."""

    names: tuple[str, ...]
    rate: float


def build_groups(model: nn.Module, rates: LearningRates) -> list[AdamGroup | MuonGroup]:
    """Sort every parameter of a `Transformer` into its group, in the order of SPEC section 3."""
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = [name for name in names if name.startswith("blocks.")]
    values = tuple(name for name in names if name.startswith("value_embeddings."))
    smear = ("smear_gate.weight", "smear_lambda", "backout_lambda")
    groups: list[AdamGroup | MuonGroup] = [
        AdamGroup(("unembedding.weight",), rates.unembedding, (0.8, 0.96), 0.01),
        AdamGroup(("token_embedding.weight",), rates.embedding, (0.8, 0.995), 0.001),
        AdamGroup(values, rates.value_embedding, (0.8, 0.995), 0.01),
        AdamGroup(("residual_lambdas",), rates.residual_lambdas, (0.8, 0.95), 0.05),
        AdamGroup(("input_lambdas",), rates.input_lambdas, (0.96, 0.95), 0.0),
        AdamGroup(smear, rates.smear, (0.8, 0.95), 0.0),
    ]
    for shape in sorted({shapes[name] for name in matrices}):
        members = tuple(name for name in matrices if shapes[name] == shape)
        groups.append(MuonGroup(members, rates.matrix))
    grouped = [name for group in groups for name in group.names]
    assert sorted(grouped) == sorted(names), "every parameter belongs to exactly one group"
    return groups


class Optimizer:
    """Step all groups; hold their state.

    Args:
        model: its parameters are updated in place.
        groups: from `build_groups`.
        compute_dtype: Muon orthogonalises in bfloat16 when this is bfloat16, else in float32.
        compile: fuse each update with `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[AdamGroup | MuonGroup],
        compute_dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.groups = groups
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        self.steps_taken = 0
        self._adamw: Callable[..., Any] = compiled(adamw_update) if compile else adamw_update
        self._muon: Callable[..., Any] = compiled(muon_update) if compile else muon_update
        self.state: dict[str, Tensor] = dict(self._initial_state())

    def _initial_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every buffer; Muon's are stacked under the name of the group's first member."""
        for group in self.groups:
            first = self.parameters[group.names[0]] if group.names else None
            if isinstance(group, MuonGroup):
                assert first is not None
                stack = torch.Size((len(group.names), *first.shape))
                yield f"momentum.{group.names[0]}", first.new_zeros(stack)
                yield f"variance.{group.names[0]}", first.new_zeros(variance_shape(stack))
                continue
            for name in group.names:
                for moment in ("mean", "square"):
                    yield (
                        f"{moment}.{name}",
                        torch.zeros_like(self.parameters[name], dtype=torch.float32),
                    )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters as `torch.amp.GradScaler` looks for them."""
        return [{"params": list(self.parameters.values())}]

    @torch.no_grad()
    def step(self, rate_multiplier: float, momentum: float, muon_weight_decay: float) -> None:
        """Update every parameter from its `.grad`; a parameter without one counts as zero.

        Args:
            rate_multiplier: the schedule's factor on every group's rate.
            momentum: Muon's momentum at this step.
            muon_weight_decay: Muon's weight decay at this step.
        """
        self.steps_taken += 1
        for group in self.groups:
            if isinstance(group, MuonGroup):
                self._step_muon(group, rate_multiplier, momentum, muon_weight_decay)
            else:
                self._step_adamw(group, rate_multiplier)

    def _step_adamw(self, group: AdamGroup, multiplier: float) -> None:
        beta1, beta2 = group.betas
        scalars = (
            group.rate * multiplier,
            group.weight_decay,
            beta1,
            beta2,
            1 - beta1**self.steps_taken,
            1 - beta2**self.steps_taken,
        )
        for name in group.names:
            parameter = self.parameters[name]
            update: Callable[..., Any] = (
                self._adamw if parameter.numel() >= WORTH_COMPILING else adamw_update
            )
            update(
                parameter.data,
                _gradient(parameter),
                self.state[f"mean.{name}"],
                self.state[f"square.{name}"],
                *(torch.tensor(x, dtype=torch.float32) for x in scalars),
                EPSILON,
            )

    def _step_muon(
        self, group: MuonGroup, multiplier: float, momentum: float, weight_decay: float
    ) -> None:
        members = [self.parameters[name] for name in group.names]
        scalars = (group.rate * multiplier, weight_decay, momentum)
        size = len(members) * members[0].numel()
        update: Callable[..., Any] = self._muon if size >= WORTH_COMPILING else muon_update
        updated = update(
            torch.stack([p.data for p in members]),
            torch.stack([_gradient(p) for p in members]),
            self.state[f"momentum.{group.names[0]}"],
            self.state[f"variance.{group.names[0]}"],
            *(torch.tensor(x, dtype=torch.float32) for x in scalars),
            self.muon_dtype,
        )
        torch._foreach_copy_([p.data for p in members], list(updated.unbind(0)))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers by name, not copied, and `steps_taken`."""
        return {"steps_taken": self.steps_taken, **self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved buffers.

        Raises:
            ValueError: a buffer is missing, unknown, or of another shape.
        """
        buffers = {name: value for name, value in state.items() if name != "steps_taken"}
        if buffers.keys() != self.state.keys() or "steps_taken" not in state:
            odd = sorted((self.state.keys() | {"steps_taken"}) ^ state.keys())
            raise ValueError(f"optimizer state does not fit this model; differing: {odd[:4]}")
        for name, buffer in self.state.items():
            if buffer.shape != buffers[name].shape:
                raise ValueError(
                    f"optimizer buffer {name} is {tuple(buffers[name].shape)} in the checkpoint, "
                    f"{tuple(buffer.shape)} in this model"
                )
        for name, buffer in self.state.items():
            buffer.copy_(buffers[name])
        self.steps_taken = int(state["steps_taken"])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
