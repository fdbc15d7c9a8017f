"""Schema and fake of the planner: from index arrays to a schedule of work units.

The schedule is one int32 tensor whose size follows from the shapes of the index arrays and the
device alone, so that a plan can be made without reading them on the host, and made again into the
same memory. Its layout is in `csrc/cpu/schedule.h` for the CPU, in `csrc/cuda/schedule.h` for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import check, check_shape, define, register_fake

HEADER_WORDS = 16
"""Words before the tables of the schedule."""
BASE_TILES = 256
"""A schedule has room for this many row tiles and one more for each group of the last level."""
EXTRA_UNITS = 512
"""A schedule has room for one unit a row tile, and for this many cuts of a tile's KV."""

define(
    "cascade_plan(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len,"
    " int num_qo_heads, int num_kv_heads, int head_dim, int page_size, bool causal) -> Tensor"
)


@register_fake("cascade_plan")
def _(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool,
) -> Tensor:
    _check_levels(qo_indptr, kv_indptr, kv_last_page_len)
    size = schedule_size([t.shape[0] - 1 for t in kv_indptr], kv_indptr[0].device)
    return kv_indptr[0].new_empty((size,), dtype=torch.int32)


define(
    "cascade_plan.out(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len,"
    " int num_qo_heads, int num_kv_heads, int head_dim, int page_size, bool causal,"
    " Tensor(a!) schedule) -> ()"
)


@register_fake("cascade_plan.out")
def _(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool,
    schedule: Tensor,
) -> None:
    _check_levels(qo_indptr, kv_indptr, kv_last_page_len)
    size = schedule_size([t.shape[0] - 1 for t in kv_indptr], schedule.device)
    check_shape("schedule", schedule, (size,))
    check(schedule.dtype == torch.int32, "schedule is not int32")


def schedule_size(num_groups: Sequence[int], device: torch.device) -> int:
    """Words of the schedule for levels of so many groups (the capacities, not the live counts)."""
    if device.type == "cuda":
        return _gpu_schedule(num_groups).words
    # The same sum as `ScheduleCapacity` in `csrc/cpu/plan.cpp`.
    tiles = BASE_TILES + num_groups[-1]
    units = tiles + EXTRA_UNITS
    # Each group is one segment; each tile border splits one group a level, each cut one segment.
    segments = sum(num_groups) + len(num_groups) * tiles + EXTRA_UNITS
    return HEADER_WORDS + 4 * tiles + 4 * units + 8 * segments


class GpuSchedule(NamedTuple):
    """Where the tables of a GPU's schedule begin, in words, and how large its scratch is.

    The same sums as `Layout` in `csrc/cuda/schedule.h`.
    """

    list_at: int
    tile_at: int
    matrix_at: int
    stream_at: int
    segment_at: int
    granule_at: int
    own_at: int
    work_at: int
    words: int
    partial_rows: int


def _gpu_schedule(num_groups: Sequence[int]) -> GpuSchedule:
    levels, groups = len(num_groups), sum(num_groups)
    tiles = 256 + num_groups[-1]
    pieces = groups + levels * tiles
    tile_at = HEADER_WORDS + 32 * 3 * 144
    matrix_at = tile_at + 8 * tiles
    stream_at = matrix_at + 16 * (tiles + 1024)
    segment_at = stream_at + 8 * (pieces + 1024)
    granule_at = segment_at + 8 * pieces
    own_at = granule_at + 16 * pieces
    work_at = own_at + 4 * pieces
    words = work_at + 3 * groups + 2 * levels + (2 * levels + 18) * tiles + 7 * pieces + 384
    return GpuSchedule(
        HEADER_WORDS,
        tile_at,
        matrix_at,
        stream_at,
        segment_at,
        granule_at,
        own_at,
        work_at,
        words,
        2048 + 2 * groups,
    )


gpu_schedule = cache(_gpu_schedule)
"""`GpuSchedule` for levels of so many groups, a tuple of ints: launchers ask for it every call."""


def _check_levels(
    qo_indptr: Sequence[Tensor], kv_indptr: Sequence[Tensor], kv_last_page_len: Sequence[Tensor]
) -> None:
    check(len(kv_indptr) > 0, "kv_indptr has no levels")
    check(
        len(qo_indptr) == len(kv_indptr) == len(kv_last_page_len),
        "the index arrays differ in their number of levels",
    )
    for qo, kv, last in zip(qo_indptr, kv_indptr, kv_last_page_len, strict=True):
        check_shape("kv_indptr", kv, (None,))
        check_shape("qo_indptr", qo, kv.shape)
        check_shape("kv_last_page_len", last, (kv.shape[0] - 1,))
