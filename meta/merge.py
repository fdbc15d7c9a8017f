"""Schemas and fakes of the merge operators: joining attention states by the log-sum-exp rule."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, check_shape, define, register_fake

define("merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor v, Tensor s)")


@register_fake("merge_state")
def _(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    _check_states({"v_a": v_a, "v_b": v_b}, {"s_a": s_a, "s_b": s_b})
    return v_a.new_empty(v_a.shape), s_a.new_empty(s_a.shape, dtype=torch.float32)


define(
    "merge_state.omd(Tensor o_a, Tensor m_a, Tensor d_a, Tensor o_b, Tensor m_b, Tensor d_b)"
    " -> (Tensor o, Tensor m, Tensor d)"
)


@register_fake("merge_state.omd")
def _(
    o_a: Tensor, m_a: Tensor, d_a: Tensor, o_b: Tensor, m_b: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_states({"o_a": o_a, "o_b": o_b}, {"m_a": m_a, "d_a": d_a, "m_b": m_b, "d_b": d_b})
    return (
        o_a.new_empty(o_a.shape),
        m_a.new_empty(m_a.shape, dtype=torch.float32),
        d_a.new_empty(d_a.shape, dtype=torch.float32),
    )


define(
    "merge_state_(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other,"
    " Tensor? mask=None) -> ()"
)


@register_fake("merge_state_")
def _(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    _check_states({"v": v, "v_other": v_other}, {"s": s, "s_other": s_other}, mask)


define(
    "merge_state_.omd(Tensor(a!) o, Tensor(b!) m, Tensor(c!) d, Tensor o_other, Tensor m_other,"
    " Tensor d_other, Tensor? mask=None) -> ()"
)


@register_fake("merge_state_.omd")
def _(
    o: Tensor,
    m: Tensor,
    d: Tensor,
    o_other: Tensor,
    m_other: Tensor,
    d_other: Tensor,
    mask: Tensor | None = None,
) -> None:
    _check_states(
        {"o": o, "o_other": o_other},
        {"m": m, "d": d, "m_other": m_other, "d_other": d_other},
        mask,
    )


define("merge_states(Tensor v, Tensor s) -> (Tensor v_merged, Tensor s_merged)")


@register_fake("merge_states")
def _(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    check_shape("v", v, (None, None, None, None))
    check_shape("s", s, v.shape[:3])
    n, _num_states, h, d = v.shape
    return v.new_empty((n, h, d)), s.new_empty((n, h), dtype=torch.float32)


define("merge_states.list(Tensor[] v, Tensor[] s) -> (Tensor v_merged, Tensor s_merged)")


@register_fake("merge_states.list")
def _(v: list[Tensor], s: list[Tensor]) -> tuple[Tensor, Tensor]:
    check(len(v) == len(s) > 0, "v and s differ in their number of states, or have none")
    _check_states({f"v[{i}]": t for i, t in enumerate(v)}, {f"s[{i}]": t for i, t in enumerate(s)})
    return v[0].new_empty(v[0].shape), s[0].new_empty(s[0].shape, dtype=torch.float32)


define(
    "merge_states.ragged(Tensor v, Tensor s, Tensor indptr) -> (Tensor v_merged, Tensor s_merged)"
)


@register_fake("merge_states.ragged")
def _(v: Tensor, s: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    _check_states({"v": v}, {"s": s})
    check_shape("indptr", indptr, (None,))
    n = indptr.shape[0] - 1
    _nnz, h, d = v.shape
    return v.new_empty((n, h, d)), s.new_empty((n, h), dtype=torch.float32)


def _check_states(
    outputs: dict[str, Tensor], scalars: dict[str, Tensor], mask: Tensor | None = None
) -> None:
    """Outputs are `[n, h, d]` of one dtype, lse (or m and d) `[n, h]`, the mask `[n]`."""
    first_name, first = next(iter(outputs.items()))
    check_shape(first_name, first, (None, None, None))
    for name, t in outputs.items():
        check_shape(name, t, first.shape)
        check(t.dtype == first.dtype, f"{name} and {first_name} differ in dtype")
    for name, t in scalars.items():
        check_shape(name, t, first.shape[:2])
    if mask is not None:
        check_shape("mask", mask, first.shape[:1])
