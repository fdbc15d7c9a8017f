"""Plans: the CPU schedule covers every (row, visible token) once; capacities; planning again."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gpu_schedule import check as check_gpu_schedule
from gpu_schedule import check_is_hosts, tables
from helpers import Forest, int32, random_forest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import CascadePlan, plan_cascade
from flashinfer_ops.meta.plan import BASE_TILES, EXTRA_UNITS, HEADER_WORDS, schedule_size

ops = torch.ops.flashinfer_ops
NO_DIAGONAL = 1 << 30


class Schedule:
    """The tables of csrc/cpu/schedule.h."""

    def __init__(self, words: Tensor) -> None:
        array = words.numpy()
        (self.num_tokens, tiles, units, segments, self.num_partial_rows, tile_at, unit_at,
         segment_at) = array[:8].tolist()  # fmt: skip
        self.tiles = array[tile_at : tile_at + 4 * tiles].reshape(tiles, 4)
        self.units = array[unit_at : unit_at + 4 * units].reshape(units, 4)
        self.segments = array[segment_at : segment_at + 8 * segments].reshape(segments, 8)
        assert HEADER_WORDS <= tile_at <= unit_at <= segment_at
        assert segment_at + 8 * segments <= len(array)


def visible(plan: CascadePlan) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For each (row, level) that sees any: where its group's pages start, and how many tokens."""
    result = {}
    for level, qo in enumerate(plan.qo_indptr):
        kv, last = plan.kv_indptr[level].tolist(), plan.kv_last_page_len[level].tolist()
        borders = qo.tolist()
        for group, (begin, end) in enumerate(pairwise(borders)):
            pages = kv[group + 1] - kv[group]
            length = (pages - 1) * plan.page_size + last[group] if pages else 0
            for row in range(begin, end):
                diagonal = plan.causal and level + 1 == len(plan.qo_indptr)
                tokens = length - (end - 1 - row) if diagonal else length
                if tokens > 0:
                    result[row, level] = (kv[group], tokens)
    return result


def check_schedule(plan: CascadePlan) -> Schedule:
    schedule = Schedule(plan.schedule)
    assert schedule.num_tokens == max(int(t[-1]) for t in plan.qo_indptr)
    next_row = next_unit = next_segment = next_partial = 0
    covered: dict[tuple[int, int], Any] = {}
    for i, (row_begin, row_end, unit_begin, unit_end) in enumerate(schedule.tiles.tolist()):
        assert (row_begin, unit_begin) == (next_row, next_unit)
        assert row_begin < row_end and unit_begin <= unit_end
        next_row, next_unit = row_end, unit_end
        for unit in schedule.units[unit_begin:unit_end].tolist():
            tile, segment_begin, segment_end, partial_row = unit
            assert tile == i and segment_begin == next_segment < segment_end
            next_segment = segment_end
            if unit_end - unit_begin == 1:
                assert partial_row == -1
            else:
                assert partial_row == next_partial
                next_partial += row_end - row_begin
            for segment in schedule.segments[segment_begin:segment_end].tolist():
                level, page_begin, kv_begin, kv_end, begin, end, diagonal, _ = segment
                assert row_begin <= begin < end <= row_end and 0 <= kv_begin < kv_end
                for row in range(begin, end):
                    stop = min(kv_end, row + diagonal + 1)
                    where = covered.setdefault((row, level), (page_begin, Counter()))
                    assert where[0] == page_begin
                    where[1].update(range(kv_begin, stop))
    assert next_row == schedule.num_tokens and next_unit == len(schedule.units)
    assert next_segment == len(schedule.segments) and next_partial == schedule.num_partial_rows
    wanted = visible(plan)
    got = {at: where for at, where in covered.items() if where[1]}
    assert got.keys() == wanted.keys()
    for at, (page_begin, tokens) in wanted.items():
        assert got[at] == (page_begin, Counter(range(tokens)))
    return schedule


def live(schedule: Tensor, groups: list[int]) -> Any:
    """What a schedule says: on a GPU without the planner's work space and the tables' free ends."""
    return schedule.tolist() if schedule.device.type == "cpu" else tables(schedule, groups)


def plan_of(forest: Forest, **options: Any) -> CascadePlan:
    return plan_cascade(*forest.arrays, **{**forest.numbers, **options})


