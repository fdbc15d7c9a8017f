"""Appending K and V rows to a paged KV cache, in Triton.

    cache[kv_indices[kv_indptr[b] + p / page_size], p % page_size] = append[i]
    with b = batch_indices[i], p = positions[i], for K and V alike

append_key, append_value: [nnz, num_kv_heads, head_dim]; caches: [pages, page_size, num_kv_heads,
head_dim], any strides but a contiguous last dimension. A program copies BLOCK_HEADS heads of one
row, of K and of V; the grid is rows by blocks of heads. Rows with a negative batch index are
padding. Rows whose target is outside of their sequence's pages or of the cache are skipped as
well: to raise, the host would have to wait for the device.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .merge import unit_stride_rows

_TILE = 2048  # elements of K, and as many of V, that a program of 4 warps copies at a time
_MAX_BLOCK_D = 2048


# strides: token and head of append_key and of append_value; page, slot and head of k_cache and of
# v_cache.
@triton.jit(do_not_specialize=["batch_size", "num_indices", "num_pages"])
def append_kernel(
    append_key,
    append_value,
    batch_indices,
    positions,
    k_cache,
    v_cache,
    kv_indices,
    kv_indptr,
    strides,
    batch_size,
    num_indices,
    num_pages,
    page_size,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.load(batch_indices + row).to(tl.int64)
    position = tl.load(positions + row)
    # Each look-up only where the ones before it are sound.
    live = (batch >= 0) & (batch < batch_size) & (position >= 0)
    begin = tl.load(kv_indptr + batch, mask=live, other=0).to(tl.int64)
    end = tl.load(kv_indptr + batch + 1, mask=live, other=0).to(tl.int64)
    at = begin + position // page_size
    live = live & (begin >= 0) & (at < end) & (at < num_indices)
    page = tl.load(kv_indices + at, mask=live, other=-1).to(tl.int64)
    live = live & (page >= 0) & (page < num_pages)
    slot = position % page_size
    heads_to_write = tl.where(live, num_heads, 0)

    head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    from_k = append_key + row * strides[0] + head * strides[1]
    from_v = append_value + row * strides[2] + head * strides[3]
    to_k = k_cache + page * strides[4] + slot * strides[5] + head * strides[6]
    to_v = v_cache + page * strides[7] + slot * strides[8] + head * strides[9]
    for start in range(0, HEAD_DIM, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)[None, :]
        there = (head < num_heads) & (col < HEAD_DIM)
        # Padding rows are read too: to wait for the target first would cost the others more.
        k = tl.load(from_k + col, mask=there)
        v = tl.load(from_v + col, mask=there)
        keep = (head < heads_to_write) & (col < HEAD_DIM)
        tl.store(to_k + col, k, mask=keep)
        tl.store(to_v + col, v, mask=keep)


def append_paged_kv_cache_(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
) -> None:
    num_pages, page_size, num_heads, head_dim = k_cache.shape
    if page_size == 0:
        raise RuntimeError("k_cache has pages of no tokens")
    nnz = append_key.shape[0]
    if nnz == 0 or num_heads == 0 or head_dim == 0:
        return
    append_key, append_value = unit_stride_rows(append_key), unit_stride_rows(append_value)
    block_heads, block_d, warps = _blocks(num_heads, head_dim)
    strides = (
        *append_key.stride()[:2],
        *append_value.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
    )
    append_kernel[(nnz, -(-num_heads // block_heads))](
        append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr,
        strides, kv_indptr.shape[0] - 1, kv_indices.shape[0], num_pages, page_size, num_heads,
        head_dim, block_heads, block_d, num_warps=warps,
    )  # fmt: skip


@cache
def _blocks(num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """(heads, columns, warps) of a program: fewer warps where 16-byte accesses need no more."""
    block_d = min(triton.next_power_of_2(head_dim), _MAX_BLOCK_D)
    block_heads = min(triton.next_power_of_2(num_heads), _TILE // block_d)
    return block_heads, block_d, max(1, min(4, block_heads * block_d // 256))
