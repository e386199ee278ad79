"""Linear layers in 8-bit floats, with one scale per tensor (https://arxiv.org/abs/2209.05433).

Activations and weights are rounded to e4m3, which is the finer of the two formats, and gradients
to e5m2, which reaches further. Each tensor is scaled so that its largest value is the format's
largest. The three products of a layer run on 8 bits and return the activations' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MIN_FEATURES = 128
"""Layers with fewer inputs or outputs, such as the gates, gain nothing."""
MULTIPLE = 16
"""The kernels want every dimension of a product to be a multiple of this."""
SMALLEST = 1e-12
"""Least value that a tensor is scaled by: all of its values may be zero."""


def supports_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats: NVIDIA cards since sm89."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits_fp8(layer: nn.Linear) -> bool:
    """Whether a layer is large enough, and of a shape that the kernels take."""
    sizes = layer.in_features, layer.out_features
    return min(sizes) >= MIN_FEATURES and not any(size % MULTIPLE for size in sizes)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (..., in), a multiple of `MULTIPLE` rows, by (out, in) in 8 bits; keep the dtype."""
    product: Tensor = _Product.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], -1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x / scale in 8 bits, and the scale () in float32."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=SMALLEST) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _multiply(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool
) -> Tensor:
    """Multiply (m, k) by the transpose of (n, k), both with contiguous rows; `fast` accumulates
    with fewer bits, which gradients do not bear."""
    (x, x_scale), (y, y_scale) = a, b
    result: Tensor = torch._scaled_mm(
        x, y.t(), x_scale, y_scale, out_dtype=dtype, use_fast_accum=fast
    )
    return result


class _Product(torch.autograd.Function):
    """y = x W^T, from (n, in) and (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, w8 = quantize(x, FORWARD), quantize(weight, FORWARD)
        ctx.save_for_backward(*x8, *w8)
        ctx.weight_dtype = weight.dtype
        return _multiply(x8, w8, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(gradients[0], BACKWARD)
        dtype = gradients[0].dtype
        columns = w8.t().contiguous(), w_scale  # (in, out)
        of_x = _multiply((g8, g_scale), columns, dtype, fast=False)
        rows = (g8.t().contiguous(), g_scale), (x8.t().contiguous(), x_scale)
        of_weight = _multiply(*rows, dtype, fast=False).to(ctx.weight_dtype)
        return of_x, of_weight
