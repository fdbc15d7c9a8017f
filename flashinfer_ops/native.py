"""Finding and loading the compiled libraries."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

import torch

from .meta import NAMESPACE

_MEND = (
    "Install the package again with `pip install --no-build-isolation .` (or `-e .`) in this "
    "environment, with torch >= 2.10 and a C++ compiler (and nvcc for the CUDA library)."
)


@cache
def load(name: str) -> ctypes.CDLL:
    """Load the library `flashinfer_ops/<name>` and with it the kernels that it registers.

    Raises `ImportError` with the reason and the mend when it is missing or does not load.
    """
    # The spec and not a path beside this file: an editable install keeps the two apart.
    spec = importlib.util.find_spec(f"flashinfer_ops.{name}")
    if spec is None or spec.origin is None:
        raise ImportError(f"flashinfer_ops: the compiled library {name} is missing. {_MEND}")
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"flashinfer_ops: the compiled library {name} does not load under torch "
            f"{torch.__version__}: {error.__cause__ or error}. {_MEND}"
        ) from error
    return ctypes.CDLL(spec.origin)


@cache
def load_cuda() -> frozenset[str]:
    """Load the CUDA library where torch has CUDA; the operators whose CUDA kernels it registered.

    The set is empty under a CPU-only torch, which cannot load the library, and where the package
    was built without nvcc: the portable kernels serve CUDA there. A library that is there and does
    not load raises `ImportError`.
    """
    if torch.version.cuda is None or importlib.util.find_spec("flashinfer_ops._C_cuda") is None:
        return frozenset()
    before = _cuda_operators()
    load("_C_cuda")
    return _cuda_operators() - before


def _cuda_operators() -> frozenset[str]:
    """Our operators, as `op` or `op.overload`, that have a kernel of their own for CUDA."""
    return frozenset(
        name.removeprefix(f"{NAMESPACE}::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{NAMESPACE}::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )


def cpu_capability() -> str:
    """Name of the instruction set whose CPU kernels run, such as `avx512_bf16` or `baseline`."""
    function = load("_C").flashinfer_ops_cpu_capability
    function.restype = ctypes.c_char_p
    return str(function().decode())


def set_cpu_capability(name: str) -> None:
    """Make the CPU kernels of another instruction set run, for tests and comparisons.

    `name` is one of `avx512_bf16`, `avx512`, `avx2`, `baseline`; `ValueError` if it is none of them
    or this machine cannot run it.
    """
    if not load("_C").flashinfer_ops_set_cpu_capability(name.encode()):
        raise ValueError(
            f"name is {name!r}, expected an instruction set that this machine runs "
            "(of avx512_bf16, avx512, avx2, baseline)"
        )
