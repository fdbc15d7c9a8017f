"""What the tests of the Triton kernels share: the interpreter, and compiling without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
CAPABILITIES = [80, 90]


def interpreted(test: Any) -> Any:
    """Mark a test that runs kernels in the interpreter. The variable is read when a kernel's module
    is imported, so a whole run of pytest is interpreted or is not."""
    skip = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    return pytest.mark.interpreter(skip(test))


class _NoLauncher:
    """Stands for a `CudaLauncher`: writes the arguments of a launch down."""

    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0
    arg_annotations = kernel_signature = None

    def __init__(self, source: Any, launches: list[tuple[Any, tuple[Any, ...]]]) -> None:
        self.source, self.launches = source, launches

    def launch(self, *args: Any) -> None:
        """Triton 3.6 puts 13 arguments before the kernel's own, 3.9 has those in a tuple."""
        import triton

        own = args[13:] if triton.__version__.startswith("3.6") else args[15]
        self.launches.append((self.source, own))


class _NoDevice:
    """A driver with a target and no device: what is launched under it is compiled, and not run."""

    launches: ClassVar[list[tuple[Any, tuple[Any, ...]]]] = []
    """What each kernel was compiled from and its arguments. One list, since Triton keeps a kernel
    with the launcher that the driver gave it first."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # each capability has its own cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return None, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, source: Any, metadata: Any) -> _NoLauncher:
        return _NoLauncher(source, self.launches)


@contextmanager
def compiling(capability: int, compiled: list[Any]) -> Iterator[_NoDevice]:
    """Kernels launched in this context are compiled for a compute capability, and not run."""
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
        no_device = _NoDevice(capability)
        patch.setattr(driver, "_active", no_device)
        yield no_device


def compile_for(kernel: Any, capability: int, *args: Any, **kwargs: Any) -> Any:
    """`kernel`, compiled for a compute capability (80, 90) and the given arguments.

    They are what a launch passes: tensors of any device or dtypes in their place, numbers, tuples
    of both, None, constexprs, `num_warps`. The result's `asm["ptx"]` and `metadata` may be looked
    at.
    """
    compiled: list[Any] = []
    with compiling(capability, compiled):
        kernel.warmup(*args, grid=(1,), **kwargs)
    return compiled[0]


def compiled_by(capability: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The kernels that `function(*args)` launches, compiled, and specialised as it does, but not
    run; the tensors may be the CPU's."""
    compiled: list[Any] = []
    with compiling(capability, compiled):
        function(*args)
    return compiled
