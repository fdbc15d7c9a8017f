"""Cascade attention in Triton: numerics in the interpreter, and what it compiles to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_schedule import check, plan_on_host
from helpers import LSE_TOLERANCE, TOLERANCE, Forest, assert_lse_close, random_forest, relative_error
from torch import Tensor
from triton_helpers import CAPABILITIES, compiled_by, interpreted

pytest.importorskip("triton")


def arguments(forest: Forest, causal: bool = False, num_sms: int = 132, **options: Any) -> list[Any]:
    """What the operator takes."""
    q, cache = forest.q, forest.cache
    arrays = (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len)
    schedule = plan_on_host(
        *arrays, q.shape[1], cache.shape[3], forest.page_size, causal, num_sms=num_sms
    )
    sm_scale = options.get("sm_scale", q.shape[2] ** -0.5)
    return [
        q,
        cache[:, 0],
        cache[:, 1],
        forest.qo_indptr,
        forest.kv_indptr,
        forest.kv_indices,
        forest.kv_last_page_len,
        schedule,
        causal,
        sm_scale,
        options.get("v_scale", 1.0),
    ]


def attention(forest: Forest, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from flashinfer_ops.triton_kernels import OPERATORS

    out, lse = OPERATORS["cascade_attention"](*arguments(forest, *args, **options))
    return out, lse


def assert_right(forest: Forest, causal: bool = False, num_sms: int = 4, **options: Any) -> None:
    out, lse = attention(forest, causal, num_sms, **options)
    wanted, wanted_lse = forest.oracle(causal, **options)
    assert not bool(out.isnan().any())
    assert relative_error(out, wanted) < TOLERANCE[forest.q.dtype]
    assert_lse_close(lse, wanted_lse, LSE_TOLERANCE[forest.q.dtype])


@interpreted
@pytest.mark.parametrize(
    "levels, requests, heads, head_dim, page_size, kv_len, qo_len, causal, dtype",
    [
        (1, 3, (4, 4), 64, 16, 100, 1, False, torch.float16),
        (2, 6, (8, 2), 32, 16, 130, 2, True, torch.float32),
        (2, 5, (6, 2), 24, 5, 200, 9, True, torch.float16),
        (3, 9, (7, 1), 16, 1, 40, 1, False, torch.float32),
        (5, 12, (16, 1), 16, 1, 18, 1, False, torch.float16),
        (2, 3, (32, 1), 16, 64, 150, 7, True, torch.float16),
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
    assert_right(forest, causal, num_sms=16, sm_scale=0.3, v_scale=1.5)


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
        dtype=torch.float16,
    )
    schedule = arguments(forest, num_sms=4)[7]
    assert int(schedule[3]) > 0 and int(schedule[4]) > 0 and int(schedule[5]) > 0
    assert_right(forest)


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
        dtype=torch.float16,
    )
    assert_right(forest)


@pytest.mark.parametrize("seed", range(12))
def test_plans_meet_each_pair_once(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    heads = pick((4, 4), (8, 2), (8, 1), (6, 2), (7, 1), (32, 1), (200, 1))
    forest = random_forest(
        seed,
        num_levels=pick(1, 2, 3, 9),
        num_requests=pick(1, 5, 30, 70),
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=1,
        page_size=pick(1, 5, 16),
        max_kv_len=pick(20, 70, 300),
        max_qo_len=pick(1, 1, 3, 7),
        nested=pick(True, False),
    )
    arrays = (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len)
    causal, fast_bytes = pick(True, False), pick(0, 1000, 160 * 1024)
    schedule = plan_on_host(
        *arrays, *heads, forest.page_size, causal, pick(2, 132), fast_bytes
    )
    check(schedule, *arrays, forest.page_size, causal)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("heads, dtype", [((32, 8), torch.float16), ((6, 2), torch.bfloat16)])
def test_compiles(capability: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    from flashinfer_ops.triton_kernels import attention as kernels

    forest = random_forest(
        0,
        num_levels=3,
        num_requests=40,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        dtype=dtype,
    )
    compiled = compiled_by(capability, kernels.cascade_attention, *arguments(forest))
    assert len(compiled) == 3
    matrix, stream, merge = (kernel.asm["ptx"] for kernel in compiled)
    assert ("wgmma" if capability == 90 else "mma.sync") in matrix
    assert "mma.sync" in stream
    for ptx in (matrix, stream):
        assert "cp.async.cg.shared.global" in ptx  # 16 bytes a thread, past the L1
    assert "ld.global.v4" in merge or "ld.global.v2" in merge
