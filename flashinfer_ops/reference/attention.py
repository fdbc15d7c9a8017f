"""Cascade attention by its definition, the oracle: one softmax a row over all the KV it sees.

Nothing is merged and no schedule is read. The rows are cut where any level's group changes; each
run of rows gathers the KV of its groups, level after level.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def cascade_attention(
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
    """Computed, and the lse returned, in float32, or in float64 where q is float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    qo = [t.tolist() for t in qo_indptr]
    kv = [t.tolist() for t in kv_indptr]
    last = [t.tolist() for t in kv_last_page_len]
    page_size = k_cache.shape[1]
    num_levels = len(qo)

    borders = sorted({min(row, q.shape[0]) for level in qo for row in level})
    for begin, end in pairwise(borders):
        keys, values, visible = [], [], []
        for level in range(num_levels):
            group = bisect_right(qo[level], begin) - 1  # the last one that starts here or before
            if group < 0 or group >= len(last[level]):
                continue
            pages = kv[level][group + 1] - kv[level][group]
            length = (pages - 1) * page_size + last[level][group] if pages > 0 else 0
            if length == 0:
                continue
            page = kv_indices[level][kv[level][group] : kv[level][group + 1]].long()
            keys.append(k_cache[page].flatten(0, 1)[:length])
            values.append(v_cache[page].flatten(0, 1)[:length])
            sees = torch.ones(end - begin, length, dtype=torch.bool, device=q.device)
            if causal and level == num_levels - 1:
                row = torch.arange(begin, end, device=q.device) - qo[level][group + 1]
                token = torch.arange(length, device=q.device) - length
                sees = token <= row[:, None]
            visible.append(sees)
        if keys:
            out[begin:end], lse[begin:end] = _attend(
                q[begin:end], torch.cat(keys), torch.cat(values), torch.cat(visible, 1), sm_scale
            )
    return (out * v_scale).to(q.dtype), lse


def cascade_attention_out(
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
    result, result_lse = cascade_attention(
        q,
        k_cache,
        v_cache,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_last_page_len,
        schedule,
        causal,
        sm_scale,
        v_scale,
    )
    out.copy_(result)
    lse.copy_(result_lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """q `[n, h, d]`, k and v `[t, h_kv, d]`, visible `[n, t]` -> `[n, h, d]`, lse `[n, h]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    n, h, d = q.shape
    h_kv = k.shape[1]
    # [h_kv, group, n, d] and [h_kv, 1, t, d]
    rows = q.to(dtype).reshape(n, h_kv, h // h_kv, d).permute(1, 2, 0, 3)
    keys = k.to(dtype).permute(1, 0, 2)[:, None]
    values = v.to(dtype).permute(1, 0, 2)[:, None]
    logits = rows @ keys.transpose(-1, -2) * sm_scale
    logits = torch.where(visible, logits, -math.inf)
    lse = torch.logsumexp(logits, -1)
    # Rows that see nothing have lse -inf and weight 0 throughout.
    weight = torch.where(visible, torch.exp(logits - lse[..., None]), 0.0)
    if v.isfinite().all():
        out = weight @ values
    else:  # a NaN that a row does not see must not reach it as 0 * NaN
        terms = torch.where(
            weight[..., None] == 0, 0.0, weight[..., None] * values[..., None, :, :]
        )
        out = terms.sum(-2)
    out = out.permute(2, 0, 1, 3).reshape(n, h, d)
    return out, lse.permute(2, 0, 1).reshape(n, h) / math.log(2)
