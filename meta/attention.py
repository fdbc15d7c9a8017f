"""Schemas and fakes of cascade attention: every level of a plan in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check, check_shape, define, register_fake

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
# What a chip's own kernels leave to the kernels for any chip; callers use the other overloads.
define(f"cascade_attention.portable({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()")


@register_fake("cascade_attention.portable")
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
    check_shape("out", out, q.shape)
    check_shape("lse", lse, q.shape[:2])
    check(out.dtype == q.dtype, "out and q differ in dtype")
    check(lse.dtype == torch.float32, "lse is not float32")


def _check_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_indices: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
) -> None:
    check_shape("q", q, (None, None, None))
    check_shape("k_cache", k_cache, (None, None, None, q.shape[2]))
    check_shape("v_cache", v_cache, k_cache.shape)
    check(q.dtype == k_cache.dtype == v_cache.dtype, "q, k_cache and v_cache differ in dtype")
    check(q.shape[1] % k_cache.shape[2] == 0, "q's heads are no multiple of k_cache's")
    check(len(kv_indptr) > 0, "kv_indptr has no levels")
    check(
        len(qo_indptr) == len(kv_indptr) == len(kv_indices) == len(kv_last_page_len),
        "the index arrays differ in their number of levels",
    )
