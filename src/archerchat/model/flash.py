"""FlashAttention's packages, called between two pieces of compiled code.

A module of its own, imported where they are used: the decorator imports torch's compiler, which
would take a second of every command.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    find: Callable[[torch.device, torch.dtype], str | None],
) -> Tensor:
    """Run the kernels of the package that `find` names on (B, T, H, D), over a window of keys."""
    package = find(q.device, q.dtype)
    assert package is not None, "choose_backend lets 'flash' through only where it runs"
    attend = importlib.import_module(package).flash_attn_func
    out = attend(q, k, v, causal=True, window_size=(window, 0))
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
