"""Planning cascade attention: from the index arrays of every level to a `CascadePlan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_index, check_int

_ops = torch.ops.flashinfer_ops

MAX_LEVELS = 16
_ARRAYS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")


@dataclass(frozen=True)
class CascadePlan:
    """What `cascade_attention` needs to know of a batch, made by `plan_cascade`.

    It holds tensors, whose contents may change from step to step, and numbers, which may not. The
    index arrays have room for more than the batch needs: their tails are empty groups.
    Registered with `torch.export`, it may be an input of compiled and exported programs.

    Attributes:
        qo_indptr: for each level `[groups + 1]` int32; group g's query rows.
        kv_indptr: for each level `[groups + 1]` int32; where group g's pages start in kv_indices.
        kv_indices: for each level `[pages]` int32; page numbers in the cache.
        kv_last_page_len: for each level `[groups]` int32; tokens in group g's last page.
        schedule: int32, the work units that the planner laid out; private to the kernels.
        num_qo_heads, num_kv_heads, head_dim, page_size: what q and the cache must have.
        max_tokens: the most rows that q may have, or None for any number.
        causal: whether rows of the last level see only the KV up to their own position.
        sm_scale: factor of the logits.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> plan = flashinfer_ops.plan_cascade(
        ...     [i(0, 2)], [i(0, 1)], [i(0)], [i(5)],
        ...     num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
        >>> plan.sm_scale
        0.125
    """

    qo_indptr: list[Tensor]
    kv_indptr: list[Tensor]
    kv_indices: list[Tensor]
    kv_last_page_len: list[Tensor]
    schedule: Tensor
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_tokens: int | None
    causal: bool
    sm_scale: float


torch.export.register_dataclass(CascadePlan, serialized_type_name="flashinfer_ops.CascadePlan")
# So that a saved program with a plan among its inputs loads without unpickling at large.
torch.serialization.add_safe_globals([CascadePlan])


def plan_cascade(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_indices: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_tokens: int | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    out: CascadePlan | None = None,
) -> CascadePlan:
    """Plan cascade attention for a batch whose KV forms a forest of shared pieces.

    Each argument is a list with one tensor a level, 1 to 16 levels from the roots to the requests'
    own suffixes. The planner runs where the tensors are and never copies them to the host.

    Outside of a trace the arrays are copied into buffers with room to grow (powers of two), so that
    later steps can be planned into the same memory with `out=`. Inside `torch.compile` and
    `torch.export` they are used as they are; give them capacity sizes there, with the last value
    of an indptr repeated in its tail, or pass `out`.

    Args:
        qo_indptr: `[groups + 1]` int32 each: group g of the level has the query rows
            `qo_indptr[g]` to `qo_indptr[g + 1] - 1`.
        kv_indptr: `[groups + 1]` int32 each: its pages are `kv_indices[kv_indptr[g]]` to
            `kv_indices[kv_indptr[g + 1] - 1]`.
        kv_indices: `[pages]` int32 each: page numbers in the cache, in the order of the tokens.
        kv_last_page_len: `[groups]` int32 each: tokens in the last page, 1 to `page_size`. A group
            without pages has length 0.
        num_qo_heads, num_kv_heads: heads; the first a multiple of the second.
        head_dim: elements a head.
        page_size: tokens a page.
        max_tokens: the most rows that q will have; default any number.
        causal: rows of a group of the last level see its KV only up to their own position, the
            last row seeing all of it. Levels above are always seen whole.
        sm_scale: factor of the logits; default `1 / sqrt(head_dim)`.
        out: an earlier plan, whose memory takes the new one: its index arrays are overwritten (an
            array that is already the plan's own is left as it is) and the schedule made anew, so
            that compiled callers and captured graphs that hold it see the new batch. The numbers
            must be the same.

    Returns:
        A `CascadePlan`; `out` itself when that is given.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or one that
            does not fit into `out`; `out` is then unchanged.
        RuntimeError: on the CPU, index arrays whose contents are no forest (a decreasing indptr, a
            last page longer than a page); `out` is then unchanged.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> plan = flashinfer_ops.plan_cascade(  # 2 requests share pages 0 and 1, own one each
        ...     [i(0, 2), i(0, 1, 2)], [i(0, 2), i(0, 1, 2)], [i(0, 1), i(2, 3)], [i(16), i(5, 9)],
        ...     num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
        >>> len(plan.kv_indices)
        2
    """
    arrays = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    check_arguments(arrays, num_qo_heads, num_kv_heads, head_dim, page_size, max_tokens)
    return make_plan(
        arrays,
        None,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        max_tokens=max_tokens,
        causal=causal,
        sm_scale=sm_scale,
        out=out,
    )


def make_plan(
    arrays: tuple[Sequence[Tensor], ...],
    device: torch.device | None,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_tokens: int | None,
    causal: bool,
    sm_scale: float | None,
    out: CascadePlan | None,
) -> CascadePlan:
    """`plan_cascade` of checked arguments, on `device` (default: where the first array is)."""
    if sm_scale is None:
        sm_scale = float(head_dim) ** -0.5
    numbers: dict[str, Any] = {
        "num_qo_heads": num_qo_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "max_tokens": max_tokens,
        "causal": bool(causal),
        "sm_scale": float(sm_scale),
    }
    shape = (num_qo_heads, num_kv_heads, head_dim, page_size, bool(causal))
    if out is not None:
        _check_fits(arrays, numbers, out)
        _plan_into(out, arrays, shape)
        return out

    device = device or arrays[0][0].device
    if torch.compiler.is_compiling():
        for name, given in zip(_ARRAYS, arrays, strict=True):
            for level, array in enumerate(given):
                check_device(f"{name}[{level}]", array, device, "qo_indptr[0]")
        qo, kv, indices, last = (list(given) for given in arrays)
        schedule = _ops.cascade_plan.default(qo, kv, last, *shape)
        return CascadePlan(qo, kv, indices, last, schedule, **numbers)
    with torch.inference_mode(False):  # an inference tensor could not be planned into outside of it
        qo, kv, indices, last = (
            [_with_capacity(name, array, device) for array in given]
            for name, given in zip(_ARRAYS, arrays, strict=True)
        )
    return CascadePlan(qo, kv, indices, last, new_schedule(qo, kv, last, *shape), **numbers)


def _plan_into(
    out: CascadePlan, arrays: tuple[Sequence[Tensor], ...], shape: tuple[int, ...]
) -> None:
    """Copy the arrays into the plan's own, where they are not those, and plan them."""
    copies = [
        (buffer, array, name.endswith("indptr"))
        for name, given in zip(_ARRAYS, arrays, strict=True)
        for buffer, array in zip(getattr(out, name), given, strict=True)
        if array is not buffer
    ]
    # On the CPU the planner looks at the contents and may refuse them: then all is put back.
    refusable = out.schedule.device.type == "cpu" and not torch.compiler.is_compiling()
    before = [buffer.clone() for buffer, _, _ in copies] if refusable else []
    for buffer, array, is_indptr in copies:
        _fill(buffer, array, repeat_last=is_indptr)
    try:
        _ops.cascade_plan.out(
            out.qo_indptr, out.kv_indptr, out.kv_last_page_len, *shape, out.schedule
        )
    except RuntimeError:
        for (buffer, _, _), old in zip(copies, before, strict=False):
            buffer.copy_(old)
        raise


def new_schedule(
    qo_indptr: list[Tensor],
    kv_indptr: list[Tensor],
    kv_last_page_len: list[Tensor],
    *shape: int,
) -> Tensor:
    """A schedule that later plans may be written into, made outside of a trace."""
    with torch.inference_mode(False):
        arrays = (qo_indptr, kv_indptr, kv_last_page_len)
        schedule: Tensor = _ops.cascade_plan.default(*arrays, *shape)
    torch._dynamo.maybe_mark_dynamic(schedule, 0)
    return schedule


def fits(arrays: tuple[Sequence[Tensor], ...], plan: CascadePlan) -> bool:
    """Whether the plan's buffers have as many levels as the arrays, and room for each."""
    return all(
        len(given) == len(getattr(plan, name))
        and all(
            array.shape[0] <= buffer.shape[0]
            for array, buffer in zip(given, getattr(plan, name), strict=True)
        )
        for name, given in zip(_ARRAYS, arrays, strict=True)
    )


def _with_capacity(name: str, array: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` with room up to the next power of two (groups or pages), 4 at least."""
    is_indptr = name.endswith("indptr")
    length = array.shape[0] - 1 if is_indptr else array.shape[0]
    capacity = max(4, 1 << max(0, length - 1).bit_length()) + (1 if is_indptr else 0)
    buffer = torch.empty(capacity, dtype=torch.int32, device=device)
    _fill(buffer, array, repeat_last=is_indptr)
    torch._dynamo.maybe_mark_dynamic(buffer, 0)
    return buffer


def _fill(buffer: Tensor, array: Tensor, repeat_last: bool) -> None:
    """Copy `array` to the front of `buffer`; its tail repeats the last value, or is zero."""
    length = array.shape[0]
    buffer[:length].copy_(array, non_blocking=True)
    tail = buffer[length:]
    if repeat_last:
        tail.copy_(buffer[length - 1 : length].expand(tail.shape[0]))
    else:
        tail.zero_()


def check_arguments(
    arrays: tuple[Sequence[Tensor], ...],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_tokens: int | None,
) -> None:
    """What `plan_cascade` and the wrappers take, but for `out`."""
    _check_arrays(arrays)
    _check_numbers(num_qo_heads, num_kv_heads, head_dim, page_size, max_tokens)


def _check_arrays(arrays: tuple[Sequence[Tensor], ...]) -> None:
    for name, given in zip(_ARRAYS, arrays, strict=True):
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{name} is a {type(given).__name__}, expected a list with one tensor a level"
            )
        if len(given) != len(arrays[0]) or not 1 <= len(given) <= MAX_LEVELS:
            raise ValueError(
                f"{name} has {len(given)} levels and qo_indptr {len(arrays[0])}, expected as many, "
                f"1 to {MAX_LEVELS}"
            )
        for level in range(len(given)):
            check_index(f"{name}[{level}]", given[level])
    for level in range(len(arrays[0])):
        groups = arrays[0][level].shape[0] - 1
        if groups < 0:
            raise ValueError(f"qo_indptr[{level}] is empty, expected groups + 1 elements")
        for name, given, wanted in (
            ("kv_indptr", arrays[1], groups + 1),
            ("kv_last_page_len", arrays[3], groups),
        ):
            if given[level].shape[0] != wanted:
                raise ValueError(
                    f"{name}[{level}] has {given[level].shape[0]} elements, expected {wanted} for "
                    f"the {groups} groups of qo_indptr[{level}]"
                )


def _check_numbers(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, max_tokens: int | None
) -> None:
    check_int("num_qo_heads", num_qo_heads, 1)
    check_int("num_kv_heads", num_kv_heads, 1)
    check_int("head_dim", head_dim, 1)
    check_int("page_size", page_size, 1)
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, 0)
    if num_qo_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_qo_heads is {num_qo_heads}, expected a multiple of num_kv_heads = {num_kv_heads}"
        )


def _check_fits(
    arrays: tuple[Sequence[Tensor], ...], numbers: dict[str, Any], out: CascadePlan
) -> None:
    if not isinstance(out, CascadePlan):
        raise TypeError(f"out is a {type(out).__name__}, expected a CascadePlan")
    for name, value in numbers.items():
        if value != getattr(out, name):
            raise ValueError(f"{name} is {value}, expected {getattr(out, name)} as in out")
    for name, given in zip(_ARRAYS, arrays, strict=True):
        buffers = getattr(out, name)
        if len(given) != len(buffers):
            raise ValueError(f"{name} has {len(given)} levels, expected {len(buffers)} as in out")
        for level in range(len(given)):
            length, capacity = given[level].shape[0], buffers[level].shape[0]
            if length > capacity:
                raise ValueError(
                    f"{name}[{level}] has {length} elements, expected at most {capacity}, the "
                    "capacity of out"
                )
