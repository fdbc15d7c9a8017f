"""The kernels of cascade attention that read KV: matrix units and stream units of a schedule.

A program serves items, a fixed list each, with the online softmax of FlashAttention
(arXiv:2205.14135) in base 2:

    s = q k^T * sm_scale * log2(e),  o = sum 2^(s - m) v / sum 2^(s - m),  lse = m + log2(sum ...)

    q, out      [query tokens, num_qo_heads, head_dim]; a block has BLOCK_M packed rows, which are
                pairs of a query token and a query head of one KV head
    k, v cache  [pages, page_size, num_kv_heads, head_dim]; a block has BLOCK_N columns
    lse         [query tokens, num_qo_heads], float32; -inf where a row sees nothing, and out 0
    partial     [partial_rows, num_qo_heads, head_dim], then their lse, float32, without a gap

Every column has the range of rows that see it, which is what groups, causality and the ends of
segments all come down to. A column that no row sees is not loaded: what lies there may be NaN.

The KV that a matrix unit walks is many segments, most of them short. A loop over each of them would
wait for memory anew each time, so what is short is walked as one: `_columns` finds, for the next
CONFIG.columns columns at once, the place in the cache and the rows that see it, and keeps both in
registers, from where the loop over blocks gathers its own. The loop then loads nothing but keys and
values, which is what Triton pipelines best. Segments of several blocks that all rows see are walked
without masks, in a loop of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

_CHUNK = tl.constexpr(64)  # segments whose columns are found together
_GRAIN = tl.constexpr(8)  # columns that a segment takes up are a multiple of this
_LONG = tl.constexpr(4)  # blocks from which on a segment has a loop of its own
_LAST = tl.constexpr((1 << 31) - 1)


class Config(NamedTuple):
    """What a kernel is compiled for. Triton 3.6 takes a field for an int, not for a constexpr: a
    shape that it is to be part of needs a name of its own."""

    num_levels: int
    num_kv_heads: int
    group_size: int  # query heads of a KV head
    head_dim: int
    padded_dim: int
    page_size: int
    block_m: int
    block_n: int
    columns: int
    stages: int
    gather_stages: int  # of the loop that knows its columns' places beforehand
    chained: bool  # launched by programmatic dependent launch


class Strides(NamedTuple):
    q_token: int
    q_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int
    out_token: int
    out_head: int
    lse_token: int
    lse_head: int


@triton.jit
def _page_table(kv_indices, level, CONFIG: tl.constexpr):
    """The page numbers of a level, or of a block of levels."""
    pointer = kv_indices[0] + level * 0
    NUM_LEVELS: tl.constexpr = CONFIG.num_levels
    for i in tl.static_range(1, NUM_LEVELS):
        pointer = tl.where(level == i, kv_indices[i] + level * 0, pointer)
    return pointer


@triton.jit
def _load_rows(base, offset, live, MASKED: tl.constexpr, CONFIG: tl.constexpr):
    """`[offsets, padded_dim]` elements; 0 where not live."""
    dim = tl.arange(0, CONFIG.padded_dim)
    pointers = base + offset[:, None] + dim[None, :]
    inside = (dim < CONFIG.head_dim)[None, :]
    if MASKED:
        if CONFIG.padded_dim == CONFIG.head_dim:
            x = tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=live[:, None] & inside, other=0.0)
    elif CONFIG.padded_dim == CONFIG.head_dim:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inside, other=0.0)
    return x


@triton.jit
def _load_kv(cache, page, slot, live, strides, MASKED: tl.constexpr, CONFIG: tl.constexpr):
    page = page.to(tl.int64)
    k_offset = page * strides.k_page + slot * strides.k_slot
    v_offset = page * strides.v_page + slot * strides.v_slot
    k = _load_rows(cache[0], k_offset, live, MASKED, CONFIG)
    v = _load_rows(cache[1], v_offset, live, MASKED, CONFIG)
    return k, v


@triton.jit
def _empty_state(CONFIG: tl.constexpr):
    """Output, maximum and sum of a block of packed rows that have seen nothing."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    PADDED_DIM: tl.constexpr = CONFIG.padded_dim
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    return tl.zeros([BLOCK_M, PADDED_DIM], tl.float32), peak, total


