"""`python -m flashinfer_ops`: versions, devices, the kernel behind each operator, a self-check."""

from __future__ import annotations

import importlib.util
import platform
import sys

import torch
from torch import Tensor

from . import __version__, cascade_attention, native, plan_cascade
from .meta import NAMESPACE
from .reference.attention import cascade_attention as oracle

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


def served_by(operator: str, device: torch.device) -> str:
    """Which kernel serves an operator on a device, and why."""
    key = _KEYS[device.type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key):
        return f"reference (plain PyTorch: no {key} kernel is registered)"
    if key == "CUDA":
        if operator in native.load_cuda():
            if operator in ("cascade_attention", "cascade_attention.out"):
                return _attention_on(device)
            return "C++ from _C_cuda"
        return f"Triton ({_why_not_native()})"
    return f"C++ from _C ({native.cpu_capability()}, the best this processor runs)"


def _attention_on(device: torch.device) -> str:
    """The C++ operator has kernels for Hopper alone, and hands on what they do not serve."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"Triton (compute capability {capability[0]}.{capability[1]}; _C_cuda's is for 9.0)"
    return "C++ from _C_cuda for float16, bfloat16, head_dim 64, 128, 256; Triton for the rest"


def _why_not_native() -> str:
    """Why the C++ CUDA library does not serve an operator on CUDA."""
    if importlib.util.find_spec("flashinfer_ops._C_cuda") is None:
        return "_C_cuda was not built: no nvcc was there, or FLASHINFER_OPS_CUDA was off"
    return "_C_cuda has no kernel for it"


def self_check(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of a two-level cascade against the float64 oracle."""
    generator = torch.Generator().manual_seed(0)

    def index(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q: Tensor = torch.randn(3, 6, 64, generator=generator).to(device, dtype)
    cache: Tensor = torch.randn(9, 2, 16, 2, 64, generator=generator).to(device, dtype)
    plan = plan_cascade(
        [index(0, 3), index(0, 1, 2, 3)],
        [index(0, 4), index(0, 1, 2, 4)],
        [index(7, 2, 5, 0), index(8, 1, 3, 6)],
        [index(11), index(16, 3, 1)],
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim=64,
        page_size=16,
    )
    out, lse = cascade_attention(q, cache, plan)
    q64, cache64 = q.cpu().double(), cache.cpu().double()
    qo, kv, indices, last = (
        [t.cpu() for t in arrays]
        for arrays in (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)
    )
    wanted, wanted_lse = oracle(
        q64,
        cache64[:, 0],
        cache64[:, 1],
        qo,
        kv,
        indices,
        last,
        plan.schedule.cpu(),
        False,
        plan.sm_scale,
        1.0,
    )
    error = (out.cpu().double() - wanted).norm() / wanted.norm()
    lse_error = (lse.cpu().double() - wanted_lse).abs().max()
    return float(torch.maximum(error, lse_error))


def main() -> int:
    print(
        f"flashinfer_ops {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
    print(f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads")
    operators = sorted(
        name.removeprefix(f"{NAMESPACE}::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{NAMESPACE}::")
    )
    failed = False
    for device in devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "host processor"
        print(f"\n{device} ({name})")
        for operator in operators:
            print(f"  {operator:24} {served_by(operator, device)}")
        for dtype, tolerance in _TOLERANCE.items():
            error = self_check(device, dtype)
            passed = error <= tolerance
            failed |= not passed
            print(
                f"  self-check {str(dtype).removeprefix('torch.'):8} largest error {error:.1e} "
                f"(allowed {tolerance:.0e}): {'passed' if passed else 'FAILED'}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
