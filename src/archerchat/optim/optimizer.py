"""One optimizer for the whole model: AdamW groups and Muon stacks (SPEC section 3).

`build_groups` sorts a model's parameters into the groups of the specification's table.
`Optimizer` steps them with the schedule's settings. The learning rates in a group are the scaled
base rates and never change; the multiplier comes with each step.

Several ranks share the work and the state (ZeRO-2, https://arxiv.org/abs/1910.02054): each updates
some rows of a table, and some matrices of a Muon stack. A step starts all reductions of gradients;
then it waits for each in turn, updates its share and starts the exchange of the updated values;
then it waits for the exchanges. A single process does the same without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archerchat.dial import LearningRates
from archerchat.distributed import Collective, Ranks
from archerchat.model.compiling import compiled
from archerchat.optim.adamw import adamw_update
from archerchat.optim.muon import muon_update, variance_shape

EPSILON = 1e-10
WORTH_COMPILING = 2**14
"""Number of elements below which compiling an update does not pay."""
PART_ELEMENTS = 2**25
"""Most elements of matrices that a single process updates at a time, unless one has more."""
WORTH_SHARING = 1024
"""Number of elements below which every rank makes the whole update itself."""


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


Unit = tuple[str, AdamGroup | MuonGroup]
"""A parameter of AdamW, or a stack of Muon by its first member's name."""


def build_groups(
    model: nn.Module, rates: LearningRates, decay: float = 1.0
) -> list[AdamGroup | MuonGroup]:
    """Sort every parameter of a `Transformer` into its group, in the order of SPEC section 3.

    Args:
        decay: factor on AdamW's weight decay.
    """
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = [name for name in names if name.startswith("blocks.")]
    values = tuple(name for name in names if name.startswith("value_embeddings."))

    def present(*wanted: str) -> tuple[str, ...]:
        return tuple(name for name in wanted if name in shapes)

    groups: list[AdamGroup | MuonGroup] = [
        AdamGroup(("unembedding.weight",), rates.unembedding, (0.8, 0.96), 0.01 * decay),
        AdamGroup(("token_embedding.weight",), rates.embedding, (0.8, 0.995), 0.001 * decay),
        AdamGroup(values, rates.value_embedding, (0.8, 0.995), 0.01 * decay),
        AdamGroup(present("residual_lambdas"), rates.residual_lambdas, (0.8, 0.95), 0.05 * decay),
        AdamGroup(present("input_lambdas"), rates.input_lambdas, (0.96, 0.95), 0.0),
        AdamGroup(
            present("smear_gate.weight", "smear_lambda", "backout_lambda"),
            rates.smear,
            (0.8, 0.95),
            0.0,
        ),
    ]
    for shape in sorted({shapes[name] for name in matrices}):
        members = tuple(name for name in matrices if shapes[name] == shape)
        groups.append(MuonGroup(members, rates.matrix))
    grouped = [name for group in groups for name in group.names]
    assert sorted(grouped) == sorted(names), "every parameter belongs to exactly one group"
    return groups


