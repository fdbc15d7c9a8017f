"""The one `torch.library.Library` of the namespace `flashinfer_ops`, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

NAMESPACE = "flashinfer_ops"
library = torch.library.Library(NAMESPACE, "FRAGMENT")

F = TypeVar("F", bound=Callable[..., Any])


def define(schema: str) -> None:
    """Define an operator. Its fake follows it, registered by `register_fake`."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def register_fake(name: str) -> Callable[[F], F]:
    """Register the decorated function as the fake of the operator `name` (`op` or `op.overload`)."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)
