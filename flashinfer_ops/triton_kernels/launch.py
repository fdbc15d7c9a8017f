"""Launching a kernel at the cost of the launch.

`kernel[grid](...)` looks at every argument on every call, to find the compiled kernel that fits
them: 50 us for the kernels of cascade attention, in Triton 3.6. Here the caller says what fits: it
keeps a `Launcher` for each set of what Triton would compile another kernel for, which are

    the current device, the types of all arguments, the values of constexprs, whether a pointer is
    a multiple of 16, and of an integer whether it is 1, a multiple of 16, or beyond 32 bits

(of integers that the kernel does not specialise the last alone). What the launcher gets later is
passed on without a look: addresses for tensors, tuples for tuples, a constexpr in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED = knobs.runtime.interpret


def address(tensor: Tensor) -> Any:
    """A tensor as a launcher's argument. The interpreter, which compiles nothing, takes tensors."""
    return tensor if INTERPRETED else tensor.data_ptr()


def misalignment(tensor: Tensor) -> int:
    """Bytes from the multiple of 16 below, in which Triton would see a difference."""
    return tensor.data_ptr() % 16


def current_stream(device: int) -> int:
    """The handle of the stream to launch on."""
    return 0 if INTERPRETED else int(driver.active.get_current_stream(device))


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor when a kernel is compiled."""

    dtype: torch.dtype
    misalignment: int

    def data_ptr(self) -> int:
        return self.misalignment


class Launcher:
    """A kernel for one specialisation, on a one-dimensional grid of so many programs.

    `sample` are arguments that specialise as those to come do, with `Pointer` for tensors.
    """

    def __init__(self, kernel: Any, programs: int, sample: tuple[Any, ...], **options: Any) -> None:
        self._kernel = kernel
        self._programs = programs
        self._sample = sample
        self._options = options
        self._launch: Callable[[int, tuple[Any, ...]], object] | None = None

    def __call__(self, stream: int, args: tuple[Any, ...]) -> None:
        if self._launch is None:
            self._launch = self._interpreted() if INTERPRETED else self._compiled()
        self._launch(stream, args)

    def _interpreted(self) -> Callable[[int, tuple[Any, ...]], object]:
        on_grid = self._kernel[(self._programs,)]
        return lambda stream, args: on_grid(*args, **self._options)

    def _compiled(self) -> Callable[[int, tuple[Any, ...]], object]:
        """What `kernel[grid]` comes down to, without hooks of profilers before and after.

        `CompiledKernel.run` takes the same in Triton 3.6 and 3.9. It is a method in Python around a
        function in C, which differs; where that is known, it is called without the method.
        """
        compiled = self._kernel.warmup(*self._sample, grid=(1,), **self._options)
        run = compiled.run  # loads the kernel: `function` is none before
        grid = (self._programs, 1, 1)
        function, metadata = compiled.function, compiled.packed_metadata
        version = ".".join(triton.__version__.split(".")[:2])
        if not hasattr(run, "launch") or run.global_scratch_size or run.profile_scratch_size:
            version = "any"
        if version == "3.6":
            launch, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
            nones = (None, None, None)
            return lambda stream, args: launch(
                *grid, stream, function, *flags, None, None, metadata, *nones, *args
            )
        if version == "3.9":
            launch, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
            nones = (None, None, None)
            types = (run.arg_annotations, run.kernel_signature)
            return lambda stream, args: launch(
                *grid, stream, function, *flags, metadata, *nones, None, None, *types, args
            )
        return lambda stream, args: run(*grid, stream, function, metadata, None, None, None, *args)
