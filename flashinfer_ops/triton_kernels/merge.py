"""Merging attention states in Triton: the operators, over the kernels of merge_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from .merge_kernels import merge_list_kernel, merge_many_kernel, merge_pair_kernel

_PAIR_TILE = 2048  # elements of a state that a program of 4 warps has: two 16-byte loads of fp16
_MANY_TILE = 4096  # elements that it reads at a time where there are many states
_MAX_BLOCK_D = 2048
_MAX_LIST = 32  # states of a list in one launch: they are unrolled
_STAGES = 3  # blocks of states in flight


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    v, s = _new_state(v_a, v_a.shape)
    v_a, v_b = unit_stride_rows(v_a), unit_stride_rows(v_b)
    _merge_pair(v, s, None, v_a, s_a, None, v_b, s_b, None, None, False)
    return v, s


def merge_state_omd(
    o_a: Tensor, m_a: Tensor, d_a: Tensor, o_b: Tensor, m_b: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    o, m = _new_state(o_a, o_a.shape)
    d = torch.empty_like(m)
    o_a, o_b = unit_stride_rows(o_a), unit_stride_rows(o_b)
    _merge_pair(o, m, d, o_a, m_a, d_a, o_b, m_b, d_b, None, False)
    return o, m, d


def merge_state_(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    v_other = unit_stride_rows(v_other)
    _merge_pair(v, s, None, v, s, None, v_other, s_other, None, mask, True)


def merge_state_omd_(
    o: Tensor,
    m: Tensor,
    d: Tensor,
    o_other: Tensor,
    m_other: Tensor,
    d_other: Tensor,
    mask: Tensor | None = None,
) -> None:
    o_other = unit_stride_rows(o_other)
    _merge_pair(o, m, d, o, m, d, o_other, m_other, d_other, mask, True)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    n, num_states, h, d = v.shape
    merged, lse = _new_state(v, (n, h, d))
    _merge_many(merged, lse, unit_stride_rows(v), s, None, num_states, num_states)
    return merged, lse


def merge_states_ragged(v: Tensor, s: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    nnz, h, d = v.shape
    n = indptr.shape[0] - 1
    merged, lse = _new_state(v, (n, h, d))
    # The kernel's shape follows the mean count in coarse steps: nnz changes from call to call.
    mean = nnz / max(n, 1)
    likely = 4 if mean <= 4 else 16 if mean <= 16 else 64
    _merge_many(merged, lse, unit_stride_rows(v), s, indptr, nnz, likely)
    return merged, lse


def merge_states_list(v: Sequence[Tensor], s: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    vs, ss = tuple(map(unit_stride_rows, v)), tuple(s)
    # Beyond what one launch takes, the state merged so far, in float32, leads the next states.
    while len(vs) > _MAX_LIST:
        so_far = _merge_list(vs[:_MAX_LIST], ss[:_MAX_LIST], torch.float32)
        vs, ss = (so_far[0], *vs[_MAX_LIST:]), (so_far[1], *ss[_MAX_LIST:])
    return _merge_list(vs, ss, v[0].dtype)


def _new_state(like: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape), like.new_empty(shape[:2], dtype=torch.float32)


def unit_stride_rows(v: Tensor) -> Tensor:
    """The kernels read rows of unit stride; inputs with another one are copied."""
    return v if v.stride(-1) == 1 or v.shape[-1] <= 1 else v.contiguous()


@cache
def _pair_blocks(head_dim: int) -> tuple[int, int]:
    block_d = min(triton.next_power_of_2(max(1, head_dim)), _MAX_BLOCK_D)
    return max(1, _PAIR_TILE // block_d), block_d


@cache
def _many_blocks(head_dim: int, num_states: int) -> tuple[int, int, int, int, int]:
    """(rows, lanes, columns, stages, warps) of a program: more rows where states are few, and
    twice the tile where one row's states alone fill it, since such rows may be few."""
    block_d = min(triton.next_power_of_2(max(1, head_dim)), _MAX_BLOCK_D)
    tile = _MANY_TILE // block_d
    lanes = max(1, min(triton.next_power_of_2(max(1, num_states)), 2 * tile))
    stages = 1 if num_states <= lanes else _STAGES
    return max(1, tile // lanes), lanes, block_d, stages, 8 if lanes > tile else 4


def _merge_pair(
    o: Tensor,
    m: Tensor,
    d: Tensor | None,
    o_a: Tensor,
    m_a: Tensor,
    d_a: Tensor | None,
    o_b: Tensor,
    m_b: Tensor,
    d_b: Tensor | None,
    mask: Tensor | None,
    in_place: bool,
) -> None:
    n, h, head_dim = o.shape
    rows = n * h
    if rows == 0:
        return
    strides: tuple[int, ...] | None = None
    if not (
        o_a.is_contiguous()
        and o_b.is_contiguous()
        and m_a.is_contiguous()
        and m_b.is_contiguous()
        and (d_a is None or (d_a.is_contiguous() and d_b.is_contiguous()))  # type: ignore[union-attr]
        and (mask is None or mask.is_contiguous())
    ):
        strides = (0 if mask is None else mask.stride(0),)
        for t in (o, o_a, o_b, m, m_a, m_b, d, d_a, d_b):
            if t is not None:
                strides += t.stride()[:2]
    block_rows, block_d = _pair_blocks(head_dim)
    merge_pair_kernel[(-(-rows // block_rows),)](
        o, m, d, o_a, m_a, d_a, o_b, m_b, d_b, mask, strides, rows, h,
        head_dim, block_rows, block_d, in_place,
    )  # fmt: skip


def _merge_many(
    merged: Tensor,
    lse: Tensor,
    v: Tensor,
    s: Tensor,
    indptr: Tensor | None,
    num_states: int,
    likely_states: int,
) -> None:
    n, h, head_dim = merged.shape
    rows = n * h
    if rows == 0:
        return
    strides = None
    if not (v.is_contiguous() and s.is_contiguous()):
        # Without a dimension for tokens, where indptr is given, their strides are not used.
        unused = () if indptr is None else (0,)
        strides = (*unused, *v.stride()[:-1], *unused, *s.stride())
    block_rows, lanes, block_d, stages, warps = _many_blocks(head_dim, likely_states)
    merge_many_kernel[(-(-rows // block_rows),)](
        merged, lse, v, s, indptr, strides, rows, h, num_states,
        head_dim, block_rows, lanes, block_d, stages, num_warps=warps,
    )  # fmt: skip


def _merge_list(
    v: tuple[Tensor, ...], s: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n, h, head_dim = v[0].shape
    merged = v[0].new_empty((n, h, head_dim), dtype=dtype)
    lse = v[0].new_empty((n, h), dtype=torch.float32)
    rows = n * h
    if rows == 0:
        return merged, lse
    strides = None
    if not all(t.is_contiguous() for t in (*v, *s)):
        pairs = zip(v, s, strict=True)
        strides = tuple(x for t, u in pairs for x in (*t.stride()[:2], *u.stride()))
    block_rows, block_d = _pair_blocks(head_dim)
    merge_list_kernel[(-(-rows // block_rows),)](
        merged, lse, v, s, strides, rows, h, head_dim, block_rows, block_d
    )
    return merged, lse
