"""Merging attention states.

An attention state over some set of KV is `(v, s)`, the attention output and its base-2 log-sum-exp,
or `(o, m, d)` with the log-sum-exp split, `s = m + log2(d)`. Two states over disjoint sets of KV
merge into the state over their union:

    s = log2(2**s_a + 2**s_b)        v = 2**(s_a - s) * v_a + 2**(s_b - s) * v_b

The rule is the online softmax of Milakov and Gimelshein (arXiv:1805.02867), as FlashInfer
(arXiv:2501.01005) uses it for cascades. The empty state, `v = 0, s = -inf`, is its exact identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .checks import (
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_index,
    check_like,
    check_tensor,
    check_unit_stride,
    fits,
    refuse_grad,
)

_ops = torch.ops.flashinfer_ops

_STATE = ("v_a", "s_a", "v_b", "s_b")
_STATE_OMD = ("o_a", "m_a", "d_a", "o_b", "m_b", "d_b")
_IN_PLACE = ("v", "s", "v_other", "s_other")
_IN_PLACE_OMD = ("o", "m", "d", "o_other", "m_other", "d_other")


@overload
def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def merge_state(
    o_a: Tensor, m_a: Tensor, d_a: Tensor, o_b: Tensor, m_b: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]: ...
def merge_state(*states: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
    """Merge the attention states a and b into a new one.

    Called with four tensors, `merge_state(v_a, s_a, v_b, s_b) -> (v, s)`; with six,
    `merge_state(o_a, m_a, d_a, o_b, m_b, d_b) -> (o, m, d)`.

    Args:
        v_a, v_b (or o_a, o_b): attention outputs, `[n, num_heads, head_dim]`, float32, float16 or
            bfloat16, the same for both; any strides.
        s_a, s_b: base-2 log-sum-exp, `[n, num_heads]`, any floating dtype; any strides.
        m_a, m_b: running maximum of the base-2 logits, as `s_a`.
        d_a, d_b: softmax denominator relative to `m`, as `s_a`. A state with `d = 0` or
            `m = -inf` is empty.

    Returns:
        `(v, s)` or `(o, m, d)`: contiguous; `v` in the dtype of the inputs, the rest float32.

    Raises:
        TypeError: not four or six tensors.
        ValueError: shapes, dtypes or devices that do not fit, or an input that requires grad.

    Example:
        >>> import torch, flashinfer_ops
        >>> v_a, v_b = torch.randn(2, 8, 32, 128).half()
        >>> s_a, s_b = torch.randn(2, 8, 32)
        >>> v, s = flashinfer_ops.merge_state(v_a, s_a, v_b, s_b)
        >>> v.shape, s.shape
        (torch.Size([8, 32, 128]), torch.Size([8, 32]))
    """
    names, tensors, _ = _bind("merge_state", states, named, _STATE, _STATE_OMD)
    _check_pair(names, tensors)
    if len(tensors) == 4:
        v, s = _ops.merge_state.default(*tensors)
        return v, s
    o, m, d = _ops.merge_state.omd(*tensors)
    return o, m, d


@overload
def merge_state_in_place(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None: ...
@overload
def merge_state_in_place(
    o: Tensor,
    m: Tensor,
    d: Tensor,
    o_other: Tensor,
    m_other: Tensor,
    d_other: Tensor,
    mask: Tensor | None = None,
) -> None: ...
def merge_state_in_place(*states: Any, **named: Any) -> None:
    """Merge another attention state into the first, in place.

    `merge_state_in_place(v, s, v_other, s_other, mask=None)` or
    `merge_state_in_place(o, m, d, o_other, m_other, d_other, mask=None)`.

    Args:
        v (or o): attention output `[n, num_heads, head_dim]`, written; contiguous last dimension.
        s (or m and d): `[n, num_heads]` float32, written; see `merge_state`.
        v_other, s_other (or o_other, m_other, d_other): the state to merge in, float32 lse.
        mask: `[n]`, bool or uint8; rows whose mask is 0 stay as they are. Default: all are merged.

    Raises:
        TypeError: another number of tensors.
        ValueError: as `merge_state`, and an lse that is not float32; nothing is written then.

    Example:
        >>> import torch, flashinfer_ops
        >>> v, v_other = torch.randn(2, 8, 32, 128)
        >>> s, s_other = torch.randn(2, 8, 32)
        >>> flashinfer_ops.merge_state_in_place(v, s, v_other, s_other)
    """
    names, tensors, mask = _bind(
        "merge_state_in_place", states, named, _IN_PLACE, _IN_PLACE_OMD, takes_mask=True
    )
    _check_pair(names, tensors)
    per_state = len(tensors) // 2
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dim() == 2:
            check_dtype(name, tensor, (torch.float32,))
    check_unit_stride(names[0], tensors[0])
    if mask is not None:
        check_tensor("mask", mask, dim=1)
        check_dtype("mask", mask, (torch.bool, torch.uint8))
        check_like("mask", mask, tensors[0].shape[:1], names[0])
        check_device("mask", mask, tensors[0].device, names[0])
    if per_state == 2:
        _ops.merge_state_.default(*tensors, mask)
    else:
        _ops.merge_state_.omd(*tensors, mask)


@overload
def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def merge_states(v: Sequence[Tensor], s: Sequence[Tensor]) -> tuple[Tensor, Tensor]: ...
def merge_states(
    v: Tensor | Sequence[Tensor], s: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge any number of attention states.

    Args:
        v: `[n, num_states, num_heads, head_dim]`, or a list of `num_states >= 1` tensors
            `[n, num_heads, head_dim]`; float32, float16 or bfloat16.
        s: base-2 log-sum-exp `[n, num_states, num_heads]`, or as long a list of
            `[n, num_heads]`; any floating dtype.

    Returns:
        `(v, s)`: `[n, num_heads, head_dim]` in the dtype of `v`, and `[n, num_heads]` float32.
        Without states (`num_states = 0`) the empty state.

    Raises:
        TypeError: one of `v` and `s` is a list and the other a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or an input that requires grad.

    Example:
        >>> import torch, flashinfer_ops
        >>> v, s = torch.randn(8, 5, 32, 128), torch.randn(8, 5, 32)
        >>> v_merged, s_merged = flashinfer_ops.merge_states(v, s)
    """
    if isinstance(v, (list, tuple)) and isinstance(s, (list, tuple)):
        if len(v) != len(s) or len(v) == 0:
            raise ValueError(
                f"v has {len(v)} states and s has {len(s)}, expected as many, and one at least"
            )
        for k in range(len(v)):
            _check_state((f"v[{k}]", f"s[{k}]"), (v[k], s[k]), "v[0]", v[0])
        merged, lse = _ops.merge_states.list(list(v), list(s))
        return merged, lse
    check_tensor("v", v, dim=4)
    check_tensor("s", s, dim=3)
    assert isinstance(v, Tensor) and isinstance(s, Tensor)
    check_dtype("v", v, KERNEL_DTYPES)
    _check_floating("s", s)
    check_like("s", s, v.shape[:3], "v")
    check_device("s", s, v.device, "v")
    refuse_grad(v=v, s=s)
    merged, lse = _ops.merge_states.default(v, s)
    return merged, lse


