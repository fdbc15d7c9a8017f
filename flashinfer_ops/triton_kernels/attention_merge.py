"""The kernel of cascade attention that merges the states which units left in scratch.

    m = max_i lse_i,  o = sum 2^(lse_i - m) o_i / sum 2^(lse_i - m),  lse = m + log2(sum ...)

Shapes are those of attention_kernels.py. Rows that have no state get the empty one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .attention_kernels import partial_lse

_NO_ROW = tl.constexpr(1 << 30)
_BLOCK_STATES = tl.constexpr(8)
_BLOCK_PIECES = tl.constexpr(32)


@triton.jit(do_not_specialize=["tile_at", "own_at", "partial_rows", "num_rows"])
def merge_kernel(
    schedule, out, lse, partial, strides, tile_at, own_at, partial_rows, num_rows,
    BLOCK_HEADS: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Item: (query token, BLOCK_HEADS heads); states by rank, so that
    a plan gives the same bits every time. Rows with one state were written by the unit."""
    if CONFIG.chained:
        tl_cuda.gdc_wait()
    PADDED_DIM: tl.constexpr = CONFIG.padded_dim
    num_qo_heads = CONFIG.num_kv_heads * CONFIG.group_size
    head_blocks = (num_qo_heads + BLOCK_HEADS - 1) // BLOCK_HEADS
    num_tokens = tl.load(schedule)
    tile_tokens = tl.maximum(tl.load(schedule + 2), 1)
    planned = tl.load(schedule + 1) * tile_tokens * head_blocks
    items = planned + tl.maximum(num_rows - num_tokens, 0) * head_blocks
    scratch_lse = partial_lse(partial, partial_rows, CONFIG)
    dim = tl.arange(0, CONFIG.padded_dim)
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
            own_end = tl.load(tile + 5)
            for start in range(tl.load(tile + 4), own_end, _BLOCK_PIECES):
                o = start + tl.arange(0, _BLOCK_PIECES)
                piece = schedule + own_at + o * 4
                covers = tl.load(piece, mask=o < own_end, other=_NO_ROW) <= row
                covers = covers & (tl.load(piece + 1, mask=o < own_end, other=0) > row)
                num_states += tl.sum(tl.load(piece + 3, mask=covers, other=0))
        if live & ((first >= 0) | (num_states == 0)):
            acc = tl.zeros([BLOCK_HEADS, PADDED_DIM], tl.float32)
            peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_HEADS], tl.float32)
            for start in range(0, num_states, _BLOCK_STATES):
                rank = start + tl.arange(0, _BLOCK_STATES)
                state = (first + rank * rows + row - tile_row).to(tl.int64) * num_qo_heads
                state = state[None, :] + head[:, None]  # [heads, states]
                there = (rank < num_states)[None, :] & (head < num_qo_heads)[:, None]
                s = tl.load(scratch_lse + state, mask=there, other=float("-inf"))
                o = tl.load(
                    partial + (state * CONFIG.head_dim)[:, :, None] + dim[None, None, :],
                    mask=there[:, :, None] & (dim < CONFIG.head_dim)[None, None, :],
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
            there = head < num_qo_heads
            offset = row.to(tl.int64) * strides.out_token + head * strides.out_head
            tl.store(
                out + offset[:, None] + dim[None, :],
                result.to(out.dtype.element_ty),
                mask=there[:, None] & (dim < CONFIG.head_dim)[None, :],
            )
            offset = row.to(tl.int64) * strides.lse_token + head * strides.lse_head
            tl.store(lse + offset, row_lse, mask=there)
