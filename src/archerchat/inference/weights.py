"""A model's weights as inference wants them.

In training a linear layer keeps float32 masters and casts them at each use. A decoding step uses
each weight once, for a few rows: the cast would cost more than the product. `InferenceModel`
has the matrices cast once. On CPUs those in bfloat16 are also put in the order that oneDNN's
kernels read, where this torch can do that (docs/LOG.md has figures).

In float32 there is nothing to cast, and the model itself serves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archerchat.model.transformer import Linear, Transformer

LEAST_PACKED = 64
"""Rows and columns of a matrix; gates are smaller, and the smear's is read by name."""


class FixedLinear(Linear):
    """A linear layer whose weight is cast once."""

    def __init__(self, source: Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.register_buffer("weight", source.weight.detach().to(dtype), persistent=False)

    def load(self, source: Linear) -> None:
        """Take the source's present values, in place: a captured graph reads them there."""
        self.weight.copy_(source.weight.detach())


class PackedLinear(Linear):
    """A bfloat16 linear layer on a CPU, in the order of oneDNN's kernels."""

    def __init__(self, source: Linear) -> None:
        nn.Module.__init__(self)
        self.register_buffer("weight", _pack(source), persistent=False)

    def load(self, source: Linear) -> None:
        """Take the source's present values."""
        self.weight = _pack(source)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product


def _pack(source: Linear) -> Tensor:
    weight = source.weight.detach().to(torch.bfloat16)
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether this torch packs matrices of this kind, and computes the same with them."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    layer = Linear(64, 64)
    x = torch.arange(128, dtype=torch.bfloat16).view(2, 64) / 64
    try:
        packed = PackedLinear(layer)(x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(packed, F.linear(x, layer.weight.to(x.dtype)), atol=0.05)


class InferenceModel:
    """A model in the form that computes fastest without gradients.

    Args:
        source: the model; embeddings and scalars stay shared with it.

    Attributes:
        model: the source itself in float32.
        packed: whether its matrices are in oneDNN's order, which cannot be compiled.
    """

    def __init__(self, source: Transformer) -> None:
        self._source, self.model = source, source
        self._cast: list[tuple[FixedLinear | PackedLinear, Linear]] = []
        self.packed = False
        if source.compute_dtype != torch.float32:
            self._build()

    def _build(self) -> None:
        source = self._source
        self.packed = can_pack(source.device, source.compute_dtype)
        with torch.device("meta"):
            model = Transformer(source.config, source.compute_dtype, source.backend)
        originals = dict(source.named_modules())
        for path, module in list(model.named_modules()):
            original = originals[path]
            for name, child in list(module.named_children()):
                linear = getattr(original, name)
                if isinstance(child, Linear):
                    fixed = self._fix(linear, source.compute_dtype)
                    setattr(module, name, fixed)
                    self._cast.append((fixed, linear))
            for name, _ in list(module.named_parameters(recurse=False)):
                setattr(module, name, getattr(original, name))
        self.model = model.train(source.training)

    def _fix(self, linear: Linear, dtype: torch.dtype) -> FixedLinear | PackedLinear:
        if self.packed and min(linear.weight.shape) >= LEAST_PACKED:
            return PackedLinear(linear)
        return FixedLinear(linear, dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the source's weights after they have changed."""
        for fixed, linear in self._cast:
            fixed.load(linear)
