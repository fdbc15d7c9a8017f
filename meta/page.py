"""Schema and fake of the cache append: writing new K and V rows into the pages of a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, register_fake

define(
    "append_paged_kv_cache_(Tensor append_key, Tensor append_value, Tensor batch_indices,"
    " Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_indices,"
    " Tensor kv_indptr) -> ()"
)


@register_fake("append_paged_kv_cache_")
def _(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    torch._check(k_cache.dim() == 4, lambda: "k_cache is not 4-D")
    torch._check(append_key.dim() == 3, lambda: "append_key is not 3-D")
    for dim in range(4):
        torch._check(k_cache.shape[dim] == v_cache.shape[dim])
    for dim in range(3):
        torch._check(append_key.shape[dim] == append_value.shape[dim])
    for dim in (1, 2):
        torch._check(append_key.shape[dim] == k_cache.shape[dim + 1])
    for index in (batch_indices, positions):
        torch._check(index.dim() == 1 and index.shape[0] == append_key.shape[0])
    torch._check(kv_indices.dim() == 1 and kv_indptr.dim() == 1)
