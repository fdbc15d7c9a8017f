"""Short cases of every operator for compute-sanitizer (see sanitize.sh), all inputs initialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LSE_TOLERANCE,
    TOLERANCE,
    Forest,
    assert_lse_close,
    forest_of,
    int32,
    random_forest,
    relative_error,
)

import flashinfer_ops
from flashinfer_ops import cascade_attention, plan_cascade, reference

pytestmark = pytest.mark.sanitize


def attend(forest: Forest, causal: bool, layout: str = "NHD", as_tuple: bool = False) -> None:
    """Planned twice, the second time into the first plan's memory."""
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
    plan_cascade(*forest.arrays, **forest.numbers, causal=causal, out=plan)
    out, lse = cascade_attention(forest.q, forest.cache_as(layout, as_tuple), plan, layout)
    expected, expected_lse = forest.oracle(causal)
    assert relative_error(out, expected) < TOLERANCE[out.dtype]
    assert_lse_close(lse, expected_lse, LSE_TOLERANCE[out.dtype])


@pytest.mark.parametrize(
    "layout,as_tuple,dtype,page_size,head_dim,causal",
    [
        ("NHD", False, torch.bfloat16, 16, 128, False),
        ("HND", True, torch.float16, 16, 128, True),
        ("NHD", True, torch.float32, 3, 65, True),
        ("HND", False, torch.bfloat16, 1, 80, False),
    ],
)
def test_forest(
    device: str, layout: str, as_tuple: bool, dtype: torch.dtype, page_size: int, head_dim: int,
    causal: bool,
) -> None:  # fmt: skip
    forest = random_forest(
        1, num_levels=3, num_requests=12, max_qo_len=20, page_size=page_size, head_dim=head_dim,
        dtype=dtype, device=device, extra_rows=3,
    )  # fmt: skip
    attend(forest, causal, layout, as_tuple)


def test_merges_of_many_rows(device: str) -> None:
    forest = forest_of(
        [[900], [1] * 900], [[300], [1 + i % 20 for i in range(900)]], num_qo_heads=5,
        num_kv_heads=1, head_dim=128, dtype=torch.float16, device=device,
    )  # fmt: skip
    attend(forest, False)


@pytest.mark.parametrize(
    "rows,lengths",
    [
        ([[200]], [[1500]]),  # tiles of two consumers
        ([[12]], [[4000]]),  # of one
        ([[64], [16] * 4], [[1500], [1200] * 4]),  # the former, and then own pieces
    ],
)
def test_more_blocks_than_a_ring_holds(
    device: str, rows: list[list[int]], lengths: list[list[int]]
) -> None:
    forest = forest_of(
        rows, lengths, num_qo_heads=64, num_kv_heads=16, head_dim=128, dtype=torch.float16,
        device=device,
    )  # fmt: skip
    attend(forest, False)


def test_cut_kv_and_tiles(device: str) -> None:
    """Several units a tile and several tiles a request, merged."""
    forest = forest_of(
        [[41], [40, 1]], [[1500], [300, 7]], num_qo_heads=8, head_dim=128, dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    attend(forest, True)


def test_tree_and_levels_without_kv(device: str) -> None:
    forest = forest_of(
        [[16], [8, 8], [2] * 8, [1] * 16], [[16], [16, 16], [0] * 8, [16] * 16],
        num_qo_heads=8, head_dim=128, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    attend(forest, False)
    attend(forest_of([[2], [1, 1]], [[0], [0, 0]], extra_rows=4, device=device), False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 3, 40), (5, 2, 128)])
def test_merges(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(3, *shape, generator=g).to(device, dtype)
    s = torch.randn(3, *shape[:2], generator=g).to(device)
    d = torch.rand(3, *shape[:2], generator=g).to(device) + 0.5
    mask = torch.arange(shape[0], device=device) % 2 == 0
    indptr = int32(0, 0, 2, shape[0], device=device)
    states = v.transpose(0, 1), s.transpose(0, 1)

    def close(actual: Any, expected: Any) -> None:
        assert relative_error(actual[0], expected[0]) < TOLERANCE[dtype]
        for got, wanted in zip(actual[1:], expected[1:], strict=True):
            assert_lse_close(got, wanted, 1e-5)

    pair, omd = (v[0], s[0], v[1], s[1]), (v[0], s[0], d[0], v[1], s[1], d[1])
    merged = reference.merge_state(*(t.double() for t in pair))
    merged_omd = reference.merge_state_omd(*(t.double() for t in omd))
    close(flashinfer_ops.merge_state(*pair), merged)
    close(flashinfer_ops.merge_state(*omd), merged_omd)
    expected = reference.merge_states(*(t.double() for t in states))
    close(flashinfer_ops.merge_states(*states), expected)
    close(flashinfer_ops.merge_states(list(v), list(s)), expected)
    close(
        flashinfer_ops.variable_length_merge_states(v[0], s[0], indptr),
        reference.merge_states_ragged(v[0].double(), s[0].double(), indptr),
    )
    mine, mine_omd = [v[0].clone(), s[0].clone()], [v[0].clone(), s[0].clone(), d[0].clone()]
    flashinfer_ops.merge_state_in_place(*mine, v[1], s[1], mask)
    close([t[mask] for t in mine], [t[mask] for t in merged])
    flashinfer_ops.merge_state_in_place(*mine_omd, v[1], s[1], d[1])
    close(mine_omd, merged_omd)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_append(device: str, kv_layout: str) -> None:
    shape = (6, 2, 4, 2, 64) if kv_layout == "NHD" else (6, 2, 2, 4, 64)
    cache = torch.zeros(shape, dtype=torch.float16, device=device)
    kv_indptr, last = int32(0, 2, 2, 5, device=device), int32(3, 1, 4, device=device)
    pages = int32(4, 0, 5, 2, 1, device=device)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 8, 2, 64, generator=g).to(device, torch.float16)
    seq_lens = flashinfer_ops.get_seq_lens(kv_indptr, last, 4)
    where = flashinfer_ops.get_batch_indices_positions(
        int32(0, 2, 2, 6, device=device), seq_lens, 8
    )
    flashinfer_ops.append_paged_kv_cache(k, v, *where, cache, pages, kv_indptr, last, kv_layout)
    got = cache if kv_layout == "NHD" else cache.transpose(2, 3)
    assert torch.equal(got[0, 0, 1:3], k[:2]) and torch.equal(got[1, 1], v[2:6])
    assert int(got.count_nonzero()) == int(k[:6].count_nonzero() + v[:6].count_nonzero())


def test_wrappers(device: str) -> None:
    forest = random_forest(3, num_levels=1, num_requests=5, max_qo_len=3, device=device)
    k, v = torch.randn(2, 20, 2, 64, device=device)
    workspace = torch.zeros(16, dtype=torch.uint8, device=device)
    wrapper = flashinfer_ops.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace)
    wrapper.begin_forward(*[arrays[0] for arrays in forest.arrays], **forest.numbers)
    assert bool(wrapper.forward(forest.q, k, v, forest.cache, causal=True).isfinite().all())
