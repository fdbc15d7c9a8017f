"""Cascade attention against the float64 oracle, over random forests with poison in dead slots."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import (
    Forest,
    attend,
    check_attention,
    int32,
    random_forest,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import cascade_attention, plan_cascade, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
ops = torch.ops.flashinfer_ops


@pytest.mark.parametrize(
    "num_levels,num_requests,nested",
    [
        *((levels, requests, True) for levels in (*range(1, 10), 16) for requests in (1, 17)),
        *((levels, 300, True) for levels in (1, 2, 4, 9)),
        *((levels, 40, False) for levels in (2, 3, 9, 16)),
    ],
)
def test_random_forests(device: str, num_levels: int, num_requests: int, nested: bool) -> None:
    forest = random_forest(
        num_levels * 1000 + num_requests,
        num_levels=num_levels,
        num_requests=num_requests,
        nested=nested,
        device=device,
    )
    check_attention(attend(forest), forest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3, 7, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 65, 128, 7, 256])
def test_heads(dtype: torch.dtype, group_size: int, head_dim: int) -> None:
    """On the CPU; test_attention_gpu.py has those that a GPU compiles kernels for."""
    for num_kv_heads in (1, 3):
        forest = random_forest(
            head_dim,
            num_levels=2,
            num_requests=9,
            num_qo_heads=num_kv_heads * group_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_qo_len=3,
            dtype=dtype,
        )
        check_attention(attend(forest), forest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["one", "tuple", "strided"])
def test_caches(device: str, dtype: torch.dtype, page_size: int, layout: str, form: str) -> None:
    forest = random_forest(
        page_size, num_levels=3, num_requests=20, page_size=page_size, max_qo_len=4,
        dtype=dtype, device=device,
    )  # fmt: skip
    cache = forest.cache_as(layout, as_tuple=form == "tuple")
    if form == "strided":  # every other page of a pool with wider heads
        assert isinstance(cache, Tensor)
        pool = cache.new_full((2 * cache.shape[0], *cache.shape[1:-1], 72), NAN)
        pool[::2, ..., 4:68] = cache
        cache = pool[::2, ..., 4:68]
    check_attention(attend(forest, layout, cache, causal=True), forest, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels,max_qo_len", [(1, 5), (2, 100), (4, 33)])
def test_causal_append(device: str, dtype: torch.dtype, num_levels: int, max_qo_len: int) -> None:
    """More query rows than KV tokens in some groups: their first rows see nothing of it."""
    forest = random_forest(
        1, num_levels=num_levels, num_requests=12, max_qo_len=max_qo_len, dtype=dtype, device=device
    )
    check_attention(attend(forest, causal=True), forest, True)
    assert relative_error(attend(forest)[0], forest.oracle(True)[0]) > 0.01  # causal has an effect


@given(
    seed=st.integers(0, 10**6),
    num_levels=st.integers(1, 5),
    num_requests=st.integers(1, 30),
    max_qo_len=st.sampled_from([1, 3, 50]),
    heads=st.sampled_from([(1, 1), (3, 1), (14, 2), (8, 8), (24, 3)]),
    head_dim=st.integers(1, 140),
    page_size=st.integers(1, 20),
    max_kv_len=st.sampled_from([1, 30, 300]),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    extra_rows=st.integers(0, 3),
    causal=st.booleans(),
    layout=st.sampled_from(["NHD", "HND"]),
)
def test_drawn_forests(
    seed: int, heads: tuple[int, int], causal: bool, layout: str, **options: Any
) -> None:
    forest = random_forest(seed, num_qo_heads=heads[0], num_kv_heads=heads[1], **options)
    # The few elements of a row may cancel out, its error does not.
    check_attention(attend(forest, layout, causal=causal), forest, causal, each_row=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(cpu_capability: str, dtype: torch.dtype) -> None:
    for seed, (group_size, head_dim, max_qo_len) in enumerate(
        [(1, 128, 1), (4, 128, 1), (4, 128, 50), (7, 33, 20), (1, 64, 300)]
    ):
        forest = random_forest(
            seed, num_levels=2, num_requests=5, num_qo_heads=2 * group_size, num_kv_heads=2,
            head_dim=head_dim, max_qo_len=max_qo_len, max_kv_len=400, dtype=dtype,
        )  # fmt: skip
        check_attention(attend(forest, causal=seed % 2 == 0), forest, seed % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_shared_kv(device: str, dtype: torch.dtype) -> None:
    """KV cut into several units a tile, whose partial states are merged."""
    forest = random_forest(
        6, num_levels=2, num_requests=4, max_kv_len=6000, dtype=dtype, device=device
    )
    check_attention(attend(forest), forest)


def test_rows_beyond_the_plan_are_empty(device: str) -> None:
    forest = random_forest(2, num_levels=2, num_requests=6, extra_rows=5, device=device)
    out, lse = attend(forest)
    check_attention((out, lse), forest)
    assert not out[-5:].any() and bool((lse[-5:] == -INF).all())


def test_empty_batch(device: str) -> None:
    zero, none = int32(0, device=device), int32(device=device)
    numbers = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}
    cache = torch.full((3, 2, 4, 2, 8), NAN, device=device)
    for arrays in (
        ([zero], [zero], [none], [none]),
        ([int32(0, 2, device=device)], [int32(0, 0, device=device)], [none], [zero]),
    ):
        plan = plan_cascade(*arrays, **numbers)
        for rows in (0, 2):
            if rows < int(arrays[0][0][-1]):
                continue
            q = torch.randn(rows, 4, 8, device=device)
            out, lse = cascade_attention(q, cache, plan)
            assert out.shape == (rows, 4, 8) and not out.any()
            assert lse.shape == (rows, 4) and bool((lse == -INF).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("empty", [(0,), (1,), (2,), (0, 1, 2)])
def test_levels_without_kv(device: str, causal: bool, empty: tuple[int, ...]) -> None:
    """A level may have groups without pages throughout, or no groups at all."""
    for groups in (True, False):
        forest = random_forest(6, num_levels=3, num_requests=8, max_qo_len=3, device=device)
        for level in empty:
            forest.kv_indptr[level] = torch.zeros_like(forest.kv_indptr[level])
            if not groups:
                zero = int32(0, device=device)
                forest.qo_indptr[level] = forest.kv_indptr[level] = zero
                forest.kv_indices[level] = forest.kv_last_page_len[level] = zero[:0]
        out, lse = attend(forest, causal=causal)
        check_attention((out, lse), forest, causal)
        assert bool((lse == -INF).all()) == (len(empty) == 3)


@pytest.mark.parametrize("part", ["key", "value"])
def test_nan_reaches_only_the_rows_that_see_it(device: str, part: str) -> None:
    """A live NaN in the last token of a causal group: its last row alone, and no other request."""
    forest = random_forest(
        4, num_levels=1, num_requests=5, max_qo_len=6, max_kv_len=90, device=device
    )
    lengths = flashinfer_ops.get_seq_lens(forest.kv_indptr[0], forest.kv_last_page_len[0], 16)
    rows = forest.qo_indptr[0][1:] - forest.qo_indptr[0][:-1]
    group = int(torch.where((lengths > 6) & (rows > 1))[0][0])
    page = forest.kv_indices[0][forest.kv_indptr[0][group + 1] - 1]
    poisoned = int(forest.qo_indptr[0][group + 1]) - 1
    clean, _ = attend(forest, causal=True)
    cache = forest.cache.clone()
    cache[page, int(part == "value"), forest.kv_last_page_len[0][group] - 1] = NAN
    out, _ = attend(forest, cache=cache, causal=True)
    assert bool(out[poisoned].isnan().all())
    if part == "value" and device == "cuda":
        return  # the rows of a tile share their product with the values: see docs/numerics.md
    others = torch.arange(len(out), device=device) != poisoned
    torch.testing.assert_close(out[others], clean[others])


def test_scales(device: str) -> None:
    """Every float of the schema has its effect, at values that float32 and ints would not hold."""
    forest = random_forest(8, num_levels=2, num_requests=7, device=device)
    plan = plan_cascade(*forest.arrays, **forest.numbers, sm_scale=0.37)
    for k_scale, v_scale in (
        (None, None),
        (1.7, None),
        (None, 2.3),
        (0.25, -0.5),
        (-0.6, None),
        (0.0, 1),
    ):
        out, lse = cascade_attention(forest.q, forest.cache, plan, k_scale=k_scale, v_scale=v_scale)
        sm_scale = 0.37 * (1.0 if k_scale is None else k_scale)
        check_attention((out, lse), forest, False, sm_scale, 1.0 if v_scale is None else v_scale)


def test_large_logits_do_not_overflow(device: str) -> None:
    forest = random_forest(9, num_levels=2, num_requests=7, device=device)
    for sm_scale in (40.0, -40.0, 0.0):
        check_attention(attend(forest, sm_scale=sm_scale), forest, False, sm_scale)


def test_strided_queries_and_outputs(device: str) -> None:
    forest = random_forest(3, num_levels=2, num_requests=9, extra_rows=2, device=device)
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    expected, expected_lse = cascade_attention(forest.q, forest.cache, plan)
    n, h, d = forest.q.shape
    wide = torch.full((h, n, 2 * d), NAN, device=device)  # heads first, as part of a fused QKV
    q = wide.transpose(0, 1)[..., d:]
    q.copy_(forest.q)
    out = torch.full((n, 2 * h, d), 7.0, device=device)[:, ::2]
    lse = torch.full((h, n), 7.0, device=device).T
    results = cascade_attention(q, forest.cache, plan, out=out, lse=lse)
    assert results[0] is out and results[1] is lse
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert bool((out._base[:, 1::2] == 7.0).all())  # type: ignore[index]
    only_out = torch.empty_like(expected)
    _, fresh_lse = cascade_attention(forest.q, forest.cache, plan, out=only_out)
    assert torch.equal(only_out, expected) and torch.equal(fresh_lse, expected_lse)
    only_lse = torch.empty_like(expected_lse)
    fresh_out, _ = cascade_attention(forest.q, forest.cache, plan, lse=only_lse)
    assert torch.equal(fresh_out, expected) and torch.equal(only_lse, expected_lse)


def test_same_bits_every_time(device: str) -> None:
    forest = random_forest(
        5, num_levels=3, num_requests=40, max_kv_len=900, dtype=torch.bfloat16, device=device
    )
    first = attend(forest)
    for _ in range(5):
        again = attend(forest)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_shared_prefix_equals_copies_of_it(device: str) -> None:
    """One level of whole contexts gives what two levels give: sharing changes no result."""
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(12, 2, 4, 2, 16, generator=g).to(device)
    q = torch.randn(3, 4, 16, generator=g).to(device)

    def i(*values: int) -> Tensor:
        return int32(*values, device=device)

    numbers = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
    shared = plan_cascade(
        [i(0, 3), i(0, 1, 2, 3)], [i(0, 2), i(0, 1, 3, 4)], [i(5, 0), i(1, 2, 3, 4)],
        [i(4), i(1, 3, 4)], **numbers,
    )  # fmt: skip
    flat = plan_cascade(
        [i(0, 1, 2, 3)], [i(0, 3, 7, 10)], [i(5, 0, 1, 5, 0, 2, 3, 5, 0, 4)], [i(1, 3, 4)],
        **numbers,
    )  # fmt: skip
    for a, b in zip(
        cascade_attention(q, cache, shared), cascade_attention(q, cache, flat), strict=True
    ):
        torch.testing.assert_close(a, b)


def arguments_of(forest: Forest, causal: bool, schedule: Tensor) -> tuple[Any, ...]:
    return (forest.q, forest.cache[:, 0], forest.cache[:, 1], *forest.arrays, schedule, causal,
            0.3, 0.7)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "empty"])
def test_opcheck(device: str, causal: bool, layout: str) -> None:
    forest = random_forest(1, num_levels=2, num_requests=5, extra_rows=1, device=device)
    forest.cache.nan_to_num_()
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
    q, cache = forest.q, forest.cache
    k_cache, v_cache = cache[:, 0].clone(), cache[:, 1].clone()
    if layout == "strided":
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
        k_cache, v_cache = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k_cache, v_cache)
        )
    arrays: Any = (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)
    schedule = plan.schedule
    if layout == "empty":
        zero, none = int32(0, device=device), int32(device=device)
        arrays, q = ([zero], [zero], [none], [none]), q[:0]
        schedule = ops.cascade_plan.default([zero], [zero], [none], 4, 2, 64, 16, causal)
    arguments = (q, k_cache, v_cache, *arrays, schedule, causal, 0.3, 0.7)
    results = torch.library.opcheck(ops.cascade_attention.default, arguments)
    out, lse = torch.zeros(q.shape, device=device), torch.zeros(q.shape[:2], device=device)
    for overload in (ops.cascade_attention.out, ops.cascade_attention.portable):
        results |= torch.library.opcheck(overload, (*arguments, out, lse))
        assert set(results.values()) == {"SUCCESS"}


def test_the_oracle_is_scaled_dot_product_attention() -> None:
    """The oracle itself, held against PyTorch's attention on gathered KV, causal included."""
    forest = random_forest(
        0, num_levels=1, num_requests=6, max_qo_len=5, max_kv_len=40, page_size=3
    )
    for causal in (False, True):
        out, lse = forest.oracle(causal)
        checked = 0
        borders = forest.qo_indptr[0].tolist()
        lengths = flashinfer_ops.get_seq_lens(forest.kv_indptr[0], forest.kv_last_page_len[0], 3)
        for g, (begin, end) in enumerate(pairwise(borders)):
            length, n = int(lengths[g]), end - begin
            if length < n or n == 0:
                continue
            pages = forest.kv_indices[0][forest.kv_indptr[0][g] : forest.kv_indptr[0][g + 1]].long()
            kv = forest.cache[pages].transpose(1, 2).flatten(0, 1)[:length].double()
            k, v = (t.transpose(0, 1)[None] for t in kv.unbind(1))  # [1, heads, length, dim]
            q = forest.q[begin:end].double().transpose(0, 1)[None]
            mask = torch.ones(n, length, dtype=torch.bool).tril(length - n if causal else length)
            expected = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=True
            )
            torch.testing.assert_close(out[begin:end], expected[0].transpose(0, 1))
            logits = q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2) / 8
            logits = logits.masked_fill(~mask, -INF)
            torch.testing.assert_close(lse[begin:end].T, logits.exp().sum(-1).log2())
            checked += 1
        assert checked > 0


