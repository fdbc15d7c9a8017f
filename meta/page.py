"""Schema and fake of the cache append: writing new K and V rows into the pages of a KV cache."""

from __future__ import annotations

from torch import Tensor

from ._library import check_shape, define, register_fake

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
    check_shape("k_cache", k_cache, (None, None, None, None))
    check_shape("v_cache", v_cache, k_cache.shape)
    check_shape("append_key", append_key, (None, *k_cache.shape[2:]))
    check_shape("append_value", append_value, append_key.shape)
    check_shape("batch_indices", batch_indices, append_key.shape[:1])
    check_shape("positions", positions, append_key.shape[:1])
    check_shape("kv_indices", kv_indices, (None,))
    check_shape("kv_indptr", kv_indptr, (None,))