@triton.jit
def _attend(state, q, k, v, seen, qk_scale, MASKED: tl.constexpr):
    """One block of columns into the running state."""
    acc, peak, total = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _store_state(
    state, row, head, live, unit_row, partial_row, result, strides, v_scale, CONFIG: tl.constexpr
):
    """The state to the output, or to scratch row `partial_row` and those after it."""
    acc, peak, total = state
    out, lse, partial, partial_rows = result
    dim = tl.arange(0, CONFIG.padded_dim)
    block = acc * (tl.where(total > 0, v_scale / total, 0.0))[:, None]
    # A NaN sum is no empty state: it must reach the output.
    block = tl.where((total != total)[:, None], total[:, None], block).to(out.dtype.element_ty)
    state_lse = tl.where(total == 0, float("-inf"), peak + tl.log2(total))
    mask = live[:, None] & (dim < CONFIG.head_dim)[None, :]
    if partial_row < 0:
        offset = row.to(tl.int64) * strides.out_token + head * strides.out_head
        tl.store(out + offset[:, None] + dim[None, :], block, mask=mask)
        offset = row.to(tl.int64) * strides.lse_token + head * strides.lse_head
        tl.store(lse + offset, state_lse, mask=live)
    else:
        index = (partial_row + row - unit_row).to(tl.int64)
        index = index * (CONFIG.num_kv_heads * CONFIG.group_size) + head
        pointers = partial + (index * CONFIG.head_dim)[:, None] + dim[None, :]
        tl.store(pointers, block, mask=mask)
        tl.store(partial_lse(partial, partial_rows, CONFIG) + index, state_lse, mask=live)


@triton.jit
def partial_lse(partial, partial_rows, CONFIG: tl.constexpr):
    """Where the lse of partial states begin."""
    width = CONFIG.num_kv_heads * CONFIG.group_size * CONFIG.head_dim
    return (partial + partial_rows.to(tl.int64) * width).to(tl.pointer_type(tl.float32))


@triton.jit
def _packed_rows(part, unit_row, row_end, kv_head, CONFIG: tl.constexpr):
    """A part's query tokens and heads, which of them are there, and the first and last token."""
    index = part * CONFIG.block_m + tl.arange(0, CONFIG.block_m)
    row = unit_row + index // CONFIG.group_size
    head = kv_head * CONFIG.group_size + index % CONFIG.group_size
    last = unit_row + (part * CONFIG.block_m + CONFIG.block_m - 1) // CONFIG.group_size
    first = unit_row + part * CONFIG.block_m // CONFIG.group_size
    return row, head, row < row_end, first, tl.minimum(last, row_end - 1)


@triton.jit
def _extent(walk, i, CONFIG: tl.constexpr):
    """Entry i of a walk, or a block of entries: KV tokens [begin, middle) are whole blocks that all
    rows see, [middle, end) the rest of what any row sees; and the rows that see them."""
    granules, segments, num_granules, num_entries, first_kv, last_kv, first_row, last_row = walk
    there = i < num_entries
    entry = tl.where(i < num_granules, granules + i * 8, segments + i * 8)
    begin = tl.load(entry + 2, mask=there, other=0)
    end = tl.load(entry + 3, mask=there, other=0)
    row_low = tl.load(entry + 4, mask=there, other=0)
    row_high = tl.load(entry + 5, mask=there, other=0)
    diagonal = tl.load(entry + 6, mask=there, other=0)
    begin = tl.where(i == num_granules, first_kv, begin)
    end = tl.where((i == num_entries - 1) & (i >= num_granules), last_kv, end)
    end = tl.minimum(end, last_row + diagonal + 1)
    seen = there & (row_high > first_row) & (row_low <= last_row)
    end = tl.where(seen, tl.maximum(end, begin), begin)
    blocks = (tl.minimum(end, first_row + diagonal + 1) - begin) // CONFIG.block_n
    long = (row_low <= first_row) & (row_high > last_row) & (blocks >= _LONG)
    middle = tl.where(long, begin + blocks * CONFIG.block_n, begin)
    return entry, begin, middle, end, row_low, row_high, diagonal