def variable_length_merge_states(v: Tensor, s: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a ragged number of attention states for each row.

    Args:
        v: `[nnz, num_heads, head_dim]`, float32, float16 or bfloat16: the states of all rows.
        s: base-2 log-sum-exp `[nnz, num_heads]`, any floating dtype.
        indptr: `[n + 1]` int32: row i merges the states `indptr[i]` to `indptr[i + 1] - 1`; none
            gives the empty state.

    Returns:
        `(v, s)`: `[n, num_heads, head_dim]` in the dtype of `v`, and `[n, num_heads]` float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an input that requires grad.
        RuntimeError: on the CPU, an `indptr` that decreases or leaves `v`.

    Example:
        >>> import torch, flashinfer_ops
        >>> v, s = torch.randn(5, 32, 128), torch.randn(5, 32)
        >>> indptr = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        >>> v_merged, s_merged = flashinfer_ops.variable_length_merge_states(v, s, indptr)
    """
    _check_state(("v", "s"), (v, s), "v", v)
    check_index("indptr", indptr)
    check_device("indptr", indptr, v.device, "v")
    if indptr.shape[0] == 0:
        raise ValueError("indptr is empty, expected one element more than there are rows")
    merged, lse = _ops.merge_states.ragged(v, s, indptr)
    return merged, lse


def _bind(
    function: str,
    positional: tuple[Any, ...],
    named: dict[str, Any],
    short: tuple[str, ...],
    long: tuple[str, ...],
    takes_mask: bool = False,
) -> tuple[tuple[str, ...], tuple[Any, ...], Any]:
    """Tell the two forms apart and return the chosen form's names, tensors and mask."""
    mask = named.pop("mask", None) if takes_mask else None
    given = len(positional) + len(named)
    if takes_mask and len(positional) in (len(short) + 1, len(long) + 1) and not named:
        mask, positional, given = positional[-1], positional[:-1], given - 1
    names = long if given == len(long) else short
    if named and given == len(names):
        rest = names[len(positional) :]
        if set(rest) == set(named):
            return names, positional + tuple(named[name] for name in rest), mask
    if named or given != len(names):
        got = f"{len(positional)} positional arguments" + (
            f" and {', '.join(sorted(named))}" if named else ""
        )
        raise TypeError(f"{function} takes ({', '.join(short)}) or ({', '.join(long)}), got {got}")
    return names, positional, mask


def _check_floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {value.dtype}, expected a floating dtype")


def _check_state(names: Sequence[str], state: Sequence[Any], like_name: str, like: Tensor) -> None:
    """One state: an output like `like`, `[n, h, d]`, and its `[n, h]` scalars."""
    name, v = names[0], state[0]
    check_tensor(name, v, dim=3)
    check_dtype(name, v, KERNEL_DTYPES)
    if v is not like:
        check_like(name, v, like.shape, like_name)
        check_dtype(name, v, (like.dtype,))
        check_device(name, v, like.device, like_name)
    refuse_grad(**{name: v})
    for scalar_name, scalar in zip(names[1:], state[1:], strict=True):
        check_tensor(scalar_name, scalar, dim=2)
        _check_floating(scalar_name, scalar)
        check_like(scalar_name, scalar, like.shape[:2], like_name)
        check_device(scalar_name, scalar, like.device, like_name)
        refuse_grad(**{scalar_name: scalar})


def _check_pair(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    per_state = len(names) // 2
    v = tensors[0]
    check_tensor(names[0], v, dim=3)
    shape, dtype, device = v.shape, v.dtype, v.device
    if dtype in KERNEL_DTYPES:
        scalars = shape[:2]
        for i, tensor in enumerate(tensors):
            is_v = i % per_state == 0
            if not fits(tensor, shape if is_v else scalars, dtype if is_v else None, device):
                break
        else:
            return
    for i in (0, per_state):
        _check_state(names[i : i + per_state], tensors[i : i + per_state], names[0], tensors[0])
