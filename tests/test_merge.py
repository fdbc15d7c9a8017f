"""Merging attention states: the float64 oracle, empty and infinite states, strides, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, assert_lse_close, int32, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LSE_TOLERANCE = 1e-5  # the lse is float32 whatever the dtype of v
SHAPES = [(1, 1, 1), (7, 3, 33), (33, 8, 128), (5, 32, 257), (0, 4, 64), (3, 0, 64), (3, 4, 0)]
ops = torch.ops.flashinfer_ops


def states(
    num: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random states, one lse in six -inf with NaN behind it."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(num, *shape, generator=g)
    s = torch.randn(num, *shape[:2], generator=g) * 10
    empty = torch.rand(s.shape, generator=g) < 1 / 6
    s[empty], v[empty] = -INF, NAN
    return list(v.to(device, dtype).unbind()), list(s.to(device).unbind())


def split_lse(s: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(m, d) with s = m + log2(d); empty states alternate between m = -inf and d = 0."""
    g = torch.Generator().manual_seed(seed)
    d = (torch.rand(s.shape, generator=g) * 4 + 0.5).to(s.device)
    m = s - d.log2()
    zero = (s == -INF) & (torch.rand(s.shape, generator=g) < 0.5).to(s.device)
    return torch.where(zero, 3.0, m), torch.where(zero, 0.0, d)


