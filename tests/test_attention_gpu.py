"""Cascade attention at the sizes that GPU kernels are made for, against float64 on the GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    LSE_TOLERANCE,
    TOLERANCE,
    assert_lse_close,
    attend,
    check_attention,
    forest_of,
    int32,
    random_forest,
    relative_error,
)
from torch import Tensor

from flashinfer_ops import cascade_attention, plan_cascade

pytestmark = pytest.mark.gpu
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "head_dim,group_size,num_kv_heads,dtype",
    [
        (64, 1, 3, BF16), (64, 8, 2, HALF), (64, 7, 2, BF16), (64, 4, 1, FLOAT),
        (128, 1, 8, BF16), (128, 3, 2, BF16), (128, 4, 8, BF16), (128, 4, 2, HALF),
        (128, 7, 4, BF16), (128, 8, 1, BF16), (128, 16, 2, BF16), (128, 32, 1, HALF),
        (128, 5, 3, FLOAT), (256, 4, 2, BF16), (256, 8, 1, HALF), (256, 1, 2, FLOAT),
        (80, 4, 2, BF16), (96, 3, 2, HALF), (40, 8, 1, BF16), (96, 1, 5, FLOAT),
        (7, 3, 1, BF16), (65, 2, 2, FLOAT), (192, 2, 1, BF16), (16, 6, 1, HALF),
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_qo_len", [1, 40])
def test_heads(
    cuda: str, head_dim: int, group_size: int, num_kv_heads: int, dtype: torch.dtype,
    max_qo_len: int,
) -> None:  # fmt: skip
    forest = random_forest(
        head_dim + group_size,
        num_levels=3,
        num_requests=13,
        num_qo_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_qo_len=max_qo_len,
        max_kv_len=300,
        dtype=dtype,
        device=cuda,
        extra_rows=2,
    )
    causal = max_qo_len > 1
    check_attention(attend(forest, causal=causal), forest, causal)


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 24, 64])
@pytest.mark.parametrize("dtype", [BF16, FLOAT])
@pytest.mark.parametrize("layout,as_tuple", [("NHD", False), ("HND", False), ("NHD", True)])
def test_page_sizes(
    cuda: str, page_size: int, dtype: torch.dtype, layout: str, as_tuple: bool
) -> None:
    forest = random_forest(
        page_size, num_levels=2, num_requests=20, page_size=page_size, max_kv_len=700,
        max_qo_len=3, num_qo_heads=8, head_dim=128, dtype=dtype, device=cuda,
    )  # fmt: skip
    check_attention(
        attend(forest, layout, forest.cache_as(layout, as_tuple), causal=True), forest, True
    )


@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT])
def test_causal_lengths(cuda: str, dtype: torch.dtype) -> None:
    """Requests of 1 to 200 rows, several row tiles each; KV shorter, as long, and longer."""
    rows = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 150, 199, 200, 0, 1]
    lengths = [1, 2, 7, 16, 500, 31, 20, 64, 65, 64, 1000, 127, 128, 129, 0, 40, 333, 77, 900]
    half = len(rows) // 2
    forest = forest_of(
        [[sum(rows[:half]), sum(rows[half:])], rows], [[130, 17], lengths],
        num_qo_heads=8, head_dim=128, dtype=dtype, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest, causal=True), forest, True)
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16])
def test_levels(cuda: str, num_levels: int, nested: bool) -> None:
    forest = random_forest(
        num_levels, num_levels=num_levels, num_requests=150, num_qo_heads=8, head_dim=128,
        max_kv_len=90, max_qo_len=2, nested=nested, extra_rows=3, dtype=BF16, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest, causal=True), forest, True)


@pytest.mark.parametrize("branching,num_levels", [(2, 9), (4, 6), (32, 3)])
@pytest.mark.parametrize("page_size", [1, 16])
def test_trees_of_small_nodes(cuda: str, branching: int, num_levels: int, page_size: int) -> None:
    """Full trees of 16-token nodes with 256 or 1024 requests: more states than KV."""
    leaves = branching ** (num_levels - 1)
    widths = [branching**level for level in range(num_levels)]
    forest = forest_of(
        [[leaves // width] * width for width in widths], [[16] * width for width in widths],
        num_qo_heads=8, head_dim=128, page_size=page_size, dtype=BF16, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_one_long_prefix(cuda: str, dtype: torch.dtype) -> None:
    forest = forest_of(
        [[24], [1] * 24], [[40_000], [64] * 24], num_qo_heads=32, num_kv_heads=8, head_dim=128,
        dtype=dtype, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("head_dim,page_size", [(128, 16), (128, 1), (64, 16), (256, 16)])
@pytest.mark.parametrize("prefix", [512, 2048, 16384])
def test_long_suffixes_of_many_requests(
    cuda: str, head_dim: int, page_size: int, prefix: int
) -> None:
    """Suffixes are own pieces, and some SMs begin with them while others compute the prefix."""
    forest = forest_of(
        [[256], [1] * 256], [[prefix], [500 + i % 5 for i in range(256)]], num_qo_heads=8,
        num_kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=HALF, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("head_dim,page_size", [(128, 16), (128, 1), (64, 16), (256, 24)])
@pytest.mark.parametrize("qo_len", [1, 4, 16])
def test_prefixes_walked_first_and_last(
    cuda: str, head_dim: int, page_size: int, qo_len: int
) -> None:
    """16 tiles of 8 heads, for 132 SMs: every other one walks the prefix last."""
    requests = 256 // qo_len
    lengths = [qo_len * (48 + 17 * i % 40) for i in range(requests)]
    forest = forest_of(
        [[256], [qo_len] * requests], [[1100], lengths], num_qo_heads=64, num_kv_heads=8,
        head_dim=head_dim, page_size=page_size, dtype=HALF, device=cuda,
    )  # fmt: skip
    causal = qo_len > 1
    check_attention(attend(forest, causal=causal), forest, causal)


def test_one_long_request_among_short_ones(cuda: str) -> None:
    lengths = [(37 * i) % 200 + 1 for i in range(100)]
    lengths[41] = 60_001
    for rows in ([1] * 100, [1 + i % 3 for i in range(100)]):
        forest = forest_of(
            [[sum(rows)], rows], [[5], lengths], num_qo_heads=8, head_dim=128, dtype=BF16,
            device=cuda,
        )  # fmt: skip
        check_attention(attend(forest, causal=True), forest, True)


@pytest.mark.parametrize("group_size", [1, 4, 7])
def test_groups_of_unaligned_sizes(cuda: str, group_size: int) -> None:
    """Borders within a tile, at its edges, and one row past them."""
    sizes = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 4, 4, 1, 0, 7]
    lengths = [40 + 11 * i for i in range(len(sizes))]
    forest = forest_of(
        [[sum(sizes)], sizes, [1] * sum(sizes)],
        [[200], lengths, [1 + i % 37 for i in range(sum(sizes))]],
        num_qo_heads=group_size, num_kv_heads=1, head_dim=128, dtype=BF16, device=cuda,
    )  # fmt: skip
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("empty", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_levels_without_kv(cuda: str, empty: tuple[int, ...]) -> None:
    lengths = [[90], [33, 500], [20, 0, 7, 64, 1, 300]]
    forest = forest_of(
        [[60], [20, 40], [3, 1, 16, 1, 38, 1]],
        [[0] * len(level) if i in empty else level for i, level in enumerate(lengths)],
        num_qo_heads=8, head_dim=128, dtype=BF16, device=cuda, extra_rows=70,
    )  # fmt: skip
    check_attention(attend(forest, causal=True), forest, True)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strided_views(cuda: str, layout: str) -> None:
    """q from a fused QKV, outputs with gaps, every other page of a cache with wider heads."""
    forest = random_forest(
        3, num_levels=2, num_requests=30, max_qo_len=20, num_qo_heads=8, head_dim=128,
        max_kv_len=500, extra_rows=2, dtype=BF16, device=cuda,
    )  # fmt: skip
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=True)
    n, h, d = forest.q.shape
    q = torch.full((n, h + 4, d), NAN, dtype=BF16, device=cuda)[:, 2 : 2 + h]
    q.copy_(forest.q)
    cache = forest.cache_as(layout)
    assert isinstance(cache, Tensor)
    pool = cache.new_full((2 * cache.shape[0], *cache.shape[1:-1], 144), NAN)
    pool[::2, ..., 8:136] = cache
    out = torch.full((h, n, 2 * d), 7.0, dtype=BF16, device=cuda)
    view, lse = out.transpose(0, 1)[..., d:], torch.full((h, n), 7.0, device=cuda).T
    cascade_attention(q, pool[::2, ..., 8:136], plan, layout, out=view, lse=lse)
    check_attention((view, lse), forest, True, contiguous=False)
    assert bool((out[..., :d] == 7.0).all())
    # Heads that start at odd elements: no 16-byte loads.
    narrow = cache.new_full((*cache.shape[:-1], 131), NAN)
    narrow[..., 1:129] = cache
    odd = torch.full((n, h, 131), NAN, dtype=BF16, device=cuda)[..., 3:]
    odd.copy_(forest.q)
    check_attention(cascade_attention(odd, narrow[..., 1:129], plan, layout), forest, True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_caches_in_unusual_orders(cuda: str, head_dim: int) -> None:
    """Heads before pages, pages that lie no whole number of heads apart, a cache of one page, one
    page that all page numbers name."""
    forest = random_forest(
        6, num_levels=2, num_requests=20, max_qo_len=3, num_qo_heads=8, head_dim=head_dim,
        max_kv_len=500, dtype=HALF, device=cuda,
    )  # fmt: skip
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    caches = forest.cache[:, 0], forest.cache[:, 1]
    by_head = [cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for cache in caches]
    check_attention(cascade_attention(forest.q, (by_head[0], by_head[1]), plan), forest)
    padded = []
    for cache in caches:
        pages, slots, heads, _ = cache.shape
        pool = cache.new_full((pages, heads * slots * head_dim + 8), NAN)
        view = pool[:, :-8].view(pages, heads, slots, head_dim).transpose(1, 2)
        padded.append(view.copy_(cache))
    check_attention(cascade_attention(forest.q, (padded[0], padded[1]), plan), forest)
    few = forest_of([[5]], [[16]], num_qo_heads=8, head_dim=head_dim, dtype=HALF, device=cuda)
    few.cache = few.cache[few.kv_indices[0].long()].contiguous()
    few.kv_indices[0].zero_()
    check_attention(attend(few), few)
    same = few.cache.expand(7, -1, -1, -1, -1)
    check_attention(attend(few, cache=(same[:, 0], same[:, 1])), few)


@pytest.mark.parametrize("page_size", [16, 1])
def test_offsets_past_31_bits(cuda: str, page_size: int) -> None:
    """Pages beyond the first 2^31 elements of the cache, and only those."""
    forest = random_forest(
        5, num_levels=2, num_requests=20, num_kv_heads=2, num_qo_heads=8, head_dim=128,
        page_size=page_size, max_kv_len=300, dtype=HALF, device=cuda,
    )  # fmt: skip
    first = 2**31 // forest.cache[0].numel() + 1
    if torch.cuda.mem_get_info()[0] < 3 * 2**31:
        pytest.skip("needs 6 GiB of free GPU memory")
    cache = forest.cache.new_empty((first + len(forest.cache), *forest.cache.shape[1:]))
    cache[:first].fill_(NAN)
    cache[first:] = forest.cache
    shifted = [t + first for t in forest.kv_indices]
    plan = plan_cascade(
        forest.qo_indptr, forest.kv_indptr, shifted, forest.kv_last_page_len, **forest.numbers
    )
    check_attention(cascade_attention(forest.q, cache, plan), forest)
    check_attention(cascade_attention(forest.q, (cache[:, 0], cache[:, 1]), plan), forest)


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
def test_scales(cuda: str, dtype: torch.dtype) -> None:
    forest = random_forest(
        8, num_levels=3, num_requests=40, num_qo_heads=8, head_dim=128, max_kv_len=400,
        dtype=dtype, device=cuda,
    )  # fmt: skip
    for sm_scale in (0.37, 0.0, -0.05, 1e-30):
        plan = plan_cascade(*forest.arrays, **forest.numbers, sm_scale=sm_scale)
        check_attention(cascade_attention(forest.q, forest.cache, plan), forest, False, sm_scale)
    plan = plan_cascade(*forest.arrays, **forest.numbers, sm_scale=0.08)
    for k_scale, v_scale in ((1.7, None), (None, -2.3), (-0.5, 0.25), (0.0, 1e3)):
        actual = cascade_attention(forest.q, forest.cache, plan, k_scale=k_scale, v_scale=v_scale)
        scale = 0.08 * (1.0 if k_scale is None else k_scale)
        check_attention(actual, forest, False, scale, 1.0 if v_scale is None else v_scale)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("kind", ["slowly", "in leaps", "falling", "late", "spikes"])
def test_logits_that_rise(cuda: str, head_dim: int, dtype: torch.dtype, kind: str) -> None:
    """Later keys of a long prefix outweigh all before them, by a little or by far: weights that
    are relative to the highest logit of earlier keys must not overflow."""
    for requests, group_size in ((40, 4), (130, 1)):
        forest = forest_of(
            [[requests], [1] * requests], [[5000], [40 + i % 30 for i in range(requests)]],
            seed=requests, num_qo_heads=2 * group_size, head_dim=head_dim, dtype=dtype, device=cuda,
        )  # fmt: skip
        pages = forest.kv_indices[0].long()
        place = torch.arange(len(pages), device=cuda, dtype=FLOAT)
        factor = {
            "slowly": 1 + 0.02 * place,
            "in leaps": 1 + 0.02 * place + place // 50 * 6,
            "falling": 8 - 7 * place / len(pages),
            "late": 0.01 + 20 * (place > 200),
            "spikes": 1 + 15 * (place % 64 == 63),
        }[kind]
        keys = forest.cache[pages, 0].float() * factor.view(-1, 1, 1, 1)
        forest.cache[pages, 0] = keys.to(dtype)
        check_attention(attend(forest), forest)


def test_large_logits(cuda: str) -> None:
    """Logits of thousands neither overflow nor lose the lse."""
    forest = random_forest(
        9, num_levels=2, num_requests=20, num_qo_heads=8, head_dim=128, max_kv_len=300,
        dtype=FLOAT, device=cuda,
    )  # fmt: skip
    forest.q *= 50
    out, lse = attend(forest)
    expected, expected_lse = forest.oracle(device=cuda)
    assert relative_error(out, expected) < 2e-4  # float32 logits of a thousand: 1e-4 absolute
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-6)


def test_a_page_listed_in_many_groups(cuda: str) -> None:
    """Groups may share pages without sharing a node, and list one page more than once."""
    forest = forest_of([[4, 4], [1] * 8], [[64, 64], [16] * 8], head_dim=128, dtype=BF16,
                       device=cuda)  # fmt: skip
    forest.kv_indices[0] = int32(*forest.kv_indices[0][:4].tolist() * 2, device=cuda)
    forest.kv_indices[1] = forest.kv_indices[0].clone()
    forest.cache.nan_to_num_()
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("dtype,head_dim", [(HALF, 128), (BF16, 64), (FLOAT, 128)])
@pytest.mark.parametrize("max_qo_len", [1, 30])
def test_portable_kernels(cuda: str, dtype: torch.dtype, head_dim: int, max_qo_len: int) -> None:
    """The kernels for any chip, on every chip, over the plans of this one."""
    causal = max_qo_len > 1
    for forest in (
        random_forest(
            3, num_levels=3, num_requests=40, num_qo_heads=8, head_dim=head_dim,
            max_qo_len=max_qo_len, max_kv_len=400, dtype=dtype, device=cuda, extra_rows=2,
        ),
        forest_of(
            [[64], [32] * 2, [1] * 64], [[900], [40] * 2, [600] * 64], num_qo_heads=8,
            head_dim=head_dim, dtype=dtype, device=cuda,
        ),
    ):  # fmt: skip
        plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
        out = torch.full_like(forest.q, NAN)
        lse = torch.full(forest.q.shape[:2], NAN, device=cuda)
        arrays = (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)
        torch.ops.flashinfer_ops.cascade_attention.portable(
            forest.q, forest.cache[:, 0], forest.cache[:, 1], *arrays, plan.schedule, causal,
            plan.sm_scale, 1.0, out, lse,
        )  # fmt: skip
        check_attention((out, lse), forest, causal)


def test_rows_that_are_not_aligned(cuda: str) -> None:
    """Strides of no whole 16 bytes, which bulk copies and 16-byte loads cannot follow."""
    forest = random_forest(
        12, num_levels=2, num_requests=9, num_qo_heads=4, head_dim=64, max_kv_len=200, dtype=HALF,
        device=cuda,
    )  # fmt: skip
    wide = torch.full((*forest.cache.shape[:-1], 65), NAN, dtype=HALF, device=cuda)
    wide[..., :64] = forest.cache
    check_attention(attend(forest, cache=wide[..., :64]), forest)


@pytest.mark.parametrize("num_requests", [20, 200, 700, 1100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_merges_of_few_and_many_rows(cuda: str, num_requests: int, head_dim: int) -> None:
    """Five heads, so that no group of heads that is merged together is full."""
    lengths = [1 + 37 * i % 90 for i in range(num_requests)]
    forest = forest_of(
        [[num_requests], [1] * num_requests], [[400], lengths], num_qo_heads=5, num_kv_heads=1,
        head_dim=head_dim, dtype=HALF, device=cuda, extra_rows=3,
    )  # fmt: skip
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    assert int(plan.schedule[5]) > 0  # rows of partial states
    check_attention(cascade_attention(forest.q, forest.cache, plan), forest)


@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 100, 1000])
def test_kv_of_half_a_tile(cuda: str, prefix: int, causal: bool, page_size: int) -> None:
    """Tiles of 128 packed rows, of which most blocks of KV are seen by the first or second 64."""
    rows = [1 + i % 3 for i in range(60)]
    for lengths in (
        [64] * 60,
        [128 + 64 * (i % 3) for i in range(60)],
        [200 - i for i in range(60)],
    ):
        forest = forest_of(
            [[sum(rows)], rows], [[prefix], lengths], num_qo_heads=16, head_dim=128, dtype=HALF,
            page_size=page_size, device=cuda, extra_rows=2,
        )  # fmt: skip
        check_attention(attend(forest, causal=causal), forest, causal)


@pytest.mark.parametrize("num_qo_heads", [4, 16, 320])
def test_fewer_rows_than_planned(cuda: str, num_qo_heads: int) -> None:
    forest = forest_of(
        [[90], [1] * 90], [[1500], [70] * 90], num_qo_heads=num_qo_heads, head_dim=128, dtype=HALF,
        device=cuda,
    )  # fmt: skip
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    expected, expected_lse = forest.oracle(device=cuda)
    for count in (1, 7, 33, 64):
        out, lse = cascade_attention(forest.q[:count], forest.cache, plan)
        assert relative_error(out, expected[:count]) < TOLERANCE[HALF]
        assert_lse_close(lse, expected_lse[:count], LSE_TOLERANCE[HALF])
