"""Cascade attention in Triton, over the schedule that the GPU's planner lays out (schedule.h).

Three kernels, whatever the batch and the number of levels; their grids follow from shapes alone:

    matrix units   a tile of up to 128 packed rows (query token, query head of one KV head) and a run
                   of the KV that its rows see: granules of short nodes, then segments
    stream units   up to 16 packed rows and a run of one group's KV
    merge          rows that have several states; rows that have none get the empty state

A program serves (unit, KV head) pairs, a fixed list each, with the online softmax of FlashAttention
(arXiv:2205.14135) in base 2:

    s = q k^T * sm_scale * log2(e),  o = sum 2^(s - m) v / sum 2^(s - m),  lse = m + log2(sum ...)

Every column j of a block of KV has the range of query tokens [low_j, high_j) that see it, which is
what groups, causality and the ends of segments all come down to. A column that no row sees is not
loaded: what lies there may be NaN. On Hopper the kernels are chained by programmatic dependent
launch: stream units start beside matrix units, and the merge is in place when both are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

from ..meta.plan import GpuSchedule, gpu_schedule

_LOG2_E = 1.4426950408889634
_NO_ROW = tl.constexpr(1 << 30)


@triton.jit
def _page_table(kv_indices, level, NUM_LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The page numbers of a level, or of a block of levels."""
    pointer = kv_indices[0] + level * 0
    for i in tl.static_range(1, NUM_LEVELS):
        pointer = tl.where(level == i, kv_indices[i] + level * 0, pointer)
    return pointer


