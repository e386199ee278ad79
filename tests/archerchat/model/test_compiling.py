"""A compiler that works is used for every shape; one that does not costs speed, not the run."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from archerchat.model.compiling import CompileWarning, compiled


def double(x: Tensor, times: float = 2) -> Tensor:
    """Multiply."""
    if x.numel() == 13:
        raise KeyError("thirteen")
    return x * times


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as the real compiler does, and generate no code: it takes seconds."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def broken_compiler(error: Exception, calls: list[object]) -> Callable[..., Callable[..., Any]]:
    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def fast(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            raise error

        return fast

    return compile


@pytest.mark.parametrize(
    "error",
    [
        Unsupported("no such graph\nmuch more"),
        BackendCompilerFailed(double, RuntimeError("no such graph"), None),
        FailOnRecompileLimitHit("no such graph"),
        CppCompileError(["g++"], "no such graph"),
        InvalidCxxCompiler(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_compiler_is_named_once_and_not_asked_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch, "compile", broken_compiler(error, calls))
    run = compiled(double)
    with pytest.warns(CompileWarning, match="double runs uncompiled, and slower: ") as caught:
        assert torch.equal(run(torch.ones(3), times=5), torch.full((3,), 5.0))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(torch.ones(4)), torch.full((4,), 2.0))
    assert len(calls) == 1


def test_the_functions_own_errors_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    own = KeyError("thirteen")
    calls: list[object] = []
    monkeypatch.setattr(torch, "compile", broken_compiler(own, calls))
    run = compiled(double)
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            run(torch.ones(3))
        assert caught.value is own
    assert len(calls) == 2, "the compiler is not to blame"


@pytest.mark.usefixtures("traced_only")
def test_an_error_that_tracing_meets_is_still_the_functions_own() -> None:
    with (
        warnings.catch_warnings(action="ignore", category=CompileWarning),
        pytest.raises(KeyError, match="thirteen"),
    ):
        compiled(double)(torch.ones(13))


@pytest.mark.usefixtures("traced_only")
def test_a_name_and_a_docstring_stay() -> None:
    run = compiled(double)
    assert (run.__name__, run.__doc__) == ("double", "Multiply.")


@pytest.mark.usefixtures("traced_only")
def test_many_shapes_are_all_compiled() -> None:
    run = compiled(double)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        for size in range(20, 40):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))


MISSING_COMPILER = """
import warnings, torch
from archerchat.model.compiling import CompileWarning, compiled
def double(x):
    return x * 2
run = compiled(double)
with warnings.catch_warnings(record=True, action="always", category=CompileWarning) as caught:
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))
print(*(w.message for w in caught if w.category is CompileWarning), sep="\\n")
"""


@pytest.mark.slow
def test_a_machine_without_a_cpp_compiler_runs_uncompiled(tmp_path: Path) -> None:
    environment = {
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", MISSING_COMPILER],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("double runs uncompiled, and slower: ")
    assert done.stdout.count("runs uncompiled") == 1
    assert "no-such-compiler" in done.stdout
