"""The one `torch.library.Library` of the namespace `flashinfer_ops`, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

NAMESPACE = "flashinfer_ops"
library = torch.library.Library(NAMESPACE, "FRAGMENT")

F = TypeVar("F", bound=Callable[..., Any])


def define(schema: str) -> None:
    """Define an operator. Its fake follows it, registered by `register_fake`."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def register_fake(name: str) -> Callable[[F], F]:
    """Register the decorated function as the fake of `name`, which is `op` or `op.overload`."""

    def register(fake: F) -> F:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return fake

    return register


def check(condition: bool, message: str) -> None:
    """A relation of shapes or dtypes that must hold; the shape solver knows it from then on."""
    torch._check(condition, lambda: message)


def check_shape(name: str, t: torch.Tensor, shape: Sequence[int | torch.SymInt | None]) -> None:
    """`t` has this shape, None standing for any size."""
    check(t.dim() == len(shape), f"{name} has {t.dim()} dimensions, expected {len(shape)}")
    for dim, size in enumerate(shape):
        if size is not None:
            check(t.shape[dim] == size, f"{name} has size {t.shape[dim]} in dim {dim}, not {size}")
