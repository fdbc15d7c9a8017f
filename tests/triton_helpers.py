"""What the tests of the Triton kernels share: the interpreter, and compiling without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
CAPABILITIES = [80, 90]


def interpreted(test: Any) -> Any:
    """Mark a test that runs kernels in the interpreter. The variable is read when a kernel's module
    is imported, so a whole run of pytest is interpreted or is not."""
    skip = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    return pytest.mark.interpreter(skip(test))


class _NoDevice:
    """A driver with a target and no device: launches under it compile and stop there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # each capability has its own cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(capability: int, compiled: list[Any]) -> Iterator[None]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        # Not set_active: to reset it would look for a device's driver, and find none.
        patch.setattr(driver, "_active", _NoDevice(capability))
        yield


def compile_for(kernel: Any, capability: int, *args: Any, **kwargs: Any) -> Any:
    """`kernel`, compiled for a compute capability (80, 90) and the given arguments.

    They are what a launch passes: tensors of any device or dtypes in their place, numbers, tuples
    of both, None, constexprs, `num_warps`. The result's `asm["ptx"]` and `metadata` may be looked
    at.
    """
    compiled: list[Any] = []
    with _compiling(capability, compiled):
        kernel.warmup(*args, grid=(1,), **kwargs)
    return compiled[0]


def compiled_by(capability: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The kernels that `function(*args)` launches, compiled, and specialised as it does, but not
    run; the tensors may be the CPU's."""
    compiled: list[Any] = []
    with _compiling(capability, compiled):
        function(*args)
    return compiled
