"""Schemas and fakes of cascade attention: every level of a plan in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import define, register_fake

_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr, Tensor[] kv_indptr,"
    " Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule, bool causal,"
    " float sm_scale, float v_scale"
)

define(f"cascade_attention({_INPUTS}) -> (Tensor out, Tensor lse)")


@register_fake("cascade_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_indices: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    schedule: Tensor,
    causal: bool,
    sm_scale: float,
    v_scale: float,
) -> tuple[Tensor, Tensor]:
    _check_inputs(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    lse = q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


define(f"cascade_attention.out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()")


@register_fake("cascade_attention.out")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_indices: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    schedule: Tensor,
    causal: bool,
    sm_scale: float,
    v_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    _check_inputs(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    torch._check(out.dim() == 3 and out.dtype == q.dtype)
    torch._check(lse.dim() == 2 and lse.dtype == torch.float32)
    for dim in range(3):
        torch._check(out.shape[dim] == q.shape[dim])
    for dim in range(2):
        torch._check(lse.shape[dim] == q.shape[dim])


def _check_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_indices: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
) -> None:
    torch._check(q.dim() == 3, lambda: f"q has {q.dim()} dimensions, expected 3")
    torch._check(k_cache.dim() == 4, lambda: f"k_cache has {k_cache.dim()} dimensions, expected 4")
    torch._check(q.dtype == k_cache.dtype and k_cache.dtype == v_cache.dtype)
    for dim in range(4):
        torch._check(k_cache.shape[dim] == v_cache.shape[dim])
    torch._check(q.shape[2] == k_cache.shape[3])
    torch._check(q.shape[1] % k_cache.shape[2] == 0)
    torch._check(len(kv_indptr) > 0, lambda: "kv_indptr has no levels")
    torch._check(
        len(qo_indptr) == len(kv_indptr) == len(kv_indices) == len(kv_last_page_len),
        lambda: "the index arrays differ in their number of levels",
    )
