"""Cascade attention in Triton, over the schedule that the GPU's planner lays out (schedule.h).

Three kernels, whatever the batch and the number of levels; their grids follow from shapes alone:

    matrix units   up to 128 packed rows (query token, query head of one KV head) and a run of KV
                   that they see
    stream units   a few packed rows and a run of one group's KV
    merge          rows that have several states; rows that have none get the empty state

On Hopper they are chained by programmatic dependent launch: stream units start beside matrix units,
and the merge is in place when both are done.

The host's part is as short as it can be made: what depends on dtypes, shapes and strides is worked
out once for each set of them (`_launchers`), a call allocates and launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..meta.plan import gpu_schedule
from .attention_kernels import Config, Strides, matrix_kernel, stream_kernel
from .attention_merge import merge_kernel
from .launch import Launcher, Pointer, address, current_stream, misalignment

_LOG2_E = 1.4426950408889634
_TILE_ROWS = 128  # packed rows of a tile, and of a stream unit: constants of planner.h
_STREAM_ROWS = 64


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
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    cascade_attention_out(
        q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, schedule, causal,
        sm_scale, v_scale, out, lse,
    )  # fmt: skip
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
    groups = tuple([t.shape[0] - 1 for t in kv_indptr])
    layout = gpu_schedule(groups)
    group_size = num_qo_heads // k_cache.shape[2]
    tile_rows = min(_TILE_ROWS, num_rows * group_size)
    stream_rows = min(_STREAM_ROWS, -(-num_rows // max(groups[-1], 1)) * group_size)
    device = q.get_device()
    launchers = _launchers(
        device, q.dtype, num_qo_heads, head_dim, k_cache.shape, len(groups),
        (tile_rows - 1).bit_length(), (stream_rows - 1).bit_length(),
        q.stride(), k_cache.stride(), v_cache.stride(), out.stride(), lse.stride(),
        misalignment(q), misalignment(k_cache), misalignment(v_cache), misalignment(out),
    )  # fmt: skip
    states = layout.partial_rows * num_qo_heads
    scratch = q.new_empty(states * head_dim + states * 4 // q.element_size())

    plan = address(schedule)
    inputs = (address(q), address(k_cache), address(v_cache), tuple(map(address, kv_indices)), plan)
    results = (address(out), address(lse), address(scratch), launchers.strides)
    rest = (layout.partial_rows, num_rows, sm_scale * _LOG2_E, v_scale)
    stream = current_stream(device)
    launchers.matrix(
        stream,
        (*inputs, *results, layout.matrix_at, layout.segment_at, layout.granule_at, *rest,
         launchers.matrix_config),
    )  # fmt: skip
    launchers.stream(stream, (*inputs, *results, layout.stream_at, *rest, launchers.stream_config))
    launchers.merge(
        stream,
        (plan, *results, layout.tile_at, layout.own_at, layout.partial_rows, num_rows,
         launchers.merge_heads, launchers.matrix_config),
    )  # fmt: skip


class _Launchers(NamedTuple):
    """The kernels of one call, and their arguments that are the same every time."""

    matrix: Launcher
    stream: Launcher
    merge: Launcher
    strides: Strides
    matrix_config: Config
    stream_config: Config
    merge_heads: int


@lru_cache(maxsize=1024)
def _launchers(
    device: int,
    dtype: torch.dtype,
    num_qo_heads: int,
    head_dim: int,
    cache_shape: tuple[int, ...],
    num_levels: int,
    tile_rows_log2: int,
    stream_rows_log2: int,
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    out_stride: tuple[int, ...],
    lse_stride: tuple[int, ...],
    *misalignments: int,
) -> _Launchers:
    num_pages, page_size, num_kv_heads, _ = cache_shape
    if num_pages * page_size >= 1 << 31:  # the kernels count them in 32 bits
        raise ValueError("the caches have 2^31 token slots or more")
    strides = Strides(*q_stride[:2], *k_stride[:3], *v_stride[:3], *out_stride[:2], *lse_stride)
    kind = _device_kind(device)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    group_size = num_qo_heads // num_kv_heads
    shape = (num_levels, num_kv_heads, group_size, head_dim, padded_dim, page_size)
    matrix, stream = (
        Config(*shape, *_blocks(kind, dtype, padded_dim, max(16, 1 << log2)), kind.chained)
        for log2 in (tile_rows_log2, stream_rows_log2)
    )
    merge_heads = min(4, triton.next_power_of_2(num_qo_heads))

    q, k_cache, v_cache, out = (Pointer(dtype, m) for m in misalignments)
    # Read and written word by word: their alignment is nothing to the kernels.
    words, lse = Pointer(torch.int32, 4), Pointer(torch.float32, 4)
    inputs = (q, k_cache, v_cache, (words,) * num_levels, words)
    results = (out, lse, Pointer(dtype, 0), strides)

    def launcher(kernel: Any, slots: int, sample: tuple[Any, ...], **options: Any) -> Launcher:
        if kind.chained:
            options["launch_pdl"] = True
        return Launcher(kernel, kind.num_sms * slots, sample, **options)

    return _Launchers(
        launcher(
            matrix_kernel,
            _slots(matrix),
            (*inputs, *results, 0, 0, 0, 0, 0, 1.0, 1.0, matrix),
            **_options(matrix),
        ),
        launcher(
            stream_kernel,
            _slots(stream),
            (*inputs, *results, 0, 0, 0, 1.0, 1.0, stream),
            **_options(stream),
        ),
        launcher(merge_kernel, 8, (words, *results, 0, 0, 0, 0, merge_heads, matrix), num_warps=4),
        strides,
        matrix,
        stream,
        merge_heads,
    )


class _DeviceKind(NamedTuple):
    num_sms: int
    hopper: bool
    chained: bool  # has programmatic dependent launch
    roomy: bool  # has some 160 KB of shared memory for a program, and not 100 KB


@cache
def _device_kind(device: int) -> _DeviceKind:
    if device < 0:  # under Triton's interpreter
        return _DeviceKind(2, False, False, True)
    p = torch.cuda.get_device_properties(device)
    roomy = p.shared_memory_per_multiprocessor >= 160 * 1024
    return _DeviceKind(p.multi_processor_count, p.major == 9, p.major >= 9, roomy)


@cache
def _blocks(
    kind: _DeviceKind, dtype: torch.dtype, padded_dim: int, rows: int
) -> tuple[int, int, int, int, int]:
    """Rows and columns of a block, columns found at once, and stages of the two kinds of loop.

    The stages give two buffers of keys and of values each, three in Hopper's wgmma, which holds one
    for longer. There, with 64 rows, two leave an SM room for a second program.
    """
    stages, gather_stages = 5, 3
    single = dtype == torch.float32  # no matrix unit serves it in full precision
    if padded_dim > (128 if single else 256):
        rows, columns = 16, 16
    elif single:
        rows, columns = min(32, rows), 32
    elif padded_dim > 128:
        rows = min(64 if kind.hopper else 32, rows)
        columns = 64 if rows == 64 else 32
    else:
        rows, columns = min(128 if kind.roomy else 64, rows), 64
    if kind.hopper and rows == 64:
        stages, gather_stages = 4, 2
    return rows, columns, 128 * _warps(rows, padded_dim), stages, gather_stages


def _warps(block_rows: int, padded_dim: int) -> int:
    """8 where the accumulators would fill the registers of 4."""
    return 8 if block_rows > 64 or (block_rows == 64 and padded_dim > 128) else 4


def _slots(config: Config) -> int:
    """Programs that an SM runs at once, as planner.h has it."""
    if _warps(config.block_m, config.padded_dim) == 8:
        return 1
    return 2 if config.block_m > 32 else 3


def _options(config: Config) -> dict[str, int]:
    options = {"num_warps": _warps(config.block_m, config.padded_dim)}
    if _slots(config) == 3 and config.block_n == 64:
        options["maxnreg"] = 168  # what 3 programs of 4 warps leave to each of their threads
    return options
