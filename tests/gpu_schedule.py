"""The GPU's planner on the host, and what must hold of any schedule that it lays out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashinfer_ops import native
from flashinfer_ops.meta.plan import GpuSchedule, gpu_schedule


def plan_on_host(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    causal: bool,
    num_sms: int = 132,
    fast_bytes: int = 160 * 1024,
    packed: bool = False,
    num_blocks: int = 1,
) -> Tensor:
    groups = [t.shape[0] - 1 for t in kv_indptr]
    schedule = torch.full((gpu_schedule(tuple(groups)).words,), -7, dtype=torch.int32)

    def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        assert all(t.is_contiguous() and t.dtype == torch.int32 for t in tensors)
        return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])

    native.load("_C").flashinfer_ops_gpu_plan(
        pointers(qo_indptr),
        pointers(kv_indptr),
        pointers(kv_last_page_len),
        (ctypes.c_int64 * len(groups))(*groups),
        *(ctypes.c_int64(x) for x in (len(groups), num_qo_heads // num_kv_heads, num_kv_heads)),
        *(ctypes.c_int64(x) for x in (page_size, causal, num_sms, packed, fast_bytes, num_blocks)),
        ctypes.c_void_p(schedule.data_ptr()),
    )
    return schedule


def check_is_hosts(
    schedule: Tensor,
    arrays: Sequence[Sequence[Tensor]],
    heads: tuple[int, int],
    page_size: int,
    causal: bool,
) -> None:
    """The schedule that a GPU made of these arrays, here on the CPU, is the host's."""
    packed = torch.cuda.get_device_capability(schedule.device) == (9, 0)
    sms = torch.cuda.get_device_properties(schedule.device).multi_processor_count
    wanted = plan_on_host(*arrays, *heads, page_size, causal, num_sms=sms, packed=packed)
    groups = [t.shape[0] for t in arrays[2]]
    ctas = sms if packed else 0
    assert tables(schedule, groups, ctas) == tables(wanted, groups, ctas)


@dataclass
class Tables:
    """The live part of a schedule's tables, lists of rows."""

    num_tokens: int
    num_tiles: int
    tile_tokens: int
    num_partial_rows: int
    stream_tokens: int
    merges: int  # 0 where every row has exactly one state
    tiles: list[list[int]]
    matrix_units: list[list[int]]
    stream_units: list[list[int]]
    segments: list[list[int]]
    granules: list[list[int]]
    own: list[list[int]]
    lists: list[list[list[int]]]  # [3, CTAs] of a packed schedule


def tables(schedule: Tensor, num_groups: Sequence[int], num_ctas: int = 0) -> Tables:
    schedule = schedule.cpu()
    layout: GpuSchedule = gpu_schedule(tuple(num_groups))
    tokens, tiles, tile_tokens, matrix, stream, partial = schedule[:6].tolist()
    stream_tokens, merges = schedule[6:8].tolist()

    def rows(at: int, count: int, words: int) -> list[list[int]]:
        result: list[list[int]] = schedule[at : at + count * words].reshape(count, words).tolist()
        return result

    matrix_units = rows(layout.matrix_at, matrix, 16)
    tile_rows = rows(layout.tile_at, tiles, 8)
    return Tables(
        tokens,
        tiles,
        tile_tokens,
        partial,
        stream_tokens,
        merges,
        tile_rows,
        matrix_units,
        rows(layout.stream_at, stream, 8),
        rows(layout.segment_at, max((u[6] for u in matrix_units), default=0), 8),
        rows(layout.granule_at, max((u[4] for u in matrix_units), default=0), 8),
        rows(layout.own_at, max((t[5] for t in tile_rows), default=0), 4),
        [rows(layout.list_at + i * 144 * 32, num_ctas, 32) for i in range(3)],
    )


