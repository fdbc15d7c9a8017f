"""Checks of arguments: each names the argument, what it got and what it wants.

They run in eager mode and while Dynamo traces, so they look at types, shapes, dtypes and devices
only, never at what a tensor holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, value: Any, dim: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if dim is not None and value.dim() != dim:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {dim} dimensions, got {value.dim()}"
        )


def fits(value: Any, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether all is well with a tensor: a caller then need not look for what is not.

    Without a dtype, any floating one will do.
    """
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and (value.dtype == dtype if dtype is not None else value.is_floating_point())
        and value.device == device
        and not (value.requires_grad and torch.is_grad_enabled())
    )


def check_like(name: str, value: Tensor, shape: Sequence[int], like_name: str) -> None:
    if value.shape != tuple(shape):
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {list(shape)} to fit {like_name}"
        )


def check_dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {value.dtype}, expected {wanted}")


def check_device(name: str, value: Tensor, device: torch.device, like_name: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}, where {like_name} is")


def check_unit_stride(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(-1)} in its last dimension, expected 1 "
            "(contiguous there; any strides in the others)"
        )


def check_index(name: str, value: Any) -> None:
    """An index array: one-dimensional, int32, contiguous."""
    check_tensor(name, value, dim=1)
    check_dtype(name, value, (torch.int32,))
    check_unit_stride(name, value)


def check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected {minimum} or more")


def refuse_grad(**tensors: Tensor) -> None:
    """There are no backward formulas: raise rather than hand out a missing gradient."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but flashinfer_ops has no backward: call under "
                "torch.no_grad() or torch.inference_mode(), or detach it"
            )