@triton.jit
def _load_kv(  # type: ignore[no-untyped-def]
    cache,
    page,
    slot,
    stride_page,
    stride_slot,
    seen,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """`[columns, PADDED_DIM]` of keys or values; 0 where a column is not seen."""
    dim = tl.arange(0, PADDED_DIM)
    pointers = cache + (page * stride_page + slot * stride_slot)[:, None] + dim[None, :]
    if MASKED:
        if PADDED_DIM == HEAD_DIM:
            x = tl.load(pointers, mask=seen[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=seen[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif PADDED_DIM == HEAD_DIM:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
    k,
    v,
    row,
    low,
    high,
    qk_scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of columns into the running output, maximum and sum."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
    if MASKED:
        seen = (row[:, None] >= low[None, :]) & (row[:, None] < high[None, :])
        s = tl.where(seen, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
    k_head,
    v_head,
    pages,
    begin,
    end,
    row,
    row_begin,
    row_end,
    diagonal,
    stride_kp,
    stride_kn,
    stride_vp,
    stride_vn,
    qk_scale,
    MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KV tokens [begin, end) of one group; without MASKED a whole number of blocks, all seen."""
    column = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = start + column
        seen = token < end
        if MASKED:
            page = tl.load(pages + token // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        else:
            page = tl.load(pages + token // PAGE_SIZE).to(tl.int64)
        slot = token % PAGE_SIZE
        k = _load_kv(k_head, page, slot, stride_kp, stride_kn, seen, MASKED, HEAD_DIM, PADDED_DIM)
        v = _load_kv(v_head, page, slot, stride_vp, stride_vn, seen, MASKED, HEAD_DIM, PADDED_DIM)
        low = tl.maximum(row_begin, token - diagonal)
        high = tl.where(seen, row_end, 0)
        acc, peak, total = _attend(
            acc, peak, total, q, k, v, row, low, high, qk_scale, MASKED, PRECISION
        )
    return acc, peak, total


@triton.jit
def _walk_segment(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
    k_head,
    v_head,
    pages,
    begin,
    end,
    row,
    first_row,
    last_row,
    row_begin,
    row_end,
    diagonal,
    stride_kp,
    stride_kn,
    stride_vp,
    stride_vn,
    qk_scale,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Whole blocks that all rows see without masks, then the rest with them."""
    end = tl.minimum(end, last_row + diagonal + 1)
    plain = tl.minimum(end, first_row + diagonal + 1) - begin
    plain = tl.where((row_begin <= first_row) & (row_end > last_row), tl.maximum(plain, 0), 0)
    middle = begin + plain // BLOCK_N * BLOCK_N
    acc, peak, total = _walk(
        acc,
        peak,
        total,
        q,
        k_head,
        v_head,
        pages,
        begin,
        middle,
        row,
        row_begin,
        row_end,
        diagonal,
        stride_kp,
        stride_kn,
        stride_vp,
        stride_vn,
        qk_scale,
        False,
        PAGE_SIZE,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_N,
        STAGES,
        PRECISION,
    )
    return _walk(
        acc,
        peak,
        total,
        q,
        k_head,
        v_head,
        pages,
        middle,
        end,
        row,
        row_begin,
        row_end,
        diagonal,
        stride_kp,
        stride_kn,
        stride_vp,
        stride_vn,
        qk_scale,
        True,
        PAGE_SIZE,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_N,
        STAGES,
        PRECISION,
    )


@triton.jit
def _store_state(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    row,
    head,
    live,
    unit_row,
    partial_row,
    partial_o,
    partial_lse,
    out,
    lse,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    v_scale,
    NUM_QO_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """The state to the output, or to scratch row `partial_row` and those after it."""
    dim = tl.arange(0, PADDED_DIM)
    result = acc * (tl.where(total > 0, v_scale / total, 0.0))[:, None]
    # A NaN sum is no empty state: it must reach the output.
    result = tl.where((total != total)[:, None], total[:, None], result)
    state_lse = tl.where(total == 0, float("-inf"), peak + tl.log2(total))
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    if partial_row < 0:
        offset = row.to(tl.int64) * stride_ot + head * stride_oh
        tl.store(out + offset[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=mask)
        tl.store(lse + row.to(tl.int64) * stride_lt + head * stride_lh, state_lse, mask=live)
    else:
        state = (partial_row + row - unit_row).to(tl.int64) * NUM_QO_HEADS + head
        pointers = partial_o + (state * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(pointers, result.to(partial_o.dtype.element_ty), mask=mask)
        tl.store(partial_lse + state, state_lse, mask=live)


@triton.jit
def _matrix_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    kv_indices,
    schedule,
    partial_o,
    partial_lse,
    out,
    lse,
    num_rows,
    unit_at,
    segment_at,
    granule_at,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kn,
    stride_kh,
    stride_vp,
    stride_vn,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    qk_scale,
    v_scale,
    NUM_LEVELS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: any number of programs. Item: (unit, KV head, BLOCK_M packed rows of the tile)."""
    if CHAINED:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    num_units = tl.load(schedule + 3)
    parts = tl.cdiv(tl.load(schedule + 2) * GROUP_SIZE, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    column = tl.arange(0, BLOCK_N)
    packed = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), num_units * NUM_KV_HEADS * parts, tl.num_programs(0)):
        part = item % parts
        pair = item // parts
        kv_head = pair // num_units
        unit = schedule + unit_at + (pair % num_units) * 16
        unit_row = tl.load(unit)
        row_end = tl.minimum(tl.load(unit + 1), num_rows)
        first_row = unit_row + part * BLOCK_M // GROUP_SIZE
        if first_row < row_end:
            partial_row = tl.load(unit + 2)
            granule_begin = tl.load(unit + 3)
            granule_end = tl.load(unit + 4)
            segment_begin = tl.load(unit + 5)
            segment_end = tl.load(unit + 6)
            first_kv = tl.load(unit + 7)
            last_kv = tl.load(unit + 8)
            index = part * BLOCK_M + packed
            row = unit_row + index // GROUP_SIZE
            head = kv_head * GROUP_SIZE + index % GROUP_SIZE
            live = row < row_end
            last_row = tl.minimum(
                unit_row + (part * BLOCK_M + BLOCK_M - 1) // GROUP_SIZE, row_end - 1
            )
            q_offset = row.to(tl.int64) * stride_qt + head * stride_qh
            q_block = tl.load(
                q + q_offset[:, None] + dim[None, :],
                mask=live[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            k_head = k_cache + kv_head.to(tl.int64) * stride_kh
            v_head = v_cache + kv_head.to(tl.int64) * stride_vh
            acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)

            for start in tl.range(granule_begin, granule_end, BLOCK_N // 16, num_stages=STAGES):
                g = start + column // 16
                granule = schedule + granule_at + g * 8
                level = tl.load(granule, mask=g < granule_end, other=0)
                page_begin = tl.load(granule + 1, mask=g < granule_end, other=0)
                token = tl.load(granule + 2, mask=g < granule_end, other=0) + column % 16
                seen = token < tl.load(granule + 3, mask=g < granule_end, other=0)
                row_low = tl.load(granule + 4, mask=g < granule_end, other=0)
                row_high = tl.load(granule + 5, mask=g < granule_end, other=0)
                diagonal = tl.load(granule + 6, mask=g < granule_end, other=0)
                seen = seen & (row_high > first_row) & (row_low <= last_row)
                pages = _page_table(kv_indices, level, NUM_LEVELS)
                page = tl.load(pages + page_begin + token // PAGE_SIZE, mask=seen, other=0)
                page = page.to(tl.int64)
                slot = token % PAGE_SIZE
                k = _load_kv(
                    k_head, page, slot, stride_kp, stride_kn, seen, True, HEAD_DIM, PADDED_DIM
                )
                v = _load_kv(
                    v_head, page, slot, stride_vp, stride_vn, seen, True, HEAD_DIM, PADDED_DIM
                )
                low = tl.maximum(row_low, token - diagonal)
                high = tl.where(seen, row_high, 0)
                acc, peak, total = _attend(
                    acc, peak, total, q_block, k, v, row, low, high, qk_scale, True, PRECISION
                )

            for s in range(segment_begin, segment_end):
                segment = schedule + segment_at + s * 8
                level = tl.load(segment)
                pages = _page_table(kv_indices, level, NUM_LEVELS) + tl.load(segment + 1)
                begin = tl.where(s == segment_begin, first_kv, 0)
                end = tl.where(s == segment_end - 1, last_kv, tl.load(segment + 3))
                row_low = tl.load(segment + 4)
                row_high = tl.load(segment + 5)
                if (row_high > first_row) & (row_low <= last_row):
                    acc, peak, total = _walk_segment(
                        acc,
                        peak,
                        total,
                        q_block,
                        k_head,
                        v_head,
                        pages,
                        begin,
                        end,
                        row,
                        first_row,
                        last_row,
                        row_low,
                        row_high,
                        tl.load(segment + 6),
                        stride_kp,
                        stride_kn,
                        stride_vp,
                        stride_vn,
                        qk_scale,
                        PAGE_SIZE,
                        HEAD_DIM,
                        PADDED_DIM,
                        BLOCK_N,
                        STAGES,
                        PRECISION,
                    )

            _store_state(
                acc,
                peak,
                total,
                row,
                head,
                live,
                unit_row,
                partial_row,
                partial_o,
                partial_lse,
                out,
                lse,
                stride_ot,
                stride_oh,
                stride_lt,
                stride_lh,
                v_scale,
                NUM_KV_HEADS * GROUP_SIZE,
                HEAD_DIM,
                PADDED_DIM,
            )


@triton.jit
def _stream_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    kv_indices,
    schedule,
    partial_o,
    partial_lse,
    out,
    lse,
    num_rows,
    unit_at,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kn,
    stride_kh,
    stride_vp,
    stride_vn,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    qk_scale,
    v_scale,
    NUM_LEVELS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: any number of programs. Item: (unit, KV head), heads innermost: one token's heads lie
    side by side in memory and are read at about the same time."""
    if CHAINED:
        # The matrix kernel lets this one start once its own wait is over: inputs are complete.
        tl_cuda.gdc_launch_dependents()
    num_units = tl.load(schedule + 4)
    dim = tl.arange(0, PADDED_DIM)
    packed = tl.arange(0, BLOCK_M)
    for item in range(tl.program_id(0), num_units * NUM_KV_HEADS, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        unit = schedule + unit_at + (item // NUM_KV_HEADS) * 8
        unit_row = tl.load(unit)
        row_end = tl.minimum(tl.load(unit + 1), num_rows)
        if unit_row < row_end:
            partial_row = tl.load(unit + 2)
            level = tl.load(unit + 3)
            pages = _page_table(kv_indices, level, NUM_LEVELS) + tl.load(unit + 4)
            begin = tl.load(unit + 5)
            end = tl.load(unit + 6)
            diagonal = tl.load(unit + 7)
            row = unit_row + packed // GROUP_SIZE
            head = kv_head * GROUP_SIZE + packed % GROUP_SIZE
            live = row < row_end
            q_offset = row.to(tl.int64) * stride_qt + head * stride_qh
            q_block = tl.load(
                q + q_offset[:, None] + dim[None, :],
                mask=live[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc, peak, total = _walk_segment(
                acc,
                peak,
                total,
                q_block,
                k_cache + kv_head.to(tl.int64) * stride_kh,
                v_cache + kv_head.to(tl.int64) * stride_vh,
                pages,
                begin,
                end,
                row,
                unit_row,
                row_end - 1,
                unit_row,
                row_end,
                diagonal,
                stride_kp,
                stride_kn,
                stride_vp,
                stride_vn,
                qk_scale,
                PAGE_SIZE,
                HEAD_DIM,
                PADDED_DIM,
                BLOCK_N,
                STAGES,
                PRECISION,
            )
            _store_state(
                acc,
                peak,
                total,
                row,
                head,
                live,
                unit_row,
                partial_row,
                partial_o,
                partial_lse,
                out,
                lse,
                stride_ot,
                stride_oh,
                stride_lt,
                stride_lh,
                v_scale,
                NUM_KV_HEADS * GROUP_SIZE,
                HEAD_DIM,
                PADDED_DIM,
            )
    if CHAINED:
        # So that this kernel's end, which the merge waits for, means the matrix kernel's too.
        tl_cuda.gdc_wait()


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    schedule,
    partial_o,
    partial_lse,
    out,
    lse,
    num_rows,
    tile_at,
    own_at,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    NUM_QO_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: any number of programs. Item: (query token, BLOCK_HEADS heads); states by rank, so that
    a plan gives the same bits every time. Rows with one state were written by the unit."""
    if CHAINED:
        tl_cuda.gdc_wait()
    num_tokens = tl.load(schedule)
    tile_tokens = tl.maximum(tl.load(schedule + 2), 1)
    head_blocks: tl.constexpr = (NUM_QO_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    planned = tl.load(schedule + 1) * tile_tokens * head_blocks
    items = planned + tl.maximum(num_rows - num_tokens, 0) * head_blocks
    dim = tl.arange(0, PADDED_DIM)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head = item % head_blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        place = item // head_blocks
        row = num_tokens + (item - planned) // head_blocks
        num_states = 0
        first = -1
        tile_row = 0
        rows = 0
        live = item >= planned
        if item < planned:
            tile = schedule + tile_at + place // tile_tokens * 8
            tile_row = tl.load(tile)
            rows = tl.load(tile + 1) - tile_row
            row = tile_row + place % tile_tokens
            live = (place % tile_tokens < rows) & (row < num_rows)
            num_states = tl.load(tile + 2)
            first = tl.load(tile + 3)
            own_begin = tl.load(tile + 4)
            own_end = tl.load(tile + 5)
            for start in range(own_begin, own_end, BLOCK_PIECES):
                o = start + tl.arange(0, BLOCK_PIECES)
                piece = schedule + own_at + o * 4
                covers = tl.load(piece, mask=o < own_end, other=_NO_ROW) <= row
                covers = covers & (tl.load(piece + 1, mask=o < own_end, other=0) > row)
                num_states += tl.sum(tl.load(piece + 3, mask=covers, other=0))
        if live & ((first >= 0) | (num_states == 0)):
            acc = tl.zeros([BLOCK_HEADS, PADDED_DIM], tl.float32)
            peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_HEADS], tl.float32)
            for start in range(0, num_states, BLOCK_STATES):
                rank = start + tl.arange(0, BLOCK_STATES)
                state = (first + rank * rows + row - tile_row).to(tl.int64) * NUM_QO_HEADS
                state = state[None, :] + head[:, None]  # [heads, states]
                there = (rank < num_states)[None, :] & (head < NUM_QO_HEADS)[:, None]
                s = tl.load(partial_lse + state, mask=there, other=float("-inf"))
                o = tl.load(
                    partial_o + (state * HEAD_DIM)[:, :, None] + dim[None, None, :],
                    mask=there[:, :, None] & (dim < HEAD_DIM)[None, None, :],
                    other=0.0,
                ).to(tl.float32)
                new_peak = tl.maximum(peak, tl.max(s, 1))
                base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weight = tl.exp2(s - base[:, None])
                rescale = tl.exp2(peak - base)
                total = total * rescale + tl.sum(weight, 1)
                acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * o, 1)
                peak = new_peak
            result = acc / tl.where(total == 0, 1.0, total)[:, None]
            row_lse = tl.where(total == 0, float("-inf"), peak + tl.log2(total))
            there = head < NUM_QO_HEADS
            offset = row.to(tl.int64) * stride_ot + head * stride_oh
            tl.store(
                out + offset[:, None] + dim[None, :],
                result.to(out.dtype.element_ty),
                mask=there[:, None] & (dim < HEAD_DIM)[None, :],
            )
            tl.store(lse + row.to(tl.int64) * stride_lt + head * stride_lh, row_lse, mask=there)


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # under Triton's interpreter
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _has_chaining(device: torch.device) -> bool:
    """Programmatic dependent launch came with compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _matrix_config(dtype: torch.dtype, head_dim: int, rows: int) -> dict[str, Any]:
    """Block sizes for calls with up to so many packed rows. As in planner.h's `matrix_slots`, an SM
    runs 1 program of more than 64 rows, 2 of more than 32, else 3."""
    most = 128
    if dtype == torch.float32:
        most = 32  # no matrix unit serves float32 in full precision
    elif head_dim > 128:
        most = 64
    block_m = min(most, max(16, triton.next_power_of_2(rows)))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if dtype == torch.float32 else 64,
        "STAGES": 3 if dtype == torch.float32 or head_dim > 128 else 5 if block_m < 128 else 4,
        "num_warps": 8 if block_m == 128 else 4,
    }


@cache
def _stream_config(dtype: torch.dtype, head_dim: int, group_size: int) -> dict[str, Any]:
    return {
        "BLOCK_M": max(16, triton.next_power_of_2(group_size)),
        "BLOCK_N": 32 if dtype == torch.float32 else 64,
        "STAGES": 3 if dtype == torch.float32 or head_dim > 128 else 5,
        "num_warps": 4,
    }


def _matrix_slots(block_m: int) -> int:
    return 1 if block_m > 64 else 2 if block_m > 32 else 3


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    cascade_attention_out(
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
        out,
        lse,
    )
    return out, lse


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
    num_rows, num_qo_heads, head_dim = q.shape
    if num_rows == 0 or num_qo_heads == 0:
        return
    page_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group_size = num_qo_heads // num_kv_heads
    layout: GpuSchedule = gpu_schedule(tuple(t.shape[0] - 1 for t in kv_indptr))
    device = q.device
    sms = _num_sms(device)
    chained = _has_chaining(device)
    launch = {"launch_pdl": True} if chained else {}
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    partial_o = torch.empty(
        (layout.partial_rows, num_qo_heads, head_dim), dtype=q.dtype, device=device
    )
    partial_lse = torch.empty(
        (layout.partial_rows, num_qo_heads), dtype=torch.float32, device=device
    )
    tensors = (
        q,
        k_cache,
        v_cache,
        tuple(kv_indices),
        schedule,
        partial_o,
        partial_lse,
        out,
        lse,
        num_rows,
    )
    out_strides = (out.stride(0), out.stride(1), lse.stride(0), lse.stride(1))
    strides = (
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        *out_strides,
        sm_scale * _LOG2_E,
        v_scale,
    )
    constants = {
        "NUM_LEVELS": len(kv_indices),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "PAGE_SIZE": page_size,
        "PRECISION": "ieee",
        "CHAINED": chained,
    }
    matrix = _matrix_config(q.dtype, padded_dim, min(128, num_rows * group_size))
    _matrix_kernel[(sms * _matrix_slots(matrix["BLOCK_M"]),)](
        *tensors,
        layout.matrix_at,
        layout.segment_at,
        layout.granule_at,
        *strides,
        **constants,
        **matrix,
        **launch,
    )
    _stream_kernel[(sms * 3,)](
        *tensors,
        layout.stream_at,
        *strides,
        **constants,
        **_stream_config(q.dtype, padded_dim, group_size),
        **launch,
    )
    _merge_kernel[(sms * 8,)](
        schedule,
        partial_o,
        partial_lse,
        out,
        lse,
        num_rows,
        layout.tile_at,
        layout.own_at,
        *out_strides,
        NUM_QO_HEADS=num_qo_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_HEADS=min(4, triton.next_power_of_2(num_qo_heads)),
        BLOCK_STATES=8,
        BLOCK_PIECES=32,
        CHAINED=chained,
        num_warps=4,
        **launch,
    )