def doubled(*tensors: Any) -> list[Any]:
    """On the CPU, in float64 where they were floating."""

    def convert(t: Any) -> Any:
        if isinstance(t, list):
            return [convert(item) for item in t]
        return t.cpu().double() if t.is_floating_point() else t.cpu()

    return [convert(t) for t in tensors]


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between tokens and heads swapped with tokens in memory."""
    buffer = t.new_full((t.shape[1], t.shape[0] + 2, *t.shape[2:]), NAN).transpose(0, 1)
    view = buffer[1 : 1 + t.shape[0]]
    view.copy_(t)
    return view


def check(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    assert actual[0].dtype == dtype and actual[0].is_contiguous()
    assert relative_error(actual[0], expected[0]) < TOLERANCE[dtype]
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert_lse_close(got, wanted, LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_merge_state(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], layout: str
) -> None:
    (v_a, v_b), (s_a, s_b) = states(2, shape, dtype, device)
    expected = reference.merge_state(*doubled(v_a, s_a, v_b, s_b))
    (m_a, d_a), (m_b, d_b) = split_lse(s_a, 1), split_lse(s_b, 2)
    arguments = [v_a, m_a, d_a, v_b, m_b, d_b]
    expected_omd = reference.merge_state_omd(*doubled(*arguments))
    pair = [v_a, s_a, v_b, s_b]
    if layout == "strided":
        pair, arguments = list(map(strided, pair)), list(map(strided, arguments))
    check(flashinfer_ops.merge_state(*pair), expected, dtype)
    check(flashinfer_ops.merge_state(*arguments), expected_omd, dtype)
    # The two forms hold the same states.
    lse = torch.where(expected_omd[2] == 0, -INF, expected_omd[1] + expected_omd[2].log2())
    assert_lse_close(lse, expected[1], LSE_TOLERANCE)

    for mask in (None, torch.arange(shape[0], device=device) % 3 == 0):
        mine = [t.clone(memory_format=torch.preserve_format) for t in (pair[0], pair[1])]
        flashinfer_ops.merge_state_in_place(*mine, pair[2], pair[3], mask)
        mine_omd = [t.clone() for t in arguments[:3]]
        byte_mask = None if mask is None else mask.to(torch.uint8) * 7
        flashinfer_ops.merge_state_in_place(*mine_omd, *arguments[3:], mask=byte_mask)
        for results, before, merged in (
            (mine, pair[:2], expected),
            (mine_omd, arguments[:3], expected_omd),
        ):
            hit = slice(None) if mask is None else mask
            assert relative_error(results[0][hit], merged[0].to(device)[hit]) < TOLERANCE[dtype]
            for got, wanted in zip(results[1:], merged[1:], strict=True):
                assert_lse_close(got[hit], wanted.to(device)[hit], LSE_TOLERANCE)
            if mask is not None:
                for got, old in zip(results, before, strict=True):
                    torch.testing.assert_close(
                        got[~mask], old[~mask], atol=0, rtol=0, equal_nan=True
                    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_states", [0, 1, 2, 5, 300])
def test_merge_states(device: str, dtype: torch.dtype, num_states: int) -> None:
    shape = (9, 3, 40)
    vs, ss = states(max(1, num_states), shape, dtype, device)
    v = torch.stack(vs, 1)[:, :num_states]
    s = torch.stack(ss, 1)[:, :num_states]
    expected = reference.merge_states(*doubled(v, s))
    check(flashinfer_ops.merge_states(v, s), expected, dtype)
    check(flashinfer_ops.merge_states(v.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3), s),
          expected, dtype)  # fmt: skip
    if num_states == 0:
        merged, lse = flashinfer_ops.merge_states(v, s)
        assert not merged.any() and bool((lse == -INF).all())
        return
    vs[0], ss[0] = strided(vs[0]), strided(ss[0])
    check(flashinfer_ops.merge_states(vs, tuple(ss)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_variable_length(device: str, dtype: torch.dtype) -> None:
    (v,), (s,) = states(1, (50, 3, 40), dtype, device)
    indptr = int32(0, 0, 1, 7, 7, 30, 50, device=device)
    expected = reference.merge_states_ragged(*doubled(v, s), indptr.cpu())
    assert bool((expected[1][[0, 3]] == -INF).all())
    for arguments in ((v, s), (strided(v), strided(s))):
        check(flashinfer_ops.variable_length_merge_states(*arguments, indptr), expected, dtype)
    nothing = flashinfer_ops.variable_length_merge_states(v, s, int32(4, device=device))
    assert nothing[0].shape == (0, 3, 40) and nothing[1].shape == (0, 3)


@given(
    seed=st.integers(0, 10**6),
    num=st.integers(1, 9),
    shape=st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 300)),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes(seed: int, num: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v, s = states(num, shape, dtype, seed=seed)
    expected = reference.merge_states_list(*doubled(v, s))
    check(flashinfer_ops.merge_states(v, s), expected, dtype)
    check(flashinfer_ops.merge_states(torch.stack(v, 1), torch.stack(s, 1)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(cpu_capability: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        v, s = states(3, shape, dtype)
        expected = reference.merge_states_list(*doubled(v, s))
        check(flashinfer_ops.merge_states(v, s), expected, dtype)


def row(v: float, s: float, device: str) -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 3), v, device=device), torch.full((1, 1), s, device=device)


@pytest.mark.parametrize("v", [0.1, -3e38, NAN, INF])
def test_the_empty_state_is_the_exact_identity(device: str, v: float) -> None:
    mine = row(0.1, -7.3, device)
    empty = row(v, -INF, device)
    for arguments in ((*mine, *empty), (*empty, *mine)):
        merged, lse = flashinfer_ops.merge_state(*arguments)
        assert torch.equal(merged, mine[0]) and torch.equal(lse, mine[1])
    merged, lse = flashinfer_ops.merge_state(*empty, *empty)
    assert not merged.any() and lse.item() == -INF
    m, d = mine[1], torch.full_like(mine[1], 2.5)
    for m_empty, d_empty in ((-INF, 1.0), (50.0, 0.0), (NAN, 0.0), (-INF, NAN)):
        other = empty[0], torch.full_like(m, m_empty), torch.full_like(m, d_empty)
        for arguments in ((mine[0], m, d, *other), (*other, mine[0], m, d)):
            o_merged, m_merged, d_merged = flashinfer_ops.merge_state(*arguments)
            assert torch.equal(o_merged, mine[0])
            assert torch.equal(m_merged, m) and torch.equal(d_merged, d)
        both = flashinfer_ops.merge_state(*other, *other)
        assert not both[0].any() and both[1].item() == -INF and both[2].item() == 0


def test_an_infinite_lse_dominates(device: str) -> None:
    infinite, finite = row(2.0, INF, device), row(NAN, 5.0, device)
    for arguments in ((*infinite, *finite), (*finite, *infinite)):
        merged, lse = flashinfer_ops.merge_state(*arguments)
        assert merged.tolist() == [[[2.0] * 3]] and lse.item() == INF
    merged, lse = flashinfer_ops.merge_state(*infinite, *row(4.0, INF, device))
    assert merged.tolist() == [[[3.0] * 3]] and lse.item() == INF


@pytest.mark.parametrize("other", [0.0, INF, -INF])
@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_comes_out(device: str, other: float, nan_first: bool) -> None:
    pair = [row(1.0, NAN, device), row(1.0, other, device)]
    (v_a, s_a), (v_b, s_b) = pair if nan_first else pair[::-1]
    merged, lse = flashinfer_ops.merge_state(v_a, s_a, v_b, s_b)
    assert bool(merged.isnan().all()) and bool(lse.isnan().all())
    one = torch.ones_like(s_a)
    o, m, d = flashinfer_ops.merge_state(v_a, s_a, one, v_b, s_b, one)
    assert bool(o.isnan().all()) and bool(m.isnan().all()) and bool(d.isnan().all())


def test_negative_denominators_compute_the_formula(device: str) -> None:
    """FlashInfer's document draws d from a normal distribution."""
    g = torch.Generator().manual_seed(0)
    o_a, o_b = torch.randn(2, 20, 4, 16, generator=g).to(device)
    m_a, m_b, d_a, d_b = torch.randn(4, 20, 4, generator=g).to(device)
    _, m, d = flashinfer_ops.merge_state(o_a, m_a, d_a, o_b, m_b, d_b)
    wanted_m = torch.maximum(m_a, m_b)
    wanted_d = d_a * torch.exp2(m_a - wanted_m) + d_b * torch.exp2(m_b - wanted_m)
    torch.testing.assert_close(m, wanted_m)
    torch.testing.assert_close(d, wanted_d, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lse_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lse_of_any_floating_dtype(device: str, lse_dtype: torch.dtype) -> None:
    v, s = states(2, (6, 2, 16), device=device)
    s = [t.to(lse_dtype) for t in s]
    expected = reference.merge_state(*doubled(v[0], s[0], v[1], s[1]))
    check(flashinfer_ops.merge_state(v[0], s[0], v[1], s[1]), expected, torch.float32)
    check(flashinfer_ops.merge_states(v, s), expected, torch.float32)


def test_same_bits_every_time(device: str) -> None:
    v, s = states(7, (300, 8, 64), torch.bfloat16, device)
    first = flashinfer_ops.merge_states(v, s)
    for _ in range(3):
        again = flashinfer_ops.merge_states(v, s)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def calls(device: str, shape: tuple[int, int, int], layout: str) -> dict[str, tuple[Any, tuple]]:
    """For each overload, the operator and arguments for it."""
    v, s = states(2, shape, device=device)
    v, s = [t.nan_to_num() for t in v], [t.clamp(min=-9) for t in s]
    m, d = zip(*(split_lse(t) for t in s), strict=True)
    change: Callable[[Tensor], Tensor] = strided if layout == "strided" else Tensor.clone
    mask = torch.arange(shape[0], device=device) % 2 == 0
    pair = (v[0], s[0], v[1], s[1])
    pair_omd = (v[0], m[0], d[0], v[1], m[1], d[1])
    indptr = torch.tensor([0, shape[0] // 2, shape[0]], dtype=torch.int32, device=device)
    return {
        "default": (ops.merge_state.default, tuple(map(change, pair))),
        "omd": (ops.merge_state.omd, tuple(map(change, pair_omd))),
        "in_place": (ops.merge_state_.default, (*map(change, pair), None)),
        "in_place_mask": (ops.merge_state_.default, (*map(change, pair), mask)),
        "in_place_omd": (ops.merge_state_.omd, (*map(change, pair_omd), mask)),
        "states": (ops.merge_states.default, (torch.stack(v, 1), torch.stack(s, 1))),
        "list": (ops.merge_states.list, ([change(t) for t in v], [change(t) for t in s])),
        "ragged": (ops.merge_states.ragged, (change(v[0]), change(s[0]), indptr)),
    }


@pytest.mark.parametrize("overload", list(calls("cpu", (2, 2, 2), "contiguous")))
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shape", [(6, 2, 8), (0, 2, 8)])
def test_opcheck(device: str, overload: str, layout: str, shape: tuple[int, int, int]) -> None:
    op, arguments = calls(device, shape, layout)[overload]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}


def replaced(arguments: list[Tensor], i: int, value: Any) -> list[Any]:
    return [*arguments[:i], value, *arguments[i + 1 :]]


def test_refusals(device: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(2, (4, 2, 8), device=device)
    good = [v_a, s_a, v_b, s_b]
    for i, value, error, message in [
        (0, v_a[0], ValueError, r"v_a has shape \[2, 8\], expected 3 dimensions"),
        (0, v_a.double(), ValueError, "v_a has dtype torch.float64"),
        (0, [1.0], TypeError, "v_a is a list, expected a torch.Tensor"),
        (1, s_a[:3], ValueError, r"s_a has shape \[3, 2\], expected \[4, 2\] to fit v_a"),
        (1, s_a.int(), ValueError, "s_a has dtype torch.int32, expected a floating dtype"),
        (2, v_b.half(), ValueError, "v_b has dtype torch.float16, expected torch.float32"),
        (2, v_b[:, :1], ValueError, "v_b has shape"),
        (3, s_b.T, ValueError, "s_b has shape"),
        (3, s_b.clone().requires_grad_(), ValueError, "s_b requires grad"),
        (3, s_b.to("meta"), ValueError, "s_b is on meta"),
    ]:
        with pytest.raises(error, match=message):
            flashinfer_ops.merge_state(*replaced(good, i, value))
    with pytest.raises(TypeError, match=r"merge_state takes .v_a, s_a, v_b, s_b. or .o_a"):
        flashinfer_ops.merge_state(v_a, s_a, v_b)
    with pytest.raises(TypeError, match=r"got 3 positional arguments and s_c"):
        flashinfer_ops.merge_state(v_a, s_a, v_b, s_c=s_b)
    named = flashinfer_ops.merge_state(v_a, s_a, s_b=s_b, v_b=v_b)
    assert torch.equal(named[0], flashinfer_ops.merge_state(*good)[0])
    with torch.no_grad():
        flashinfer_ops.merge_state(v_a.clone().requires_grad_(), s_a, v_b, s_b)

    in_place = flashinfer_ops.merge_state_in_place
    before = v_a.clone()
    with pytest.raises(ValueError, match=r"s has dtype torch.float16, expected torch.float32"):
        in_place(v_a, s_a.half(), v_b, s_b)
    with pytest.raises(ValueError, match=r"v has stride 2 in its last dimension"):
        in_place(v_a[..., ::2], s_a, v_b[..., ::2], s_b)
    with pytest.raises(ValueError, match=r"mask has shape \[3\], expected \[4\] to fit v"):
        in_place(v_a, s_a, v_b, s_b, torch.ones(3, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match=r"mask has dtype torch.float32"):
        in_place(v_a, s_a, v_b, s_b, mask=torch.ones(4, device=device))
    torch.testing.assert_close(v_a, before, atol=0, rtol=0, equal_nan=True)

    with pytest.raises(ValueError, match=r"v has 0 states and s has 0"):
        flashinfer_ops.merge_states([], [])
    with pytest.raises(ValueError, match=r"v has 2 states and s has 1"):
        flashinfer_ops.merge_states([v_a, v_b], [s_a])
    with pytest.raises(ValueError, match=r"v\[1\] has shape"):
        flashinfer_ops.merge_states([v_a, v_b[:2]], [s_a, s_b])
    with pytest.raises(TypeError, match=r"s is a list"):
        flashinfer_ops.merge_states(v_a[:, None], [s_a])
    with pytest.raises(ValueError, match=r"s has shape \[4, 1, 2\], expected \[4, 2, 2\]"):
        flashinfer_ops.merge_states(torch.stack([v_a, v_b], 1), s_a[:, None])
    with pytest.raises(ValueError, match=r"indptr has dtype torch.int64"):
        flashinfer_ops.variable_length_merge_states(v_a, s_a, torch.tensor([0, 4], device=device))
    with pytest.raises(ValueError, match=r"indptr is empty"):
        flashinfer_ops.variable_length_merge_states(v_a, s_a, int32(device=device))


@pytest.mark.parametrize("indptr", [(0, 3, 2), (-1, 2), (0, 5)])
def test_bad_indptr_raises_on_the_cpu(indptr: tuple[int, ...]) -> None:
    (v,), (s,) = states(1, (4, 2, 8))
    with pytest.raises(RuntimeError, match=r"indptr must not decrease and must stay within the 4"):
        flashinfer_ops.variable_length_merge_states(v, s, int32(*indptr))


def test_an_expanded_state_is_not_written() -> None:
    v, s = torch.zeros(1, 2, 8).expand(3, 2, 8), torch.zeros(1, 2).expand(3, 2)
    other = torch.ones(3, 2, 8), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="v is written, but its elements in dim 0"):
        flashinfer_ops.merge_state_in_place(v, s, *other)
    with pytest.raises(RuntimeError, match="s is written, but its elements in dim 0"):
        flashinfer_ops.merge_state_in_place(v.clone(), s, *other)
    with pytest.raises(RuntimeError, match="d is written, but its elements in dim 0"):
        flashinfer_ops.merge_state_in_place(v.clone(), s.clone(), s, *other, s)
