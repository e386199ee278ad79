"""`torch.compile` that falls back to the plain function where it cannot work.

No C++ compiler, no Triton, a graph that the compiler refuses: training is slower then, not
impossible. Compilation happens before anything runs, so a failed one has no side effects.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

MOST_GRAPHS = 64
"""Kinds of layers x training and evaluation x batch shapes pass torch's own limit of 8."""
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"size_asserts": False}
"""Compiled code would otherwise check its own buffers' shapes in Python, 2 % of a CPU's step."""


class CompileWarning(UserWarning):
    """Say that a function runs uncompiled, and why."""


def compiled(
    function: Callable[P, R], *, whole: bool = True, dynamic: bool = False
) -> Callable[P, R]:
    """Compile `function` for the shapes it is called with, or run it plainly with a warning.

    Args:
        whole: insist on one graph; without it, parts that cannot be compiled run as they are.
        dynamic: compile once for all sizes above 1, instead of again for each.
    """
    fast = torch.compile(function, dynamic=dynamic, fullgraph=whole, options=OPTIONS)
    broken = False

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal broken
        if not broken:
            try:
                with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                    return fast(*args, **kwargs)
            except _compiler_errors() as error:
                broken = True
                reason = " ".join(str(error).split("\n")[:2])  # the second names what was raised
                name = getattr(function, "__qualname__", repr(function))
                warnings.warn(
                    f"{name} runs uncompiled, and slower: {reason}", CompileWarning, stacklevel=2
                )
        return function(*args, **kwargs)

    return run


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler
