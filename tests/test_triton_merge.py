"""The Triton merge kernels: numerics in Triton's interpreter, compilation for Ampere and Hopper."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_merge import INF, NAN, check, doubled, row, split_lse, states, strided
from triton_helpers import CAPABILITIES, compiled_by, interpreted

from flashinfer_ops import reference
from flashinfer_ops.triton_kernels import OPERATORS, merge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(5, 3, 80), (3, 2, 1), (4, 3, 3), (0, 4, 64), (3, 0, 64), (3, 4, 0), (2, 2, 2100)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_merge_state(dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(2, shape, dtype)
    (m_a, d_a), (m_b, d_b) = split_lse(s_a, 1), split_lse(s_b, 2)
    mask = torch.arange(2 * shape[0]) % 3 == 0
    mask = mask[: shape[0]] if layout == "contiguous" else mask[::2]
    for name, contiguous in (
        ("merge_state", [v_a, s_a, v_b, s_b]),
        ("merge_state.omd", [v_a, m_a, d_a, v_b, m_b, d_b]),
    ):
        expected = reference.OPERATORS[name](*doubled(*contiguous))
        arguments = list(map(strided, contiguous)) if layout == "strided" else contiguous
        check(OPERATORS[name](*arguments), expected, dtype)
        in_place = OPERATORS[name.replace("state", "state_")]
        num = len(arguments) // 2
        for given_mask in (None, mask, mask.to(torch.uint8) * 7):
            before = arguments[:num]
            mine = [t.clone(memory_format=torch.preserve_format) for t in before]
            in_place(*mine, *arguments[num:], given_mask)
            hit = torch.ones(shape[0], dtype=torch.bool) if given_mask is None else mask
            check([t[hit].contiguous() for t in mine], [t[hit] for t in expected], dtype)
            for got, old in zip(mine, before, strict=True):
                torch.testing.assert_close(got[~hit], old[~hit], atol=0, rtol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_states", [0, 1, 3, 50, 300])
def test_merge_states(dtype: torch.dtype, num_states: int) -> None:
    shape = (3, 3, 40)
    vs, ss = states(max(1, num_states), shape, dtype)
    v, s = torch.stack(vs, 1)[:, :num_states], torch.stack(ss, 1)[:, :num_states]
    expected = reference.merge_states(*doubled(v, s))
    check(OPERATORS["merge_states"](v.contiguous(), s.contiguous()), expected, dtype)
    permuted = v.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    check(OPERATORS["merge_states"](permuted, s), expected, dtype)
    if num_states > 0:
        check(OPERATORS["merge_states.list"](vs, ss), expected, dtype)
        check(OPERATORS["merge_states.list"]([strided(vs[0]), *vs[1:]], ss), expected, dtype)


@interpreted
def test_ragged() -> None:
    (v,), (s,) = states(1, (50, 3, 40), torch.float16)
    indptr = torch.tensor([0, 0, 1, 7, 7, 50], dtype=torch.int32)
    expected = reference.merge_states_ragged(*doubled(v, s), indptr)
    ragged = OPERATORS["merge_states.ragged"]
    for arguments in ((v, s), (strided(v), strided(s))):
        check(ragged(*arguments, indptr), expected, torch.float16)
    nothing = ragged(v, s, torch.tensor([4], dtype=torch.int32))
    assert nothing[0].shape == (0, 3, 40) and nothing[1].shape == (0, 3)
    # What no caller should pass reads nothing outside of v.
    wild = ragged(v, s, torch.tensor([-5, 3, 1000], dtype=torch.int32))
    closed = reference.merge_states_ragged(*doubled(v, s), torch.tensor([0, 3, 50]))
    check(wild, closed, torch.float16)


@interpreted
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(1, 9),
    shape=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 140)),
    dtype=st.sampled_from(DTYPES),
)
@example(seed=0, num=4, shape=(3, 3, 33), dtype=torch.bfloat16)
def test_drawn_shapes(seed: int, num: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v, s = states(num, shape, dtype, seed=seed)
    expected = reference.merge_states_list(*doubled(v, s))
    check(OPERATORS["merge_states.list"](v, s), expected, dtype)
    check(OPERATORS["merge_states"](torch.stack(v, 1), torch.stack(s, 1)), expected, dtype)


def every_form(pair: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two (v, s) states merged by each operator on such states."""
    v, s = [pair[0], pair[2]], [pair[1], pair[3]]
    mine = pair[0].clone(), pair[1].clone()
    OPERATORS["merge_state_"](*mine, pair[2], pair[3], None)
    indptr = torch.tensor([0, 2], dtype=torch.int32)
    return [
        OPERATORS["merge_state"](*pair),
        mine,
        OPERATORS["merge_states"](torch.stack(v, 1), torch.stack(s, 1)),
        OPERATORS["merge_states.list"](v, s),
        OPERATORS["merge_states.ragged"](torch.cat(v), torch.cat(s), indptr),
    ]


@interpreted
@pytest.mark.parametrize("v", [0.1, NAN, INF])
def test_the_empty_state_is_the_exact_identity(v: float) -> None:
    mine, empty = row(0.1, -7.3, "cpu"), row(v, -INF, "cpu")
    for pair in ([*mine, *empty], [*empty, *mine]):
        for merged, lse in every_form(pair):
            assert torch.equal(merged, mine[0]) and torch.equal(lse, mine[1])
    for merged, lse in every_form([*empty, *empty]):
        assert not merged.any() and lse.item() == -INF
    m, d = mine[1], torch.full_like(mine[1], 2.5)
    omd = OPERATORS["merge_state.omd"]
    for m_empty, d_empty in ((-INF, 1.0), (50.0, 0.0), (NAN, 0.0), (-INF, NAN)):
        other = empty[0], torch.full_like(m, m_empty), torch.full_like(m, d_empty)
        for arguments in ((mine[0], m, d, *other), (*other, mine[0], m, d)):
            for got, wanted in zip(omd(*arguments), (mine[0], m, d), strict=True):
                assert torch.equal(got, wanted)
        o_both, m_both, d_both = omd(*other, *other)
        assert not o_both.any() and m_both.item() == -INF and d_both.item() == 0


@interpreted
def test_infinite_and_nan_lse() -> None:
    infinite, finite = row(2.0, INF, "cpu"), row(NAN, 5.0, "cpu")
    for pair in ([*infinite, *finite], [*finite, *infinite]):
        for merged, lse in every_form(pair):
            assert merged.tolist() == [[[2.0] * 3]] and lse.item() == INF
    for merged, lse in every_form([*infinite, *row(4.0, INF, "cpu")]):
        assert merged.tolist() == [[[3.0] * 3]] and lse.item() == INF
    for other in (0.0, INF, -INF):
        bad, good = row(1.0, NAN, "cpu"), row(1.0, other, "cpu")
        one = torch.ones(1, 1)
        for first, second in ((bad, good), (good, bad)):
            for merged, lse in every_form([*first, *second]):
                assert bool(merged.isnan().all()) and bool(lse.isnan().all())
            for t in OPERATORS["merge_state.omd"](*first, one, *second, one):
                assert bool(t.isnan().all())


@interpreted
def test_a_nan_or_infinite_lse_among_many() -> None:
    """Over more than one block of states, and with what it beats in every lane."""
    v, s = torch.full((1, 200, 1, 80), NAN), torch.zeros(1, 200, 1)
    s[0, 130], v[0, 130] = INF, 2.0
    merged, lse = OPERATORS["merge_states"](v, s)
    assert bool((merged == 2.0).all()) and lse.item() == INF
    s[0, 7] = NAN
    merged, lse = OPERATORS["merge_states"](v, s)
    assert bool(merged.isnan().all()) and bool(lse.isnan().all())


@interpreted
def test_negative_denominators_compute_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    o_a, o_b = torch.randn(2, 5, 2, 16, generator=g)
    m_a, m_b, d_a, d_b = torch.randn(4, 5, 2, generator=g)
    arguments = (o_a, m_a, d_a, o_b, m_b, d_b)
    expected = reference.merge_state_omd(*doubled(*arguments))
    for got, wanted in zip(OPERATORS["merge_state.omd"](*arguments), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)


@interpreted
@pytest.mark.parametrize("lse_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lse_of_any_floating_dtype(lse_dtype: torch.dtype) -> None:
    v, s = states(2, (3, 2, 16))
    s = [t.to(lse_dtype) for t in s]
    expected = reference.merge_state(*doubled(v[0], s[0], v[1], s[1]))
    check(OPERATORS["merge_state"](v[0], s[0], v[1], s[1]), expected, torch.float32)
    check(OPERATORS["merge_states.list"](v, s), expected, torch.float32)
    stacked = torch.stack(v, 1), torch.stack(s, 1)
    check(OPERATORS["merge_states"](*stacked), expected, torch.float32)


@interpreted
def test_rows_that_are_not_contiguous_are_copied() -> None:
    v, s = states(2, (3, 2, 16))
    v = [t[..., ::2] for t in v]
    expected = reference.merge_state(*doubled(v[0], s[0], v[1], s[1]))
    check(OPERATORS["merge_state"](v[0], s[0], v[1], s[1]), expected, torch.float32)
    check(OPERATORS["merge_states.list"](v, s), expected, torch.float32)


def launches(dtype: torch.dtype, layout: str, head_dim: int) -> dict[str, tuple[Any, ...]]:
    """For each operator, arguments like a model's."""
    v, s = torch.randn(64, 32, head_dim, dtype=dtype), torch.randn(64, 32)
    many = v.new_empty(64, 100, 32, head_dim), s.new_empty(64, 100, 32)
    if layout == "strided":
        v, s, many = strided(v), strided(s), tuple(t[:, ::2] for t in many)
    mask = torch.ones(64, dtype=torch.bool)
    return {
        "merge_state": (v, s, v, s),
        "merge_state.omd": (v, s, s, v, s, s),
        "merge_state_": (v, s, v, s, mask),
        "merge_state_.omd": (v, s, s, v, s, s, None),
        "merge_states": many,
        "merge_states.list": ([v] * 3, [s] * 3),
        "merge_states.ragged": (v, s, torch.arange(0, 65, 4, dtype=torch.int32)),
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_with_wide_accesses(dtype: torch.dtype, layout: str, capability: int) -> None:
    for name, arguments in launches(dtype, layout, 128).items():
        (kernel,) = compiled_by(capability, OPERATORS[name], *arguments)
        ptx = kernel.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        wide = r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global \[.*\], \[.*\], (0x)?(16|10)\b"
        assert re.search(wide, ptx), name
        if name != "merge_states":
            assert re.search(r"st\.global\.v4\.b32", ptx), name
        assert "ld.local" not in ptx and "st.local" not in ptx, name


@pytest.mark.parametrize("head_dim", [0, 1, 80, 2100])
def test_compiles_for_any_head_dim(head_dim: int) -> None:
    for name, arguments in launches(torch.float16, "contiguous", head_dim).items():
        (kernel,) = compiled_by(90, OPERATORS[name], *arguments)
        assert kernel.metadata.shared < 228 * 1024, name


def test_a_long_list_takes_a_second_launch() -> None:
    v, s = torch.randn(3, 2, 8), torch.randn(3, 2)
    most = merge._MAX_LIST
    for num, wanted in ((most, 1), (most + 1, 2), (2 * most - 1, 2), (2 * most, 3)):
        kernels = compiled_by(90, OPERATORS["merge_states.list"], [v] * num, [s] * num)
        assert len(kernels) == wanted
