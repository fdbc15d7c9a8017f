"""Cascade attention in Triton: numerics in the interpreter, what it compiles to, its launches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from gpu_schedule import plan_on_host, tables
from helpers import (
    LSE_TOLERANCE,
    TOLERANCE,
    Forest,
    assert_lse_close,
    forest_of,
    random_forest,
    relative_error,
)
from torch import Tensor
from triton_helpers import CAPABILITIES, compiled_by, compiling, interpreted

pytest.importorskip("triton")
HALF, FLOAT = torch.float16, torch.float32
either_class = pytest.mark.parametrize("packed", [False, True])


def plan(forest: Forest, causal: bool = False, num_sms: int = 132, packed: bool = False) -> Tensor:
    arrays = (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len)
    heads = forest.q.shape[1], forest.cache.shape[3]
    return plan_on_host(*arrays, *heads, forest.page_size, causal, num_sms, packed=packed)


def arguments(
    forest: Forest,
    causal: bool = False,
    num_sms: int = 132,
    packed: bool = False,
    sm_scale: float | None = None,
    v_scale: float = 1.0,
) -> list[Any]:
    """What the operator takes."""
    return [
        forest.q,
        forest.cache[:, 0],
        forest.cache[:, 1],
        *forest.arrays,
        plan(forest, causal, num_sms, packed),
        causal,
        forest.q.shape[2] ** -0.5 if sm_scale is None else sm_scale,
        v_scale,
    ]


def assert_right(
    forest: Forest, causal: bool = False, num_sms: int = 4, packed: bool = False, **scales: float
) -> None:
    from flashinfer_ops.triton_kernels import OPERATORS

    out, lse = OPERATORS["cascade_attention"](*arguments(forest, causal, num_sms, packed, **scales))
    wanted, wanted_lse = forest.oracle(causal, **scales)
    assert not bool(out.isnan().any())
    assert relative_error(out, wanted) < TOLERANCE[forest.q.dtype]
    assert_lse_close(lse, wanted_lse, LSE_TOLERANCE[forest.q.dtype])


@interpreted
@either_class
@pytest.mark.parametrize(
    "levels, requests, heads, head_dim, page_size, kv_len, qo_len, causal, dtype",
    [
        (1, 3, (4, 4), 64, 16, 100, 1, False, HALF),
        (2, 6, (8, 2), 32, 16, 130, 2, True, FLOAT),
        (2, 5, (6, 2), 24, 5, 200, 9, True, HALF),
        (3, 9, (7, 1), 16, 1, 40, 1, False, FLOAT),
        (5, 12, (16, 1), 16, 1, 18, 1, False, HALF),
        (2, 3, (32, 1), 16, 64, 150, 7, True, HALF),
        (2, 3, (200, 1), 16, 16, 60, 2, False, HALF),
    ],
)
def test_forests(
    levels: int,
    requests: int,
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    kv_len: int,
    qo_len: int,
    causal: bool,
    dtype: torch.dtype,
    packed: bool,
) -> None:
    forest = random_forest(
        levels * 100 + requests,
        num_levels=levels,
        num_requests=requests,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        max_kv_len=kv_len,
        max_qo_len=qo_len,
        dtype=dtype,
        extra_rows=3,
    )
    assert_right(forest, causal, 16, packed, sm_scale=0.3, v_scale=1.5)


@interpreted
def test_own_pieces_beside_their_tile() -> None:
    """Long suffixes of few rows under a shared prefix: stream units, and states to merge."""
    forest = random_forest(
        4,
        num_levels=2,
        num_requests=24,
        num_qo_heads=8,
        num_kv_heads=1,
        head_dim=16,
        max_kv_len=150,
        dtype=HALF,
    )
    schedule = plan(forest, num_sms=4)
    assert int(schedule[3]) > 0 and int(schedule[4]) > 0 and int(schedule[5]) > 0
    assert_right(forest)


@interpreted
def test_stream_units_of_several_blocks_of_rows() -> None:
    """64 packed rows, and some of 40, of which a float32 block holds 32."""
    forest = forest_of(
        [[30], [8, 8, 5, 8, 1]], [[100], [3000, 2900, 3100, 2950, 2000]], num_qo_heads=8,
        num_kv_heads=1, head_dim=16, page_size=64, dtype=FLOAT,
    )  # fmt: skip
    schedule = plan(forest, causal=True, num_sms=4, packed=True)
    assert int(schedule[4]) > 0 and int(schedule[6]) == 8
    assert_right(forest, causal=True, packed=True)


@interpreted
def test_levels_that_are_not_nested() -> None:
    forest = random_forest(
        1,
        num_levels=3,
        num_requests=5,
        num_qo_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_qo_len=3,
        nested=False,
        dtype=HALF,
    )
    assert_right(forest)


@interpreted
@either_class
@pytest.mark.parametrize("num_sms", [1, 16])
def test_many_short_segments(packed: bool, num_sms: int) -> None:
    """More of them than a chunk takes, and more columns than are found at once; a long one before
    them, which is walked without masks."""
    lengths = [1 + 7 * i % 43 for i in range(100)]
    forest = forest_of(
        [[100], [70, 30], [1] * 100], [[300], [21, 0], lengths], num_qo_heads=1, num_kv_heads=1,
        head_dim=16, page_size=3, dtype=HALF,
    )  # fmt: skip
    t = tables(plan(forest, num_sms=num_sms, packed=packed), [1, 2, 100])
    entries = [u[4] - u[3] + u[6] - u[5] for u in t.matrix_units]
    assert max(entries) > 64 or num_sms > 1
    if packed:
        assert any(u[7] % 64 for u in t.matrix_units) or num_sms == 1
    assert_right(forest, num_sms=num_sms, packed=packed)


@interpreted
@pytest.mark.parametrize("rows", [3, 40, 150])
def test_causal_segments_of_many_blocks(rows: int) -> None:
    """Blocks that all rows of a tile see, then those on the diagonal."""
    forest = forest_of(
        [[rows], [rows]], [[290], [rows + 700]], num_qo_heads=4, num_kv_heads=2, head_dim=16,
        page_size=16, dtype=HALF,
    )  # fmt: skip
    assert_right(forest, causal=True, num_sms=2, packed=True)


@interpreted
def test_strides() -> None:
    from flashinfer_ops.triton_kernels.attention import cascade_attention_out

    forest = random_forest(
        7, num_levels=2, num_requests=9, num_qo_heads=6, num_kv_heads=2, head_dim=16, dtype=HALF
    )
    args = arguments(forest, num_sms=4)
    args[1:3] = forest.cache_as("HND", as_tuple=True)
    args[1:3] = [cache.transpose(1, 2) for cache in args[1:3]]
    args[0] = forest.q.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.full((len(forest.q), 8, 20), torch.nan, dtype=HALF)[:, 1:7, 2:18]
    lse = torch.full((6, len(forest.q)), torch.nan).t()
    cascade_attention_out(*args, out, lse)
    wanted, wanted_lse = forest.oracle()
    assert relative_error(out, wanted) < TOLERANCE[HALF]
    assert_lse_close(lse, wanted_lse, LSE_TOLERANCE[HALF])


def small_forest(heads: tuple[int, int] = (32, 8), dtype: torch.dtype = HALF) -> Forest:
    return random_forest(
        0, num_levels=3, num_requests=40, num_qo_heads=heads[0], num_kv_heads=heads[1],
        head_dim=128, dtype=dtype,
    )  # fmt: skip


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The launchers of a device of that compute capability, none of them made yet."""
    from flashinfer_ops.triton_kernels import attention

    value = int(request.param)
    kind = attention._DeviceKind(132, value == 90, value >= 90, True)
    monkeypatch.setattr(attention, "_device_kind", lambda device: kind)
    attention._launchers.cache_clear()
    request.addfinalizer(attention._launchers.cache_clear)
    return value


