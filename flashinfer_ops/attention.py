"""Cascade attention over a paged KV cache, every level in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import (
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_like,
    check_tensor,
    check_unit_stride,
    refuse_grad,
)
from .page import PagedKVCache, split_cache
from .plan import CascadePlan

_ops = torch.ops.flashinfer_ops


def cascade_attention(
    q: Tensor,
    paged_kv_cache: PagedKVCache,
    plan: CascadePlan,
    kv_layout: str = "NHD",
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query row over the KV of its groups on every level.

    The result is that of one softmax over all the KV that a row sees, as if each request had its
    whole context to itself, while the kernels read a shared group's KV once for many rows. Method:
    cascade inference in FlashInfer (arXiv:2501.01005), FlashAttention's online softmax
    (arXiv:2205.14135).

    Args:
        q: `[tokens, num_qo_heads, head_dim]`, float32, float16 or bfloat16, contiguous last
            dimension. Rows beyond the plan's last query row get the empty state.
        paged_kv_cache: `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD),
            `[pages, 2, num_kv_heads, page_size, head_dim]` (HND), or a tuple `(k_cache, v_cache)`
            without the dimension of size 2; in q's dtype, any strides but a contiguous last
            dimension. It is read in place, never copied. Slots past a group's last token may hold
            anything.
        plan: what `plan_cascade` returned for this batch.
        kv_layout: "NHD" or "HND".
        out: written instead of a new tensor: like q, contiguous last dimension.
        lse: written instead of a new tensor: `[tokens, num_qo_heads]` float32.
        k_scale: factor of the keys (multiplies the logits). Default 1.
        v_scale: factor of the values (multiplies the output). Default 1.

    Returns:
        `(out, lse)`: the output, like q, and the base-2 log-sum-exp of the scaled logits,
        `[tokens, num_qo_heads]` float32. A row that sees no KV has output 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, one that does
            not fit the plan, or one that requires grad.
        RuntimeError: on the CPU, a page number outside of the cache.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> cache = torch.randn(4, 2, 16, 2, 64)
        >>> plan = flashinfer_ops.plan_cascade(  # 2 requests share pages 0 and 1, own one each
        ...     [i(0, 2), i(0, 1, 2)], [i(0, 2), i(0, 1, 2)], [i(0, 1), i(2, 3)], [i(16), i(5, 9)],
        ...     num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
        >>> out, lse = flashinfer_ops.cascade_attention(torch.randn(2, 4, 64), cache, plan)
        >>> out.shape, lse.shape
        (torch.Size([2, 4, 64]), torch.Size([2, 4]))
    """
    k_cache, v_cache = _check_inputs(q, paged_kv_cache, plan, kv_layout)
    sm_scale = plan.sm_scale if k_scale is None else plan.sm_scale * _scale("k_scale", k_scale)
    inputs = (
        q,
        k_cache,
        v_cache,
        plan.qo_indptr,
        plan.kv_indptr,
        plan.kv_indices,
        plan.kv_last_page_len,
        plan.schedule,
        plan.causal,
        sm_scale,
        1.0 if v_scale is None else _scale("v_scale", v_scale),
    )
    if out is None and lse is None:
        out, lse = _ops.cascade_attention.default(*inputs)
        return out, lse
    if out is None:
        out = q.new_empty(q.shape)
    if lse is None:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _check_outputs(q, out, lse)
    _ops.cascade_attention.out(*inputs, out, lse)
    return out, lse


def _check_inputs(q: Any, paged_kv_cache: Any, plan: Any, kv_layout: str) -> tuple[Tensor, Tensor]:
    if not isinstance(plan, CascadePlan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected a CascadePlan")
    check_tensor("q", q, dim=3)
    check_dtype("q", q, KERNEL_DTYPES)
    check_device("q", q, plan.schedule.device, "the plan")
    check_unit_stride("q", q)
    if q.shape[1] != plan.num_qo_heads or q.shape[2] != plan.head_dim:
        raise ValueError(
            f"q has shape {list(q.shape)}, expected [tokens, {plan.num_qo_heads}, {plan.head_dim}] "
            "to fit the plan"
        )
    if plan.max_tokens is not None and q.shape[0] > plan.max_tokens:
        raise ValueError(
            f"q has {q.shape[0]} rows, expected at most {plan.max_tokens}, the plan's max_tokens"
        )
    k_cache, v_cache = split_cache(paged_kv_cache, kv_layout)
    check_dtype("paged_kv_cache", k_cache, (q.dtype,))
    check_device("paged_kv_cache", k_cache, q.device, "q")
    wanted = (plan.page_size, plan.num_kv_heads, plan.head_dim)
    if k_cache.shape[1:] != wanted:
        raise ValueError(
            f"paged_kv_cache has page_size, num_kv_heads, head_dim = {list(k_cache.shape[1:])} "
            f"under kv_layout {kv_layout}, expected {list(wanted)} to fit the plan"
        )
    refuse_grad(q=q, paged_kv_cache=k_cache)
    refuse_grad(paged_kv_cache=v_cache)
    return k_cache, v_cache


def _check_outputs(q: Tensor, out: Tensor, lse: Tensor) -> None:
    check_tensor("out", out, dim=3)
    check_tensor("lse", lse, dim=2)
    check_like("out", out, q.shape, "q")
    check_dtype("out", out, (q.dtype,))
    check_device("out", out, q.device, "q")
    check_unit_stride("out", out)
    check_like("lse", lse, q.shape[:2], "q")
    check_dtype("lse", lse, (torch.float32,))
    check_device("lse", lse, q.device, "q")
    refuse_grad(out=out, lse=lse)


def _scale(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    return float(value)