def check_lists(t: Tables, num_kv_heads: int, group_size: int) -> None:
    """Every item is in one list, once, pair items in those of pairs; a list begins with the unit of
    its first item."""
    rows = t.tile_tokens * group_size
    parts = -(-rows // 128) if rows > 64 else 1
    of_matrix = [
        (head, u, part)
        for head in range(num_kv_heads)
        for u in range(len(t.matrix_units))
        for part in range(parts)
    ]
    of_stream = [
        (head, len(t.matrix_units) + u, 0)
        for u in range(len(t.stream_units))
        for head in range(num_kv_heads)
    ]
    units = [*t.matrix_units, *([*u, *[0] * 8] for u in t.stream_units)]
    kinds = (of_matrix, of_stream) if rows > 64 else ([], of_matrix + of_stream)
    for items, lists in zip(kinds, (t.lists[:1], t.lists[1:]), strict=True):
        met = []
        for words in (words for of_ctas in lists for words in of_ctas):
            head, part, has_kv, item, ahead_stride, ahead_end, rest, stride, end = words[16:25]
            assert end == len(items)
            first = item
            while item < end:
                met.append(item)
                is_ahead = item < ahead_end
                item += ahead_stride if is_ahead else stride
                if is_ahead and item >= ahead_end:
                    item = rest
            if first < end:
                assert (head, part) == items[first][::2]
                unit = units[items[first][1]]
                is_matrix = items[first][1] < len(t.matrix_units)
                assert words[:16] == unit
                assert has_kv == (unit[15] > 0 if is_matrix else unit[6] > unit[5])
                # Level, first page and KV tokens of its first segment.
                at = (9, 10, 7, 14) if is_matrix else (3, 4, 5, 6)
                assert words[28:32] == [unit[i] for i in at]
            else:
                assert words[:16] == [0] * 16 and words[28:32] == [0] * 4
        assert sorted(met) == list(range(len(items)))


def check(
    schedule: Tensor,
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    page_size: int,
    causal: bool,
    packed: bool = False,
    num_ctas: int = 0,
) -> Tables:
    """Every (row, KV token) pair is met by one unit, every state has scratch of its own; the walk
    of a tile is cut at whole blocks and its segments lie in it one after the other."""
    groups = [t.shape[0] - 1 for t in kv_indptr]
    layout = gpu_schedule(tuple(groups))
    t = tables(schedule, groups, num_ctas)
    assert t.num_tokens == max(int(level[-1]) for level in qo_indptr)
    assert t.num_partial_rows <= layout.partial_rows
    seen: dict[tuple[int, int, int, int], int] = {}  # (row, level, page_begin, token) -> unit
    states: dict[int, list[tuple[int, ...]]] = {}  # row -> (partial row, unit) of each state
    borders = [x[0] for x in t.tiles] + [t.num_tokens]
    assert [x[1] for x in t.tiles] == borders[1:] and borders == sorted(set(borders))
    assert t.tile_tokens == max((x[1] - x[0] for x in t.tiles), default=0)

    def meet(unit: int, segment: list[int], begin: int, end: int, rows: range) -> None:
        level, page_begin, _, _, row_begin, row_end, diagonal, _ = segment
        for row in range(max(row_begin, rows.start), min(row_end, rows.stop)):
            for token in range(begin, min(end, row + diagonal + 1)):
                key = (row, level, page_begin, token)
                assert key not in seen, key
                seen[key] = unit

    assert not (packed and t.granules)
    step = 64 if not packed else 16 if page_size % 16 == 0 else 1  # of a segment in the walk
    walked: dict[int, int] = {}  # first row of a tile -> tokens of its segments in units before
    for index, u in enumerate(t.matrix_units):
        rows = range(u[0], u[1])
        for g in t.granules[u[3] : u[4]]:
            assert g[3] - g[2] <= 16 and g[7] == 0
            meet(index, g, g[2], g[3], rows)
        tokens, at = 0, walked.setdefault(u[0], 0)
        assert at % 64 == 0  # where units begin
        for s in range(u[5], u[6]):
            segment = t.segments[s]
            begin = u[7] if s == u[5] else 0
            end = u[8] if s == u[6] - 1 else segment[3]
            assert 0 == segment[2] <= begin < end <= segment[3]
            assert at + tokens == segment[7] + begin
            meet(index, segment, begin, end, rows)
            tokens += (end - begin + step - 1) // step * step
            if s == u[5]:
                level, page_begin, _, _, row_begin, row_end, diagonal, _ = segment
                assert u[9:15] == [level, page_begin, row_begin, row_end, diagonal, end]
        assert u[15] == tokens and (tokens > 0 or u[5:15] == [0] * 10)
        walked[u[0]] = at + tokens
        for row in rows:
            states.setdefault(row, []).append((u[2] + row - u[0] if u[2] >= 0 else -1, index))
    for number, u in enumerate(t.stream_units):
        index = len(t.matrix_units) + number
        assert 0 < u[1] - u[0] <= t.stream_tokens and u[5] % 64 == 0
        meet(index, [u[3], u[4], 0, 0, u[0], u[1], u[7], 0], u[5], u[6], range(u[0], u[1]))
        for row in range(u[0], u[1]):
            states.setdefault(row, []).append((u[2] + row - u[0] if u[2] >= 0 else -1, index))

    assert bool(t.merges) == any(tile[2] == 0 or tile[6] != 1 for tile in t.tiles)
    scratch: set[int] = set()
    for tile in t.tiles:
        for row in range(tile[0], tile[1]):
            mine = [place for place, _ in states.get(row, [])]
            count = tile[2] + sum(o[3] for o in t.own[tile[4] : tile[5]] if o[0] <= row < o[1])
            assert len(mine) == count
            if tile[3] < 0:
                assert count <= 1 and mine in ([], [-1])
                continue
            first = tile[3] + row - tile[0]
            assert sorted(mine) == [first + rank * (tile[1] - tile[0]) for rank in range(count)]
            assert not scratch.intersection(mine)
            scratch.update(mine)
    assert all(0 <= place < t.num_partial_rows for place in scratch)

    expected = 0
    for level, (qo, kv, last) in enumerate(
        zip(qo_indptr, kv_indptr, kv_last_page_len, strict=True)
    ):
        for g in range(groups[level]):
            pages = int(kv[g + 1] - kv[g])
            length = (pages - 1) * page_size + int(last[g]) if pages > 0 else 0
            for row in range(int(qo[g]), int(qo[g + 1])):
                sees = length
                if causal and level == len(groups) - 1:
                    sees = max(0, min(length, length - int(qo[g + 1]) + row + 1))
                expected += sees
                assert all((row, level, int(kv[g]), token) in seen for token in range(sees))
    assert len(seen) == expected
    return t