@pytest.mark.parametrize("capability", CAPABILITIES, indirect=True)
@pytest.mark.parametrize("heads, dtype", [((32, 8), HALF), ((6, 2), torch.bfloat16)])
def test_compiles(capability: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    from flashinfer_ops.triton_kernels import OPERATORS

    forest = small_forest(heads, dtype)
    compiled = compiled_by(capability, OPERATORS["cascade_attention"], *arguments(forest))
    assert len(compiled) == 3
    matrix, stream, merge = (kernel.asm["ptx"] for kernel in compiled)
    assert ("wgmma" if capability == 90 else "mma.sync") in matrix
    assert "mma.sync" in stream
    for ptx in (matrix, stream):
        assert "cp.async.cg.shared.global" in ptx  # 16 bytes a thread, past the L1
    assert "ld.global.v4" in merge or "ld.global.v2" in merge


def kv_buffers(ttgir: str) -> list[int]:
    """How many buffers each pipelined loop has for its keys, and for its values."""
    pattern = r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x64x128xf16"
    return [int(n) for n in re.findall(pattern, ttgir)]


@pytest.mark.parametrize("capability", CAPABILITIES, indirect=True)
def test_pipelines(capability: int) -> None:
    from flashinfer_ops.triton_kernels import OPERATORS

    compiled = compiled_by(capability, OPERATORS["cascade_attention"], *arguments(small_forest()))
    matrix, stream = (kernel.asm["ttgir"] for kernel in compiled[:2])
    assert kv_buffers(matrix) == [3 if capability == 90 else 2] * 4
    assert kv_buffers(stream) == [2, 2]
    # What short segments are made of was found before their loop, which loads keys and values only.
    block = matrix.rindex("scf.for", 0, matrix.rindex("tt.gather"))
    loop = matrix[block : matrix.index("scf.yield", block)]
    assert loop.count("ttg.async_copy_global_to_local") == 2 and "tt.load" not in loop


def flat(kinds: Any, args: Any) -> list[tuple[str, Any]]:
    """The types that a kernel was compiled for, each with the argument that it got."""
    if not isinstance(kinds, tuple):
        return [] if kinds == "constexpr" else [(kinds, args)]
    assert len(kinds) == len(args)
    return [pair for k, a in zip(kinds, args, strict=True) for pair in flat(k, a)]


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_launches(capability: int) -> None:
    """What is passed by the JIT compiler: arguments fit what was compiled, and only a call that it
    would compile another kernel for gets another."""
    from flashinfer_ops.triton_kernels import attention

    forest = small_forest()
    args = arguments(forest)
    out, lse = torch.empty_like(forest.q), torch.empty(forest.q.shape[:2])
    compiled: list[Any] = []
    with compiling(capability, compiled) as driver:

        def launches(q: Tensor = args[0], cache: list[Tensor] = args[1:3]) -> tuple[int, list[Any]]:
            """Kernels compiled for a call, and what is launched, each argument with its type."""
            del compiled[:], driver.launches[:]
            attention.cascade_attention_out(q, *cache, *args[3:], out, lse)
            pairs = [
                flat(tuple(source.signature.values()), values) for source, values in driver.launches
            ]
            return len(compiled), pairs

        number, kernels = launches()
        assert number == len(kernels) == 3
        for kernel in kernels:
            for kind, value in kernel:
                assert isinstance(value, float if kind == "fp32" else int)
                assert kind[0] == "*" or kind == "fp32" or (kind == "i32" and value < 1 << 31)
        indices = [t.data_ptr() for t in forest.kv_indices]
        pointers = [forest.q, *args[1:3], *forest.kv_indices, args[7], out, lse]
        for kernel in kernels[:2]:
            addresses = [value for kind, value in kernel if kind[0] == "*"]
            assert addresses[:-1] == [t.data_ptr() for t in pointers]
        assert indices == [value for kind, value in kernels[0] if kind == "*i32"][:3]

        assert launches()[0] == 0
        assert launches(q=forest.q[:-1])[0] == 0  # as many rows as there are
        shifted = torch.empty(forest.q.numel() + 1, dtype=HALF)[1:].view(forest.q.shape)
        assert launches(q=shifted)[0] == 3  # no longer a multiple of 16 bytes
        assert launches(cache=[t.clone() for t in args[1:3]])[0] == 3  # other strides
