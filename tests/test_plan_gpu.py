"""The GPU's planner, run on the host: schedules of both classes over random forests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from gpu_schedule import check, check_is_hosts, check_lists, plan_on_host, tables
from helpers import Forest, forest_of, int32, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashinfer_ops import native
from flashinfer_ops.meta.plan import gpu_schedule

TREE = [[1024 >> level] * (1 << level) for level in range(8)] + [[1] * 1024]
HEADS = [(4, 4), (8, 2), (8, 1), (6, 2), (7, 1), (32, 1), (200, 1)]


def checked(forest: Forest, causal: bool = False, packed: bool = False, **options: Any) -> Any:
    arrays = forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len
    heads = forest.q.shape[1], forest.cache.shape[3]
    schedule = plan_on_host(*arrays, *heads, forest.page_size, causal, packed=packed, **options)
    num_ctas = options.get("num_sms", 132) if packed else 0
    t = check(schedule, *arrays, forest.page_size, causal, packed, num_ctas)
    if packed:
        check_lists(t, heads[1], heads[0] // heads[1])
    return t


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_levels=st.sampled_from([1, 2, 3, 9, 16]),
    num_requests=st.sampled_from([1, 5, 30, 70]),
    heads=st.sampled_from(HEADS),
    page_size=st.sampled_from([1, 5, 16]),
    max_kv_len=st.sampled_from([20, 70, 300]),
    max_qo_len=st.sampled_from([1, 3, 7, 40]),
    nested=st.booleans(),
    causal=st.booleans(),
    packed=st.booleans(),
    num_sms=st.sampled_from([2, 132]),
    fast_bytes=st.sampled_from([0, 1000, 160 * 1024]),
)
def test_each_pair_once(
    seed: int,
    heads: tuple[int, int],
    causal: bool,
    packed: bool,
    num_sms: int,
    fast_bytes: int,
    **options: Any,
) -> None:
    forest = random_forest(
        seed, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=1, **options
    )
    t = checked(forest, causal, packed, num_sms=num_sms, fast_bytes=fast_bytes)
    # The planner's own arrays may lie anywhere.
    assert t == checked(forest, causal, packed, num_sms=num_sms)
    # And a cluster shares the work out.
    for num_blocks in (2, 5):
        assert t == checked(forest, causal, packed, num_sms=num_sms, num_blocks=num_blocks)


@pytest.mark.parametrize("page_size,root,suffix", [(5, 500, 70), (16, 512, 80)])
def test_packed_blocks_hold_ends_and_heads_of_segments(
    page_size: int, root: int, suffix: int
) -> None:
    """Short suffixes under a root: no granules, and units that begin amid the walk's segments,
    which take a multiple of 16 tokens where pages hold one."""
    forest = forest_of(
        [[8], [1] * 8], [[500], [70] * 8], num_qo_heads=4, num_kv_heads=1, page_size=page_size
    )
    t = checked(forest, packed=True)
    assert not t.granules and len(t.segments) == 9
    assert [s[7] for s in t.segments] == [0, *range(root, root + 8 * suffix, suffix)]
    assert sum(u[15] for u in t.matrix_units) == root + 8 * suffix
    assert any(u[7] > 0 and u[5] > 0 for u in t.matrix_units)
    plain = checked(forest)
    assert [s[7] for s in plain.segments] == [0, *range(512, 512 + 8 * 128, 128)]


def order_of_levels(
    prefix: int,
    suffix: int,
    qo_len: int = 1,
    page_size: int = 16,
    num_kv_heads: int = 1,
    num_sms: int = 4,
    causal: bool = False,
) -> list[list[int]]:
    """Of 4 tiles of 16 query tokens: the levels of their walks' segments."""
    requests = 64 // qo_len
    forest = forest_of(
        [[64], [qo_len] * requests], [[prefix], [suffix] * requests], head_dim=1,
        num_qo_heads=8 * num_kv_heads, num_kv_heads=num_kv_heads, page_size=page_size,
    )  # fmt: skip
    t = checked(forest, causal, packed=True, num_sms=num_sms)
    assert t == checked(forest, causal, packed=True, num_sms=num_sms, num_blocks=3)
    assert t.num_tiles == 4
    walks = []
    for tile in t.tiles:
        units = [u for u in t.matrix_units if u[0] == tile[0]]
        walks.append([s[0] for s in t.segments[units[0][5] : units[-1][6]]])
    return walks


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("qo_len, suffix", [(1, 48), (1, 61), (4, 200), (16, 800)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_other_tile_walks_last_what_all_share(
    page_size: int, qo_len: int, suffix: int, causal: bool
) -> None:
    walks = order_of_levels(1024, suffix, qo_len=qo_len, page_size=page_size, causal=causal)
    own = [1] * (16 // qo_len)
    assert walks == [[0, *own], [*own, 0]] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": 1000},  # a short one
        {"suffix": 32},  # little else
        {"prefix": 8192},  # less than a fifth
        {"prefix": 4112, "suffix": 80, "num_kv_heads": 16, "num_sms": 64},  # more than is cached
        {"num_sms": 132},  # walks that are cut, or that leave SMs without work
        {"num_sms": 3},
    ],
)
def test_what_all_share_comes_first(options: dict[str, int]) -> None:
    walks = order_of_levels(**{"prefix": 1024, "suffix": 50, **options})
    assert all(walk == [0] + [1] * 16 for walk in walks)


def test_own_pieces_are_one_unit_of_rows() -> None:
    """16 query tokens with 4 heads a KV head: 64 packed rows, which one stream unit has."""
    forest = forest_of([[64], [16] * 4], [[3000], [2000] * 4], num_qo_heads=4, num_kv_heads=1)
    t = checked(forest, packed=True)
    assert t.stream_tokens == 16 and len(t.own) == 4
    assert {u[1] - u[0] for u in t.stream_units} == {16}


@pytest.mark.parametrize("prefix", [512, 4096])
def test_some_sms_read_while_others_compute(prefix: int) -> None:
    """Own pieces beside tiles of many rows: each SM with matrix units has as many as the others,
    or one less, and the rest begin with no more stream units than there are."""
    heads, sms = 2, 132
    forest = forest_of(
        [[128], [1] * 128], [[prefix], [600] * 128], num_qo_heads=4 * heads, num_kv_heads=heads,
        head_dim=8,
    )  # fmt: skip
    t = checked(forest, packed=True)
    items, matrix_ctas = len(t.matrix_units) * heads, num_pair_lists(t)
    assert 0 < matrix_ctas < sms and items >= matrix_ctas
    ahead = {words[21] for lists in t.lists[1:] for words in lists[matrix_ctas:]}
    assert len(ahead) == 1 and max(ahead) <= len(t.stream_units) * heads
    assert max(ahead) > 0 or prefix < 4096
    # What is left goes on at the first CTA that has a pair item less.
    first_free = items % matrix_ctas or matrix_ctas
    assert [cta for cta in range(sms) if t.lists[1][cta][22] == max(ahead)] == [first_free]
    alone = checked(forest_of([[128]], [[prefix]], num_qo_heads=8, head_dim=8), packed=True)
    assert num_pair_lists(alone) == min(alone.lists[0][0][24], sms)
    assert all(words[21] == 0 for lists in alone.lists[1:] for words in lists)


def num_pair_lists(t: Any) -> int:
    return sum(words[19] < words[24] for words in t.lists[0])


def test_the_longest_tile_is_no_longer_than_a_tile() -> None:
    """So many groups that the capacity allows tiles of several tokens, though none has more."""
    forest = forest_of([[1] * 600], [[20] * 600], num_qo_heads=128, num_kv_heads=1, head_dim=8)
    assert checked(forest, packed=True).tile_tokens == 1


@pytest.mark.parametrize("num_tokens, tokens, tiles", [(8000, 32, 250), (8200, 64, 129)])
@pytest.mark.parametrize("requests", [1, 2])
def test_tiles_of_more_than_128_packed_rows_have_a_multiple(
    num_tokens: int, tokens: int, tiles: int, requests: int
) -> None:
    rows = int32(0, num_tokens) if requests == 1 else int32(0, num_tokens // 2, num_tokens)
    pages = torch.arange(requests + 1, dtype=torch.int32)
    arrays = [rows], [pages], [torch.full((requests,), 16, dtype=torch.int32)]
    schedule = plan_on_host(*arrays, 4, 1, 16, True, packed=True)
    t = tables(schedule, [requests])
    assert t.tile_tokens <= tokens and t.num_tiles in (tiles, tiles + requests - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_walks_whose_states_have_no_room_are_not_cut(packed: bool) -> None:
    """Many rows over much KV leave the SMs idle, but cut walks have too many states."""
    arrays = [int32(0, 4000)], [int32(0, 2000)], [int32(16)]
    t = tables(plan_on_host(*arrays, 1, 1, 16, False, packed=packed), [1])
    assert len(t.matrix_units) == t.num_tiles == 32 and t.num_partial_rows == 0
    few = [int32(0, 40)], *arrays[1:]
    t = tables(plan_on_host(*few, 1, 1, 16, False, packed=packed), [1])
    assert len(t.matrix_units) > t.num_tiles == 1 and t.num_partial_rows > 0


def test_granules_that_have_no_room_are_segments() -> None:
    """More groups on an upper level than on the last: 3 granules each, where 2 have room."""
    n = 5000
    upper = torch.arange(n + 1, dtype=torch.int32)
    arrays = [upper, int32(0, n)], [3 * upper, int32(0, 1)], [int32(*[8] * n), int32(16)]
    schedule = plan_on_host(*arrays, 1, 1, 16, False)
    t = check(schedule, *arrays, 16, False)
    assert not t.granules and len(t.segments) == n + t.num_tiles


@pytest.mark.parametrize(
    "level",
    [
        ([0, 3, 2], [0, 1, 2], [1, 1]),
        ([-1, 3, 4], [0, 1, 2], [1, 1]),
        ([0, 1, (1 << 31) - 1], [0, 1, 2], [1, 1]),
        ([0, 1, 2], [0, 1, (1 << 31) - 1], [1, 1]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_impossible_arrays_plan_nothing(level: tuple[list[int], ...], packed: bool) -> None:
    arrays = [[torch.tensor(x, dtype=torch.int32)] for x in level]
    schedule = plan_on_host(*arrays, 4, 1, 16, False, packed=packed)
    assert schedule[:6].tolist() == [0] * 6


Arrays = tuple[list[Tensor], list[Tensor], list[Tensor]]


def draw_anything(seed: int) -> Arrays:
    """Index arrays of anything, half of them with rows in order."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 41, (1 + seed % 4,), generator=g).tolist()

    def draw(n: int) -> Tensor:
        small = torch.randint(-5, 300, (n,), generator=g)
        large = torch.randint(-(1 << 31), 1 << 31, (n,), generator=g)
        return torch.where(torch.rand(n, generator=g) < 0.8, small, large).int()

    rows = [draw(n + 1) for n in groups]
    if seed % 2:
        rows = [t.clamp(0, 5000).sort().values for t in rows]
    return rows, [draw(n + 1) for n in groups], [draw(n) for n in groups]


@pytest.mark.parametrize("seed", range(40))
def test_any_contents_give_one_plan(seed: int) -> None:
    """The same tables, and no more of them than there is room for, wherever the planner's own
    arrays lie."""
    arrays, heads = draw_anything(seed), HEADS[seed % len(HEADS)]
    options = {"causal": seed % 3 == 0, "packed": seed % 8 < 4}
    first, *others = (
        plan_on_host(*arrays, *heads, 16, fast_bytes=size, num_blocks=blocks, **options)
        for size, blocks in ((0, 1), (1 << 20, 1), (1 << 20, 3), (4000, 8))
    )
    groups = [t.shape[0] for t in arrays[2]]
    layout = gpu_schedule(tuple(groups))
    for other in others:
        assert torch.equal(first[: layout.work_at], other[: layout.work_at])
    t = tables(first, groups)
    assert t.num_tokens == 0 or seed % 2
    assert t.num_partial_rows <= layout.partial_rows


@pytest.fixture(params=[(1, 1 << 20), (0, 1 << 20), (1, 1000), (0, 1000)])
def planner(cuda: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The device, whose planner may be a cluster or not, with room in shared memory or little."""
    limit = native.load("_C_cuda").flashinfer_ops_limit_planner
    limit(*map(ctypes.c_int32, request.param))
    yield cuda
    limit(ctypes.c_int32(1), ctypes.c_int32((1 << 31) - 1))


def check_on_gpu(
    arrays: Arrays, heads: tuple[int, int], page_size: int, causal: bool, device: str
) -> None:
    """The GPU's plan is the host's."""
    on_gpu = [[t.to(device) for t in array] for array in arrays]
    schedule = torch.ops.flashinfer_ops.cascade_plan.default(
        *on_gpu, *heads, 128, page_size, causal
    )
    check_is_hosts(schedule, arrays, heads, page_size, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_a_gpu_plans_any_contents(planner: str, seed: int) -> None:
    check_on_gpu(draw_anything(seed), HEADS[seed % len(HEADS)], 16, seed % 3 == 0, planner)


CROWDED = [1, 7, 11, 31]


def draw_crowded(seed: int) -> tuple[Arrays, tuple[int, int]]:
    """Forests whose states, as first chosen, have no room: planned two to four times on the way."""
    heads = HEADS[seed % len(HEADS)]
    forest = random_forest(
        seed,
        num_levels=[2, 3, 9, 16][seed % 4],
        num_requests=[30, 70, 300][seed % 3],
        max_kv_len=3000,
        max_qo_len=[1, 40, 200][seed % 3],
        nested=False,
        page_size=16,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=1,
    )
    return (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len), heads


@pytest.mark.parametrize("seed", CROWDED)
def test_a_cluster_plans_again_for_want_of_room(seed: int) -> None:
    arrays, heads = draw_crowded(seed)
    one, three = (
        plan_on_host(*arrays, *heads, 16, False, packed=True, num_blocks=n) for n in (1, 3)
    )
    end = gpu_schedule(tuple(t.shape[0] for t in arrays[2])).work_at
    assert torch.equal(one[:end], three[:end])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", CROWDED)
def test_a_gpu_plans_again_for_want_of_room(planner: str, seed: int) -> None:
    arrays, heads = draw_crowded(seed)
    check_on_gpu(arrays, heads, 16, False, planner)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, lengths",
    [
        ([[20000], [1] * 20000], [[300], [40] * 20000]),  # no room in shared memory
        ([[300], [1] * 300], [[500], [900] * 300]),
        (TREE, [[16] * len(level) for level in TREE]),
        ([[6000], [500] * 12], [[1000], [700] * 12]),
        ([[8], [1] * 8], [[512], [64] * 8]),
        ([[40]], [[32000]]),
        ([[256], [1] * 256], [[4096], [512] * 256]),
        ([[20] * 20] * 16, [[1 << 25] * 20] * 16),  # walks beyond what sums may come to
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_plans_what_the_host_does(
    planner: str, rows: list[list[int]], lengths: list[list[int]], causal: bool
) -> None:
    arrays: Arrays = ([], [], [])
    for level_rows, level_lengths in zip(rows, lengths, strict=True):
        pages = [(n + 15) // 16 for n in level_lengths]
        arrays[0].append(int32(0, *accumulate(level_rows)))
        arrays[1].append(int32(0, *accumulate(pages)))
        arrays[2].append(int32(*[(n - 1) % 16 + 1 for n in level_lengths]))
    check_on_gpu(arrays, (32, 8), 16, causal, planner)