@given(
    seed=st.integers(0, 10**6),
    num_levels=st.integers(1, 16),
    num_requests=st.integers(1, 60),
    max_qo_len=st.sampled_from([1, 2, 40]),
    heads=st.sampled_from([(1, 1), (8, 1), (14, 2), (32, 32)]),
    page_size=st.sampled_from([1, 3, 16]),
    causal=st.booleans(),
    nested=st.booleans(),
)
def test_every_token_once(seed: int, heads: tuple[int, int], causal: bool, **options: Any) -> None:
    forest = random_forest(
        seed, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=2, **options
    )
    check_schedule(plan_of(forest, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_long_kv_is_cut(causal: bool) -> None:
    """A few rows over much KV: several units a tile, whose partial states are merged."""
    forest = random_forest(
        3, num_levels=3, num_requests=4, max_qo_len=9, max_kv_len=9000, head_dim=2
    )
    schedule = check_schedule(plan_of(forest, causal=causal))
    assert len(schedule.units) > len(schedule.tiles) and schedule.num_partial_rows > 0


def test_many_rows_fill_the_tables() -> None:
    """More rows than tiles at the preferred size: larger tiles, the capacity holds."""
    n = 40000
    plan = plan_cascade(
        [int32(0, n)], [int32(0, 1)], [int32(0)], [int32(3)],
        num_qo_heads=64, num_kv_heads=1, head_dim=2, page_size=16,
    )  # fmt: skip
    schedule = Schedule(plan.schedule)
    assert len(schedule.tiles) <= BASE_TILES + 4
    rows = [np.arange(begin, end) for begin, end, _, _ in schedule.tiles]
    assert np.array_equal(np.concatenate(rows), np.arange(n))
    assert schedule.segments[:, 4].tolist() == schedule.tiles[:, 0].tolist()


def test_empty_batches() -> None:
    for borders in ([int32(0)], [int32(0, 0, 0)]):
        groups = borders[0].shape[0] - 1
        plan = plan_cascade(
            borders, [torch.zeros_like(borders[0])], [int32()], [int32(*[9] * groups)],
            num_qo_heads=2, num_kv_heads=1, head_dim=8, page_size=4,
        )  # fmt: skip
        schedule = check_schedule(plan)
        assert len(schedule.tiles) == schedule.num_tokens == 0


def test_capacities(device: str) -> None:
    """Buffers of a power of two with empty groups behind; the schedule's size follows from them."""
    forest = random_forest(1, num_levels=2, num_requests=11, device=device)
    plan = plan_of(forest)
    for level in range(2):
        for buffers, arrays, extra in (
            (plan.qo_indptr, forest.qo_indptr, 1),
            (plan.kv_indptr, forest.kv_indptr, 1),
            (plan.kv_indices, forest.kv_indices, 0),
            (plan.kv_last_page_len, forest.kv_last_page_len, 0),
        ):
            buffer, array = buffers[level], arrays[level]
            capacity = buffer.shape[0] - extra
            assert capacity >= 4 and capacity & (capacity - 1) == 0
            assert array.shape[0] <= buffer.shape[0] < 2 * max(4, array.shape[0]) + extra
            assert torch.equal(buffer[: len(array)], array)
            assert bool((buffer[len(array) :] == (array[-1] if extra else 0)).all())
    assert plan.qo_indptr[1].shape[0] == 17
    groups = [t.shape[0] - 1 for t in plan.kv_indptr]
    assert plan.schedule.shape == (schedule_size(groups, plan.schedule.device),)
    assert plan.schedule.dtype == torch.int32 and plan.schedule.device.type == device
    tiles = BASE_TILES + groups[-1]
    segments = sum(groups) + 2 * tiles + EXTRA_UNITS
    expected = HEADER_WORDS + 4 * tiles + 4 * (tiles + EXTRA_UNITS) + 8 * segments
    assert schedule_size(groups, torch.device("cpu")) == expected
    assert plan.sm_scale == 64**-0.5 and plan.max_tokens is None and plan.causal is False


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_every_token_once_on_a_gpu(cuda: str, seed: int) -> None:
    """The tables that the GPU's planner leaves on the GPU, its memory holding old ones or none."""
    causal = seed % 2 == 0
    forest = random_forest(
        seed, num_levels=1 + seed % 7, num_requests=[1, 9, 70][seed % 3], nested=seed % 5 > 0,
        max_qo_len=[1, 40][seed % 4 // 2], max_kv_len=[70, 700][seed % 4 // 2],
        num_qo_heads=[4, 7, 32][seed % 3], num_kv_heads=1, head_dim=2, device=cuda,
    )  # fmt: skip
    plan = plan_of(forest, causal=causal)
    arrays = plan.qo_indptr, plan.kv_indptr, plan.kv_last_page_len
    on_cpu = [[t.cpu() for t in level] for level in arrays]
    packed = torch.cuda.get_device_capability() == (9, 0)
    check_gpu_schedule(plan.schedule.cpu(), *on_cpu, forest.page_size, causal, packed)
    plan.schedule.fill_(-1)
    plan_of(forest, causal=causal, out=plan)
    check_gpu_schedule(plan.schedule.cpu(), *on_cpu, forest.page_size, causal, packed)
    check_is_hosts(plan.schedule, on_cpu, (plan.num_qo_heads, 1), plan.page_size, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_plan_again(device: str, causal: bool) -> None:
    """`out` gets the bits that a plan of its own has, stays where it was, and is returned."""
    options = {"num_levels": 3, "max_qo_len": 5, "device": device}
    plan = plan_of(random_forest(0, num_requests=32, **options), causal=causal)
    tensors = [*plan.qo_indptr, *plan.kv_indptr, *plan.kv_last_page_len, plan.schedule]
    addresses = [t.data_ptr() for t in tensors]
    groups, planned = [t.shape[0] - 1 for t in plan.kv_indptr], 0
    for seed in range(1, 9):
        forest = random_forest(seed, num_requests=[32, 1, 20][seed % 3], **options)
        for array, buffer in zip(forest.kv_indptr, plan.kv_indptr, strict=True):
            assert array.shape[0] <= buffer.shape[0]
        if not all(a.shape[0] <= b.shape[0]
                   for a, b in zip(forest.kv_indices, plan.kv_indices, strict=True)):  # fmt: skip
            continue
        assert plan_of(forest, causal=causal, out=plan) is plan
        planned += 1
        assert [t.data_ptr() for t in tensors] == addresses
        shape = (*list(forest.numbers.values()), causal)
        arguments = (plan.qo_indptr, plan.kv_indptr, plan.kv_last_page_len, *shape)
        fresh = ops.cascade_plan.default(*arguments)
        wanted = live(fresh, groups)
        assert live(plan.schedule, groups) == wanted
        assert live(ops.cascade_plan.default(*arguments), groups) == wanted  # the same bits again
        # The batch's own arrays may be the plan's own buffers.
        again = plan_cascade(
            plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len,
            **forest.numbers, causal=causal, out=plan,
        )  # fmt: skip
        assert again is plan and live(plan.schedule, groups) == wanted
    assert planned > 3


@pytest.mark.parametrize("change", ["num_qo_heads", "page_size", "causal", "num_kv_heads"])
def test_every_number_reaches_the_planner(device: str, change: str) -> None:
    """TORCH_BOX does not check types: a number that got lost would change nothing."""
    forest = random_forest(
        7, num_levels=2, num_requests=30, max_qo_len=30, max_kv_len=300, device=device
    )
    groups = [t.shape[0] - 1 for t in forest.kv_indptr]
    arguments = (
        forest.qo_indptr,
        forest.kv_indptr,
        [t.clamp(max=8) for t in forest.kv_last_page_len],
    )
    numbers = {"num_qo_heads": 8, "num_kv_heads": 8, "head_dim": 64, "page_size": 16,
               "causal": False}  # fmt: skip
    base = ops.cascade_plan.default(*arguments, *numbers.values())
    other = {"num_qo_heads": 64, "num_kv_heads": 1, "page_size": 8, "causal": True}
    numbers[change] = other[change]
    changed = ops.cascade_plan.default(*arguments, *numbers.values())
    assert live(changed, groups) != live(base, groups)


@pytest.mark.parametrize("num_requests", [1, 12])
@pytest.mark.parametrize("layout", ["exact", "capacity", "empty"])
def test_opcheck(device: str, num_requests: int, layout: str) -> None:
    forest = random_forest(5, num_levels=2, num_requests=num_requests, device=device)
    arrays: Any = (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len)
    if layout == "capacity":
        plan = plan_of(forest)
        arrays = (plan.qo_indptr, plan.kv_indptr, plan.kv_last_page_len)
    if layout == "empty":
        arrays = ([int32(0, device=device)], [int32(0, device=device)], [int32(device=device)])
    arguments = (*arrays, 4, 2, 64, 16, True)
    # On a GPU the schedule's unused words are left as they were: they differ from call to call, so
    # that the compiled operator's whole output cannot be compared.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils += ["test_aot_dispatch_dynamic"] if device == "cpu" else []
    results = torch.library.opcheck(ops.cascade_plan.default, arguments, test_utils=utils)
    compiled = torch.compile(
        ops.cascade_plan.default, backend="aot_eager", fullgraph=True, dynamic=True
    )
    groups = [t.shape[0] - 1 for t in arrays[1]]
    eager = live(ops.cascade_plan.default(*arguments), groups)
    assert live(compiled(*arguments), groups) == eager
    schedule = torch.zeros_like(ops.cascade_plan.default(*arguments))
    results_out = torch.library.opcheck(ops.cascade_plan.out, (*arguments, schedule))
    assert set(results.values()) | set(results_out.values()) == {"SUCCESS"}


def test_refusals(device: str) -> None:
    forest = random_forest(2, num_levels=2, num_requests=5, device=device)
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    good = {**dict(zip(names, forest.arrays, strict=True)), **forest.numbers}
    plan = plan_cascade(**good)
    before = plan.schedule.clone()
    for changes, error, message in [
        ({"qo_indptr": forest.qo_indptr[0]}, TypeError, r"qo_indptr is a Tensor, expected a list"),
        ({"qo_indptr": []}, ValueError, r"qo_indptr has 0 levels"),
        ({"kv_indices": forest.kv_indices[:1]}, ValueError, r"kv_indices has 1 levels"),
        ({n: good[n] * 9 for n in names}, ValueError, r"qo_indptr has 18 levels .* 1 to 16"),
        (
            {"kv_indptr": [t.long() for t in forest.kv_indptr]},
            ValueError,
            r"kv_indptr\[0\] has dtype",
        ),
        (
            {"kv_indptr": [t.tolist() for t in forest.kv_indptr]},
            TypeError,
            r"kv_indptr\[0\] is a list",
        ),
        (
            {"kv_indptr": [t[1:] for t in forest.kv_indptr]},
            ValueError,
            r"kv_indptr\[0\] has \d+ el",
        ),
        ({"kv_last_page_len": forest.kv_indptr}, ValueError, r"kv_last_page_len\[0\] has"),
        ({"qo_indptr": [t[:0] for t in forest.qo_indptr]}, ValueError, r"qo_indptr\[0\] is empty"),
        ({"num_qo_heads": 0}, ValueError, r"num_qo_heads is 0, expected 1 or more"),
        ({"num_qo_heads": 5}, ValueError, r"num_qo_heads is 5, expected a multiple"),
        ({"num_kv_heads": 2.0}, TypeError, r"num_kv_heads is a float, expected an int"),
        ({"head_dim": -1}, ValueError, r"head_dim is -1"),
        ({"page_size": True}, TypeError, r"page_size is a bool"),
        ({"max_tokens": -1}, ValueError, r"max_tokens is -1"),
        ({"out": 3}, TypeError, r"out is a int, expected a CascadePlan"),
        ({"out": plan, "page_size": 8}, ValueError, r"page_size is 8, expected 16 as in out"),
        ({"out": plan, "causal": True}, ValueError, r"causal is True, expected False as in out"),
    ]:
        with pytest.raises(error, match=message):
            plan_cascade(**{**good, **changes})
    large = random_forest(1, num_levels=2, num_requests=50, device=device)
    with pytest.raises(
        ValueError, match=r"has \d+ elements, expected at most \d+, the capacity of out"
    ):
        plan_of(large, out=plan)
    assert torch.equal(plan.schedule, before)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("qo_indptr", (0, 3, 2), r"qo_indptr\[0\] must not decrease, but goes from 3 to 2"),
        ("qo_indptr", (-1, 0, 2), r"qo_indptr\[0\] starts at -1"),
        ("kv_indptr", (0, 2, 1), r"kv_indptr\[0\] must not decrease"),
        ("kv_last_page_len", (17, 1), r"kv_last_page_len\[0\]\[0\] is 17, expected 0 to page_size"),
        ("kv_last_page_len", (1, -1), r"kv_last_page_len\[0\]\[1\] is -1"),
    ],
)
def test_bad_contents_raise_on_the_cpu(name: str, value: tuple[int, ...], message: str) -> None:
    arrays = {
        "qo_indptr": [int32(0, 1, 2)],
        "kv_indptr": [int32(0, 1, 2)],
        "kv_indices": [int32(0, 1)],
        "kv_last_page_len": [int32(3, 4)],
    }
    numbers = {"num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 16}
    plan = flashinfer_ops.plan_cascade(**arrays, **numbers)
    check_schedule(plan)
    bad = {**arrays, name: [int32(*value)]}
    with pytest.raises(RuntimeError, match=message):
        flashinfer_ops.plan_cascade(**bad, **numbers)
    held = [*plan.qo_indptr, *plan.kv_indptr, *plan.kv_last_page_len, plan.schedule]
    before = [t.clone() for t in held]
    with pytest.raises(RuntimeError, match=message):
        flashinfer_ops.plan_cascade(**bad, **numbers, out=plan)
    assert all(map(torch.equal, held, before))
    with pytest.raises(RuntimeError, match="page_size is .*, expected 1 or more, below 2"):
        flashinfer_ops.plan_cascade(**arrays, **{**numbers, "page_size": 1 << 40})


def test_plan_of_inference_mode_outside_of_it(device: str) -> None:
    forest = random_forest(3, num_levels=2, num_requests=5, device=device)
    with torch.inference_mode():
        plan = plan_of(forest)
    assert not any(t.is_inference() for t in [plan.schedule, *plan.qo_indptr, *plan.kv_indices])
    assert plan_of(forest, out=plan) is plan
    with torch.inference_mode():
        assert plan_of(forest, out=plan) is plan
