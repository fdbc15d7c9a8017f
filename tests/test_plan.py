"""The planner: what a schedule must hold, capacities, planning again into the same memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Forest, int32, random_forest
from hypothesis import given
from hypothesis import strategies as st

import flashinfer_ops
from flashinfer_ops.meta.plan import HEADER_WORDS, schedule_size

ops = torch.ops.flashinfer_ops
NO_DIAGONAL = 1 << 30


def tables(schedule: torch.Tensor) -> tuple[list[int], Any, Any, Any]:
    """Header, tiles, units and segments of a schedule, as `csrc/cpu/schedule.h` lays them out."""
    words = schedule.tolist()
    header = words[:HEADER_WORDS]
    num_tiles, num_units, num_segments = header[1:4]

    def table(offset: int, rows: int, width: int) -> list[list[int]]:
        return [words[offset + i * width : offset + (i + 1) * width] for i in range(rows)]

    return (
        header,
        table(header[5], num_tiles, 4),
        table(header[6], num_units, 4),
        table(header[7], num_segments, 8),
    )


def check_schedule(forest: Forest, plan: flashinfer_ops.CascadePlan, causal: bool) -> None:
    """Each query row meets each KV token that it sees exactly once, and no other."""
    header, tiles, units, segments = tables(plan.schedule)
    num_tokens = max(int(t[-1]) for t in forest.qo_indptr)
    assert header[0] == num_tokens
    assert [t[0] for t in tiles] == [0, *[t[1] for t in tiles]][: len(tiles)]
    assert not tiles or tiles[-1][1] == num_tokens
    # Tiles own consecutive units, units consecutive segments.
    next_unit = next_segment = partial_rows = 0
    met: Counter[tuple[int, int, int, int]] = Counter()  # row, level, first page, token
    for tile, (row_begin, row_end, unit_begin, unit_end) in enumerate(tiles):
        assert unit_begin == next_unit and unit_end >= unit_begin
        next_unit = unit_end
        for unit_tile, segment_begin, segment_end, partial_row in units[unit_begin:unit_end]:
            assert unit_tile == tile and segment_begin == next_segment < segment_end
            next_segment = segment_end
            if unit_end - unit_begin == 1:
                assert partial_row == -1
            else:
                assert partial_row == partial_rows
                partial_rows += row_end - row_begin
            for level, page_begin, kv0, kv1, row0, row1, diagonal, _ in segments[
                segment_begin:segment_end
            ]:
                assert row_begin <= row0 < row1 <= row_end and 0 <= kv0 < kv1
                for row in range(row0, row1):
                    last = kv1 if diagonal == NO_DIAGONAL else min(kv1, row + diagonal + 1)
                    for token in range(kv0, last):
                        met[row, level, page_begin, token] += 1
    assert next_unit == len(units) and next_segment == len(segments)
    assert partial_rows == header[4]

    wanted: Counter[tuple[int, int, int, int]] = Counter()
    for level, (qo, kv, last_page_len) in enumerate(
        zip(forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len, strict=True)
    ):
        lens = flashinfer_ops.get_seq_lens(kv, last_page_len, forest.page_size).tolist()
        for group, length in enumerate(lens):
            rows = range(int(qo[group]), int(qo[group + 1]))
            for row in rows:
                sees = length
                if causal and level + 1 == len(forest.qo_indptr):
                    sees = length - (rows.stop - 1 - row)
                for token in range(sees):
                    wanted[row, level, int(kv[group]), token] += 1
    assert met == wanted


def plan_of(forest: Forest, **options: Any) -> flashinfer_ops.CascadePlan:
    return flashinfer_ops.plan_cascade(*forest.arrays, **forest.numbers, **options)


@given(
    seed=st.integers(0, 999),
    num_levels=st.integers(1, 4),
    num_requests=st.integers(0, 12),
    max_qo_len=st.sampled_from([1, 5, 40]),
    group=st.sampled_from([1, 3, 8]),
    page_size=st.sampled_from([1, 3, 16]),
    nested=st.booleans(),
    causal=st.booleans(),
)
def test_covers_what_rows_see_exactly_once(
    seed: int,
    num_levels: int,
    num_requests: int,
    max_qo_len: int,
    group: int,
    page_size: int,
    nested: bool,
    causal: bool,
) -> None:
    forest = random_forest(
        seed,
        num_levels=num_levels,
        num_requests=num_requests,
        max_qo_len=max_qo_len,
        num_qo_heads=2 * group,
        head_dim=1,
        page_size=page_size,
        max_kv_len=50,
        nested=nested,
    )
    check_schedule(forest, plan_of(forest, causal=causal), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_long_kv_is_cut_for_the_threads(causal: bool) -> None:
    """Few requests with one head would keep all threads but one idle."""
    forest = random_forest(
        4,
        num_levels=2,
        num_requests=6,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=1,
        max_kv_len=6000,
        max_qo_len=3,
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        plan = plan_of(forest, causal=causal)
    finally:
        torch.set_num_threads(threads)
    assert len(tables(plan.schedule)[2]) > 2
    check_schedule(forest, plan, causal)


def test_more_rows_than_tiles_make_larger_tiles() -> None:
    indptr = int32(0, 50_000)
    plan = flashinfer_ops.plan_cascade(
        [indptr],
        [int32(0, 1)],
        [int32(0)],
        [int32(2)],
        num_qo_heads=8,
        num_kv_heads=1,
        head_dim=8,
        page_size=4,
    )
    header, tiles, _, _ = tables(plan.schedule)
    assert header[1] == 256 + 4 and tiles[-1][1] == 50_000
    assert {t[1] - t[0] for t in tiles} <= {192, 193}


def test_capacities_and_their_tails(device: str) -> None:
    forest = random_forest(2, num_levels=2, num_requests=11, device=device)
    plan = plan_of(forest)
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len"):
        for buffer, array in zip(getattr(plan, name), getattr(forest, name), strict=True):
            assert len(buffer) >= max(4, len(array)) and torch.equal(buffer[: len(array)], array)
            if name.endswith("indptr"):
                assert bool((buffer[len(array) :] == array[-1]).all())
    sizes = [len(t) - 1 for t in plan.kv_indptr]
    assert plan.schedule.shape == (schedule_size(sizes),)
    assert plan.schedule.dtype == torch.int32 and str(plan.schedule.device).startswith(device)


def test_plans_again_into_the_same_memory(device: str) -> None:
    plan = plan_of(random_forest(0, num_levels=2, num_requests=31, device=device))
    tensors = [*plan.qo_indptr, *plan.kv_indptr, *plan.kv_indices, plan.schedule]
    addresses = [t.data_ptr() for t in tensors]
    for seed in range(1, 5):
        forest = random_forest(seed, num_levels=2, num_requests=17, device=device)
        assert plan_of(forest, out=plan) is plan
        assert [t.data_ptr() for t in tensors] == addresses
        fresh = flashinfer_ops.plan_cascade(
            plan.qo_indptr,
            plan.kv_indptr,
            plan.kv_indices,
            plan.kv_last_page_len,
            **forest.numbers,
        )
        assert torch.equal(fresh.schedule, plan.schedule)  # deterministic, and all overwritten
        if device == "cpu":
            check_schedule(forest, plan, causal=False)
    # The plan's own arrays, changed in place, are planned as they are.
    plan.kv_last_page_len[1].fill_(1)
    flashinfer_ops.plan_cascade(
        plan.qo_indptr,
        plan.kv_indptr,
        plan.kv_indices,
        plan.kv_last_page_len,
        **forest.numbers,
        out=plan,
    )
    if device == "cpu":
        forest.kv_last_page_len[1].fill_(1)
        check_schedule(forest, plan, causal=False)


def test_bad_out_leaves_the_plan_as_it_was() -> None:
    forest = random_forest(0, num_levels=2, num_requests=9)
    plan = plan_of(forest)
    before = plan.schedule.clone(), [t.clone() for t in plan.qo_indptr]
    large = random_forest(1, num_levels=2, num_requests=90)
    three = random_forest(1, num_levels=3, num_requests=9)
    for call, error, message in (
        (lambda: plan_of(large, out=plan), ValueError, r"qo_indptr\[.\] has .* expected at most"),
        (lambda: plan_of(three, out=plan), ValueError, "qo_indptr has 3 levels, expected 2 as in"),
        (lambda: plan_of(forest, out=plan, causal=True), ValueError, "causal is True, expected F"),
        (lambda: plan_of(forest, out=plan, sm_scale=2.0), ValueError, "sm_scale is 2.0, expected"),
        (lambda: plan_of(forest, out=plan, max_tokens=9), ValueError, "max_tokens is 9, expected"),
        (lambda: plan_of(forest, out=plan.schedule), TypeError, "out is a Tensor, expected a Casc"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(plan.schedule, before[0])
    assert all(map(torch.equal, plan.qo_indptr, before[1]))


def bad_calls() -> list[tuple[Callable[[], object], type[Exception], str]]:
    forest = random_forest(0, num_levels=2, num_requests=5)
    qo, kv, indices, last = forest.arrays

    def call(**changes: Any) -> object:
        arguments: dict[str, Any] = {
            "qo_indptr": qo,
            "kv_indptr": kv,
            "kv_indices": indices,
            "kv_last_page_len": last,
            **forest.numbers,
        }
        return flashinfer_ops.plan_cascade(**(arguments | changes))

    long = [qo[0], qo[1].long()]
    down = [kv[0], kv[1].flip(0).contiguous()]
    return [
        (lambda: call(qo_indptr=qo[0]), TypeError, "qo_indptr is a Tensor, expected a list"),
        (lambda: call(qo_indptr=long), ValueError, r"qo_indptr\[1\] has dtype torch.int64"),
        (lambda: call(kv_indices=indices[:1]), ValueError, "kv_indices has 1 levels and qo_indptr"),
        (lambda: call(qo_indptr=[], kv_indptr=[]), ValueError, "qo_indptr has 0 levels"),
        (lambda: call(qo_indptr=qo * 9), ValueError, "qo_indptr has 18 levels"),
        (lambda: call(kv_indptr=[kv[0], kv[1][1:]]), ValueError, r"kv_indptr\[1\] has 5 elements"),
        (lambda: call(kv_last_page_len=[last[0], kv[1]]), ValueError, r"last_page_len\[1\] has 6"),
        (lambda: call(qo_indptr=[qo[0][:0], qo[1]]), ValueError, r"qo_indptr\[0\] is empty"),
        (lambda: call(num_qo_heads=3), ValueError, "num_qo_heads is 3, expected a multiple"),
        (lambda: call(num_kv_heads=0), ValueError, "num_kv_heads is 0, expected 1 or more"),
        (lambda: call(head_dim=0), ValueError, "head_dim is 0"),
        (lambda: call(page_size=1.5), TypeError, "page_size is a float, expected an int"),
        (lambda: call(max_tokens=-1), ValueError, "max_tokens is -1"),
        (lambda: call(kv_indptr=down), RuntimeError, r"kv_indptr\[1\] must not decrease"),
        (lambda: call(kv_last_page_len=[t + 99 for t in last]), RuntimeError, "kv_last_page_len"),
    ]


@pytest.mark.parametrize("index", range(len(bad_calls())))
def test_bad_input(index: int) -> None:
    call, error, message = bad_calls()[index]
    with pytest.raises(error, match=message):
        call()


def test_opcheck(device: str) -> None:
    forest = random_forest(0, num_levels=3, num_requests=9, device=device)
    plan = plan_of(forest, causal=True)
    numbers = [4, 2, 64, 16, True]
    for arrays in (plan, forest):
        args = (arrays.qo_indptr, arrays.kv_indptr, arrays.kv_last_page_len, *numbers)
        torch.library.opcheck(ops.cascade_plan.default, args)
    args = (plan.qo_indptr, plan.kv_indptr, plan.kv_last_page_len, *numbers)
    torch.library.opcheck(ops.cascade_plan.out, (*args, plan.schedule.clone()))


def test_every_number_of_the_schema_has_its_effect() -> None:
    """The boxed call checks how many arguments there are, not which is which."""
    forest = random_forest(3, num_levels=2, num_requests=40, max_qo_len=9, max_kv_len=900)
    base: dict[str, Any] = {**forest.numbers, "causal": False}
    plans = {"": flashinfer_ops.plan_cascade(*forest.arrays, **base)}
    changes = {"num_qo_heads": 32, "num_kv_heads": 4, "page_size": 32, "causal": True}
    for name, value in changes.items():
        plans[name] = flashinfer_ops.plan_cascade(*forest.arrays, **(base | {name: value}))
        assert not torch.equal(plans[name].schedule, plans[""].schedule), name
    assert replace(plans[""], head_dim=32).head_dim == 32
