"""Appending to a paged KV cache, by indexing."""

from __future__ import annotations

import torch
from torch import Tensor


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
    live = torch.nonzero(batch_indices >= 0).squeeze(1)  # negative: padding
    position = positions[live].long()
    page_size = k_cache.shape[1]
    page = kv_indices[kv_indptr[batch_indices[live]] + position // page_size].long()
    k_cache[page, position % page_size] = append_key[live]
    v_cache[page, position % page_size] = append_value[live]