def test_the_reference_serves_as_an_operator() -> None:
    """Functional and .out forms of the fallback agree with the CPU kernels."""
    forest = random_forest(4, num_levels=3, num_requests=9, max_qo_len=3)
    arrays = (forest.qo_indptr, forest.kv_indptr, forest.kv_last_page_len)
    shape = (*forest.numbers.values(), True)
    schedule = reference.cascade_plan(*arrays, *shape)
    assert schedule.shape == ops.cascade_plan.default(*arrays, *shape).shape and not schedule.any()
    schedule.fill_(3)
    reference.cascade_plan_out(*arrays, *shape, schedule)
    assert not schedule.any()
    arguments = arguments_of(forest, True, schedule)
    out, lse = reference.cascade_attention(*arguments)
    out_again, lse_again = torch.zeros_like(out), torch.zeros_like(lse)
    reference.cascade_attention_out(*arguments, out_again, lse_again)
    assert torch.equal(out, out_again) and torch.equal(lse, lse_again)
    check_attention((out, lse), forest, True, 0.3, 0.7)


def test_refusals(device: str) -> None:
    forest = random_forest(2, num_levels=2, num_requests=5, device=device)
    plan = plan_cascade(*forest.arrays, **forest.numbers, max_tokens=len(forest.q))
    good = {"q": forest.q, "paged_kv_cache": forest.cache, "plan": plan}
    q, cache = forest.q, forest.cache
    for changes, error, message in [
        ({"q": q[0]}, ValueError, r"q has shape \[4, 64\], expected 3 dimensions"),
        ({"q": q.double()}, ValueError, r"q has dtype torch.float64"),
        ({"q": q[:, :2]}, ValueError, r"q has shape .* to fit the plan"),
        ({"q": torch.cat([q, q])}, ValueError, r"q has \d+ rows, expected at most \d+, the plan"),
        ({"q": q.repeat(1, 1, 2)[..., ::2]}, ValueError, r"q has stride 2 in its last dimension"),
        ({"q": q.half()}, ValueError, r"paged_kv_cache has dtype torch.float32, expected"),
        ({"q": q.to("meta")}, ValueError, r"q is on meta"),
        ({"paged_kv_cache": cache[:, :, :8]}, ValueError, r"paged_kv_cache has page_size, num_kv"),
        ({"paged_kv_cache": cache[:, 0]}, ValueError, r"paged_kv_cache has shape"),
        ({"kv_layout": "HND"}, ValueError, r"under kv_layout HND, expected"),
        ({"kv_layout": None}, ValueError, r"kv_layout is None"),
        ({"plan": None}, TypeError, r"plan is a NoneType, expected a CascadePlan"),
        ({"out": q.half()}, ValueError, r"out has dtype torch.float16"),
        ({"out": q[1:].clone()}, ValueError, r"out has shape"),
        ({"lse": q[..., 0].double()}, ValueError, r"lse has dtype torch.float64"),
        ({"lse": q[1:, :, 0].clone()}, ValueError, r"lse has shape"),
        ({"k_scale": "1"}, TypeError, r"k_scale is a str, expected a float"),
        ({"v_scale": True}, TypeError, r"v_scale is a bool, expected a float"),
        ({"q": q.clone().requires_grad_()}, ValueError, r"q requires grad"),
        (
            {"paged_kv_cache": cache.clone().requires_grad_()},
            ValueError,
            r"paged_kv_cache requires",
        ),
    ]:
        with pytest.raises(error, match=message):
            cascade_attention(**{**good, **changes})
    with torch.inference_mode():
        cascade_attention(q.clone().requires_grad_(), cache, plan)


