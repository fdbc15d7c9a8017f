"""Merging attention states, by the formula. See `csrc/cpu/merge.cpp` for the cases it settles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEG_INF = float("-inf")


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`v [n, num_states, h, d]`, `s [n, num_states, h]` -> `[n, h, d]` and `[n, h]`.

    Computed, and the lse returned, in float32, or in float64 where v is float64.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    s = s.to(dtype)
    n, num_states, h, d = v.shape
    if num_states == 0:
        return v.new_zeros(n, h, d), s.new_full((n, h), _NEG_INF, dtype=dtype)
    largest = s.amax(1, keepdim=True)
    # The largest has weight 1 also where it is infinite and inf - inf has no value.
    weight = torch.where(s == largest, 1.0, torch.exp2(s - largest))
    weight = torch.where((s == _NEG_INF) & ~s.isnan(), 0.0, weight)
    total = weight.sum(1, keepdim=True)
    empty = largest == _NEG_INF
    weight = weight / torch.where(empty, 1.0, total)
    lse = torch.where(empty, _NEG_INF, largest + torch.log2(total)).squeeze(1)
    return _weighted_sum(weight, v, dtype), lse


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(s_a.dtype, s_b.dtype)
    return merge_states(torch.stack([v_a, v_b], 1), torch.stack([s_a.to(dtype), s_b.to(dtype)], 1))


def merge_state_omd(
    o_a: Tensor, m_a: Tensor, d_a: Tensor, o_b: Tensor, m_b: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(o_a.dtype, torch.float32)
    m, d = (torch.stack([a.to(dtype), b.to(dtype)], 1) for a, b in ((m_a, m_b), (d_a, d_b)))
    empty = (d == 0) | (m == _NEG_INF)
    largest = torch.where(empty, _NEG_INF, m).amax(1, keepdim=True)
    weight = d * torch.where(m == largest, 1.0, torch.exp2(m - largest))
    weight = torch.where(empty, 0.0, weight)
    total = weight.sum(1, keepdim=True)
    weight = weight / torch.where(empty.all(1, keepdim=True), 1.0, total)
    o = _weighted_sum(weight, torch.stack([o_a, o_b], 1), dtype)
    return o, largest.squeeze(1), total.squeeze(1)


def merge_state_(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    _write((v, s), merge_state(v, s, v_other, s_other), mask)


def merge_state_omd_(
    o: Tensor,
    m: Tensor,
    d: Tensor,
    o_other: Tensor,
    m_other: Tensor,
    d_other: Tensor,
    mask: Tensor | None = None,
) -> None:
    _write((o, m, d), merge_state_omd(o, m, d, o_other, m_other, d_other), mask)


def merge_states_list(v: Sequence[Tensor], s: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = torch.float32
    for t in s:
        dtype = torch.promote_types(dtype, t.dtype)
    return merge_states(torch.stack(list(v), 1), torch.stack([t.to(dtype) for t in s], 1))


def merge_states_ragged(v: Tensor, s: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    _, h, d = v.shape
    lse_dtype = torch.promote_types(v.dtype, torch.float32)
    starts, ends = indptr[:-1].tolist(), indptr[1:].tolist()
    merged = v.new_zeros(len(starts), h, d)
    lse = torch.full((len(starts), h), _NEG_INF, dtype=lse_dtype, device=v.device)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        row, row_lse = merge_states(v[None, start:end], s[None, start:end])
        merged[i], lse[i] = row[0], row_lse[0]
    return merged, lse


def _weighted_sum(weight: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over dimension 1; a state of weight 0 is left out, whatever its v holds."""
    terms = torch.where(weight[..., None] == 0, 0.0, weight[..., None] * v.to(dtype))
    return terms.sum(1).to(v.dtype)


def _write(targets: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor | None) -> None:
    for target, value in zip(targets, values, strict=True):
        if mask is None:
            target.copy_(value)
        else:
            keep = mask.bool().reshape(-1, *[1] * (target.dim() - 1))
            target.copy_(torch.where(keep, value.to(target.dtype), target))