@triton.jit
def _columns(first, key, chunk, num_grains, walk, kv_indices, CONFIG: tl.constexpr):
    """The columns of grains `first` and on: where in the cache they are, page by page, or -1 where
    there is none to see; the first row that sees them and, in the upper half, the one after the
    last, counted from the block's first row.

    `key` is, for each entry of the chunk, the number of grains before it and the entry in the low
    bits, so that the largest key that is not above a grain's names the entry and where it starts.
    """
    grain = first + tl.arange(0, CONFIG.columns // _GRAIN)
    bound = grain * _CHUNK + _CHUNK - 1
    found = tl.max(tl.where(key[:, None] <= bound[None, :], key[:, None], 0), 0)
    entry, _, middle, end, row_low, row_high, diagonal = _extent(
        walk, chunk + found % _CHUNK, CONFIG
    )
    token = middle + (grain - found // _CHUNK) * _GRAIN
    token = token[:, None] + tl.arange(0, _GRAIN)[None, :]
    seen = (token < end[:, None]) & (grain < num_grains)[:, None]
    pages = _page_table(kv_indices, tl.load(entry), CONFIG) + tl.load(entry + 1)
    page = tl.load(pages[:, None] + token // CONFIG.page_size, mask=seen, other=0)
    place = tl.where(seen, page * CONFIG.page_size + token % CONFIG.page_size, -1)
    first_row = walk[6]
    low = tl.maximum(tl.maximum(row_low[:, None], token - diagonal[:, None]) - first_row, 0)
    high = tl.minimum(row_high - first_row, CONFIG.block_m)[:, None]
    rows = tl.where(seen, low | (high << 16), 0)
    COLUMNS: tl.constexpr = CONFIG.columns
    return tl.reshape(place, [COLUMNS]), tl.reshape(rows, [COLUMNS])


@triton.jit
def _walk_short(
    state, q, cache, chunk, middle, end, packed, walk, kv_indices, strides, qk_scale,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """[middle, end) of the entries of a chunk, one after the other."""
    grains = (end - middle + _GRAIN - 1) // _GRAIN
    num_grains = tl.sum(grains)
    entry = tl.arange(0, _CHUNK)
    key = (tl.cumsum(grains) - grains) * _CHUNK + entry
    key = tl.where(chunk + entry < walk[3], key, _LAST)
    column = tl.arange(0, CONFIG.block_n)
    for first in range(0, num_grains, CONFIG.columns // _GRAIN):
        places, rows = _columns(first, key, chunk, num_grains, walk, kv_indices, CONFIG)
        num_columns = tl.minimum((num_grains - first) * _GRAIN, CONFIG.columns)
        for start in tl.range(0, num_columns, CONFIG.block_n, num_stages=CONFIG.gather_stages):
            place = tl.gather(places, start + column, 0)
            row = tl.gather(rows, start + column, 0)
            page, slot = place // CONFIG.page_size, place % CONFIG.page_size
            k, v = _load_kv(cache, page, slot, place >= 0, strides, True, CONFIG)
            seen = packed[:, None] >= (row & 0xFFFF)[None, :]
            seen = seen & (packed[:, None] < (row >> 16)[None, :])
            state = _attend(state, q, k, v, seen, qk_scale, True)
    return state


@triton.jit
def _walk_long(
    state, q, cache, chunk, is_long, walk, kv_indices, strides, qk_scale, CONFIG: tl.constexpr
):
    """[begin, middle) of the long entries of a chunk: no masks."""
    column = tl.arange(0, CONFIG.block_n)
    entries = chunk + tl.arange(0, _CHUNK)
    at = chunk - 1
    for _ in range(tl.sum(is_long.to(tl.int32))):
        at = tl.min(tl.where(is_long & (entries > at), entries, _LAST))
        entry, begin, middle, _, _, _, _ = _extent(walk, at, CONFIG)
        pages = _page_table(kv_indices, tl.load(entry), CONFIG) + tl.load(entry + 1)
        for start in tl.range(begin, middle, CONFIG.block_n, num_stages=CONFIG.stages):
            token = start + column
            page = tl.load(pages + token // CONFIG.page_size)
            k, v = _load_kv(cache, page, token % CONFIG.page_size, None, strides, False, CONFIG)
            state = _attend(state, q, k, v, None, qk_scale, False)
    return state


@triton.jit(do_not_specialize=["unit_at", "segment_at", "granule_at", "partial_rows", "num_rows"])
def matrix_kernel(
    q, k_cache, v_cache, kv_indices, schedule, out, lse, partial, strides,
    unit_at, segment_at, granule_at, partial_rows, num_rows, qk_scale, v_scale,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Item: (unit, KV head, BLOCK_M packed rows of the tile)."""
    if CONFIG.chained:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    num_units = tl.load(schedule + 3)
    parts = tl.cdiv(tl.load(schedule + 2) * CONFIG.group_size, CONFIG.block_m)
    for item in range(
        tl.program_id(0), num_units * CONFIG.num_kv_heads * parts, tl.num_programs(0)
    ):
        part = item % parts
        pair = item // parts
        kv_head = pair // num_units
        unit = schedule + unit_at + (pair % num_units) * 16
        unit_row = tl.load(unit)
        row_end = tl.minimum(tl.load(unit + 1), num_rows)
        row, head, live, first_row, last_row = _packed_rows(
            part, unit_row, row_end, kv_head, CONFIG
        )
        if first_row < row_end:
            partial_row = tl.load(unit + 2)
            granule_begin = tl.load(unit + 3)
            segment_begin = tl.load(unit + 5)
            num_granules = tl.load(unit + 4) - granule_begin
            num_entries = num_granules + tl.load(unit + 6) - segment_begin
            walk = (
                schedule + granule_at + granule_begin * 8,
                schedule + segment_at + (segment_begin - num_granules) * 8,
                num_granules,
                num_entries,
                tl.load(unit + 7),
                tl.load(unit + 8),
                first_row,
                last_row,
            )
            q_offset = row.to(tl.int64) * strides.q_token + head * strides.q_head
            q_block = _load_rows(q, q_offset, live, True, CONFIG)
            cache = (
                k_cache + kv_head.to(tl.int64) * strides.k_head,
                v_cache + kv_head.to(tl.int64) * strides.v_head,
            )
            state = _empty_state(CONFIG)
            for chunk in range(0, num_entries, _CHUNK):
                _, begin, middle, end, _, _, _ = _extent(walk, chunk + tl.arange(0, _CHUNK), CONFIG)
                state = _walk_long(
                    state, q_block, cache, chunk, middle > begin, walk, kv_indices, strides,
                    qk_scale, CONFIG,
                )  # fmt: skip
                state = _walk_short(
                    state, q_block, cache, chunk, middle, end, row - first_row, walk, kv_indices,
                    strides, qk_scale, CONFIG,
                )  # fmt: skip
            _store_state(
                state, row, head, live, unit_row, partial_row, (out, lse, partial, partial_rows),
                strides, v_scale, CONFIG,
            )  # fmt: skip


@triton.jit(do_not_specialize=["unit_at", "partial_rows", "num_rows"])
def stream_kernel(
    q, k_cache, v_cache, kv_indices, schedule, out, lse, partial, strides,
    unit_at, partial_rows, num_rows, qk_scale, v_scale,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Item: (unit, BLOCK_M packed rows of it, KV head), heads
    innermost: one token's heads lie side by side in memory and are read at about the same time."""
    if CONFIG.chained:
        # The matrix kernel lets this one start once its own wait is over: inputs are complete.
        tl_cuda.gdc_launch_dependents()
    parts = tl.cdiv(tl.load(schedule + 6) * CONFIG.group_size, CONFIG.block_m)
    num_items = tl.load(schedule + 4) * parts * CONFIG.num_kv_heads
    column = tl.arange(0, CONFIG.block_n)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % CONFIG.num_kv_heads
        part = item // CONFIG.num_kv_heads % parts
        unit = schedule + unit_at + item // CONFIG.num_kv_heads // parts * 8
        unit_row = tl.load(unit)
        row_end = tl.minimum(tl.load(unit + 1), num_rows)
        row, head, live, first_row, last_row = _packed_rows(
            part, unit_row, row_end, kv_head, CONFIG
        )
        if first_row < row_end:
            partial_row = tl.load(unit + 2)
            pages = _page_table(kv_indices, tl.load(unit + 3), CONFIG) + tl.load(unit + 4)
            last_token = row + tl.load(unit + 7)
            end = tl.minimum(tl.load(unit + 6), last_row + tl.load(unit + 7) + 1)
            q_offset = row.to(tl.int64) * strides.q_token + head * strides.q_head
            q_block = _load_rows(q, q_offset, live, True, CONFIG)
            cache = (
                k_cache + kv_head.to(tl.int64) * strides.k_head,
                v_cache + kv_head.to(tl.int64) * strides.v_head,
            )
            state = _empty_state(CONFIG)
            # Masks all the way: they cost less than a second loop for the last block.
            for start in tl.range(tl.load(unit + 5), end, CONFIG.block_n, num_stages=CONFIG.stages):
                token = start + column
                page = tl.load(pages + token // CONFIG.page_size, mask=token < end, other=0)
                slot = token % CONFIG.page_size
                k, v = _load_kv(cache, page, slot, token < end, strides, True, CONFIG)
                seen = (token < end)[None, :] & (token[None, :] <= last_token[:, None])
                state = _attend(state, q_block, k, v, seen, qk_scale, True)
            _store_state(
                state, row, head, live, unit_row, partial_row, (out, lse, partial, partial_rows),
                strides, v_scale, CONFIG,
            )  # fmt: skip
    if CONFIG.chained:
        # So that this kernel's end, which the merge waits for, means the matrix kernel's too.
        tl_cuda.gdc_wait()