def test_expanded_outputs_are_refused(device: str) -> None:
    """Several rows would be written to one place."""
    forest = random_forest(2, num_levels=2, num_requests=9, device=device)
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    for expanded in (
        {"out": forest.q[:1].clone().expand(forest.q.shape)},
        {"lse": torch.zeros(1, 1, device=device).expand(forest.q.shape[:2])},
    ):
        with pytest.raises((RuntimeError, ValueError), match="is written, but its elements"):
            cascade_attention(forest.q, forest.cache, plan, **expanded)


def test_bad_contents_raise_on_the_cpu() -> None:
    """No page outside of the cache is read, and no row outside of q written."""
    forest = random_forest(2, num_levels=2, num_requests=9)
    plan = plan_cascade(*forest.arrays, **forest.numbers)
    with pytest.raises(RuntimeError, match=r"is page \d+, but the cache has 2 pages"):
        cascade_attention(forest.q, forest.cache[:2], plan)
    with pytest.raises(RuntimeError, match=r"the schedule was planned for \d+ tokens, q has 1"):
        cascade_attention(forest.q[:1], forest.cache, plan)
    kept = plan.schedule.clone()
    plan.schedule[:16] = 1 << 29
    with pytest.raises(RuntimeError, match=r"schedule: "):
        cascade_attention(forest.q, forest.cache, plan)
    # Header words: 1 tiles, 2 units, 6 where the units are; a unit: tile, segments, partial row.
    plan.schedule.copy_(kept)
    orphan = int(kept[6]) + 4 * int(kept[2])
    plan.schedule[orphan : orphan + 4] = int32(0, 0, 0, 1 << 29)
    plan.schedule[2] += 1
    with pytest.raises(RuntimeError, match=r"schedule: unit \d+ is not among the units"):
        cascade_attention(forest.q, forest.cache, plan)