class Optimizer:
    """Step all groups; hold their state, or this rank's share of it.

    Args:
        groups: from `build_groups`.
        compute_dtype: Muon orthogonalises in bfloat16 if this is bfloat16, else in float32.
        ranks: a step sums their gradients.
        state_dtype: of the moments; bfloat16 halves their memory.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[AdamGroup | MuonGroup],
        compute_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        ranks: Ranks | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.groups, self.ranks = groups, ranks or Ranks()
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.muon_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        self.steps_taken = 0
        self._adamw: Callable[..., Any] = compiled(adamw_update) if compile else adamw_update
        self._muon: Callable[..., Any] = compiled(muon_update) if compile else muon_update
        self.state_dtype = state_dtype
        self._shapes: dict[str, torch.Size] = {}
        """Shape of each buffer over all ranks."""
        self._split: dict[str, range] = {}
        """This rank's rows of each buffer that ranks share."""
        self.state: dict[str, Tensor] = {}
        for unit in self._units():
            self._add_buffers(unit)

    def _units(self) -> Iterator[Unit]:
        """Yield the units of reducing and updating: parameters of AdamW, stacks of Muon."""
        for group in self.groups:
            if isinstance(group, MuonGroup):
                yield group.names[0], group
            else:
                yield from ((name, group) for name in group.names)

    def _add_buffers(self, unit: Unit) -> None:
        """Start a unit's state at zero; Muon's is named after the first of the stack."""
        (name, group), ranks = unit, self.ranks
        parameter = self.parameters[name]
        if isinstance(group, MuonGroup):
            stack = torch.Size((len(group.names), *parameter.shape))
            shapes = {"momentum": stack, "variance": torch.Size(variance_shape(stack))}
            split = ranks.world_size > 1
        else:
            shapes = {"mean": parameter.shape, "square": parameter.shape}
            split = (
                ranks.world_size > 1
                and parameter.numel() >= WORTH_SHARING
                and parameter.size(0) % ranks.world_size == 0
            )
        for kind, shape in shapes.items():
            rows = math.ceil(shape[0] / ranks.world_size) if split else 0
            if split:
                self._split[f"{kind}.{name}"] = range(ranks.rank * rows, (ranks.rank + 1) * rows)
            own = (rows, *shape[1:]) if split else shape
            self._shapes[f"{kind}.{name}"] = shape
            dtype = torch.float32 if kind == "variance" else self.state_dtype
            self.state[f"{kind}.{name}"] = parameter.new_zeros(own, dtype=dtype)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters in the form that `torch.amp.GradScaler` needs."""
        return [{"params": list(self.parameters.values())}]

    @torch.no_grad()
    def step(self, rate_multiplier: float, momentum: float, muon_weight_decay: float) -> None:
        """Update every parameter from its `.grad`, or from zero if it has none.

        Args:
            rate_multiplier: factor on every group's rate.
            momentum: Muon's momentum.
        """
        self.steps_taken += 1
        settings = rate_multiplier, momentum, muon_weight_decay
        if self.ranks.world_size == 1:
            for name, group in self._units():
                if isinstance(group, MuonGroup):
                    self._step_parts(group, *settings)
                else:
                    self._step_adamw(name, group, _gradient(self.parameters[name]), settings[0])
            return
        units = list(self._units())
        # All are under way before the first is waited for.
        reduced = [self._reduce(unit) for unit in units]
        updated = [
            self._update(unit, gradient.wait(), *settings)
            for unit, gradient in zip(units, reduced, strict=True)
        ]
        for unit, values in zip(units, updated, strict=True):
            self._store(unit, values.wait())

    def _step_parts(
        self, group: MuonGroup, multiplier: float, momentum: float, weight_decay: float
    ) -> None:
        """Update a single process's stack in parts, to bound the memory for temporary values."""
        count, scalars = len(group.names), (group.rate * multiplier, weight_decay, momentum)
        most = max(1, PART_ELEMENTS // self.parameters[group.names[0]].numel())
        size = next(n for n in range(min(most, count), 0, -1) if count % n == 0)
        for first in range(0, count, size):
            rows = range(first, first + size)
            members = [self.parameters[group.names[row]] for row in rows]
            gradients = torch.stack([_gradient(member) for member in members])
            updated = self._step_muon(group, gradients, scalars, rows)
            torch._foreach_copy_([member.data for member in members], list(updated.unbind(0)))

    def _reduce(self, unit: Unit) -> Collective:
        """Start summing a unit's gradients over the ranks; each receives its share."""
        name, group = unit
        if isinstance(group, MuonGroup):
            members = [self.parameters[member] for member in group.names]
            gradients = [_gradient(member) for member in members]
            missing = -len(members) % self.ranks.world_size
            stack = torch.stack([*gradients, *[torch.zeros_like(gradients[0])] * missing])
            for member in members:
                member.grad = None  # the stack holds it
            return self.ranks.start_reduce_scatter(stack)
        gradient = _gradient(self.parameters[name])
        if f"mean.{name}" in self._split:
            return self.ranks.start_reduce_scatter(gradient.contiguous())
        return self.ranks.start_sum(gradient)

    def _update(
        self,
        unit: Unit,
        gradient: Tensor,
        multiplier: float,
        momentum: float,
        weight_decay: float,
    ) -> Collective:
        """Update this rank's share of a unit and start collecting the others'."""
        name, group = unit
        if isinstance(group, MuonGroup):
            settings = (group.rate * multiplier, weight_decay, momentum)
            rows = self._split[f"momentum.{name}"]
            return self.ranks.start_gather(self._step_muon(group, gradient, settings, rows))
        own = self._step_adamw(name, group, gradient, multiplier)
        split = f"mean.{name}" in self._split
        return self.ranks.start_gather(own) if split else Collective(None, None, own)

    def _step_adamw(
        self, name: str, group: AdamGroup, gradient: Tensor, multiplier: float
    ) -> Tensor:
        """Update and return this rank's rows of a parameter."""
        beta1, beta2 = group.betas
        parameter, rows = self.parameters[name].data, self._split.get(f"mean.{name}")
        own = parameter if rows is None else parameter[rows.start : rows.stop]
        update: Callable[..., Any] = self._adamw if own.numel() >= WORTH_COMPILING else adamw_update
        scalars = (
            group.rate * multiplier,
            group.weight_decay,
            beta1,
            beta2,
            1 - beta1**self.steps_taken,
            1 - beta2**self.steps_taken,
        )
        moments = self.state[f"mean.{name}"], self.state[f"square.{name}"]
        step = torch.tensor(self.steps_taken, dtype=torch.int32)
        update(own, gradient, *moments, *map(_scalar, scalars), step, EPSILON)
        return own

    def _step_muon(
        self, group: MuonGroup, gradients: Tensor, scalars: tuple[float, ...], rows: range
    ) -> Tensor:
        """Return the updated matrices (n, out, in) of some rows of the stack.

        The rows are this rank's, or a part of a single process's. If there are too few matrices for
        all ranks, the last ones are zero and stay zero.
        """
        name = group.names[0]
        first = self._split.get(f"momentum.{name}", range(1)).start
        local = slice(rows.start - first, rows.stop - first)
        members = [self.parameters[member].data for member in group.names[rows.start : rows.stop]]
        missing = len(rows) - len(members)
        matrices = torch.stack([*members, *[torch.zeros_like(gradients[0])] * missing])
        worth = matrices.numel() >= WORTH_COMPILING
        update: Callable[..., Tensor] = self._muon if worth else muon_update
        buffers = self.state[f"momentum.{name}"][local], self.state[f"variance.{name}"][local]
        return update(matrices, gradients, *buffers, *map(_scalar, scalars), self.muon_dtype)

    def _store(self, unit: Unit, values: Tensor) -> None:
        """Write a unit's updated parameters, unless they were updated in place."""
        name, group = unit
        if isinstance(group, MuonGroup):
            members = [self.parameters[member].data for member in group.names]
            torch._foreach_copy_(members, list(values[: len(members)].unbind(0)))
        elif f"mean.{name}" in self._split:
            self.parameters[name].data.copy_(values)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return `steps_taken` and the whole buffers by name; all ranks call this. A single
        process's buffers are not copied."""
        whole = {}
        for name, buffer in self.state.items():
            if name in self._split:
                collected = self.ranks.start_gather(buffer).wait()[: self._shapes[name][0]]
                buffer = collected.cpu() if self.ranks.is_master else buffer
            whole[name] = buffer
        return {"steps_taken": self.steps_taken, **whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved buffers of any number of ranks.

        Raises:
            ValueError: a buffer is missing, unknown, or of another shape.
        """
        buffers = {name: value for name, value in state.items() if name != "steps_taken"}
        if buffers.keys() != self.state.keys() or "steps_taken" not in state:
            odd = sorted((self.state.keys() | {"steps_taken"}) ^ state.keys())
            raise ValueError(f"optimizer state does not fit this model; differing: {odd[:4]}")
        for name, shape in self._shapes.items():
            if buffers[name].shape != shape:
                raise ValueError(
                    f"optimizer buffer {name} is {tuple(buffers[name].shape)} in the checkpoint, "
                    f"{tuple(shape)} in this model"
                )
        for name, buffer in self.state.items():
            rows = self._split.get(name, range(buffer.size(0)))
            own = buffers[name][rows.start : rows.stop]
            buffer[: len(own)] = own
            buffer[len(own) :] = 0
        self.steps_taken = int(state["steps_taken"])


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
