"""The operators in Triton, for any CUDA device that it compiles for (compute capability 8.0 on)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..meta import library
from ..meta._library import NAMESPACE
from .attention import cascade_attention, cascade_attention_out
from .merge import (
    merge_state,
    merge_state_,
    merge_state_omd,
    merge_state_omd_,
    merge_states,
    merge_states_list,
    merge_states_ragged,
)
from .page import append_paged_kv_cache_

OPERATORS: dict[str, Callable[..., Any]] = {
    "merge_state": merge_state,
    "merge_state.omd": merge_state_omd,
    "merge_state_": merge_state_,
    "merge_state_.omd": merge_state_omd_,
    "merge_states": merge_states,
    "merge_states.list": merge_states_list,
    "merge_states.ragged": merge_states_ragged,
    "append_paged_kv_cache_": append_paged_kv_cache_,
    "cascade_attention": cascade_attention,
    "cascade_attention.out": cascade_attention_out,
    "cascade_attention.portable": cascade_attention_out,
}


def register() -> None:
    """Register them for CUDA, where a compiled library that was loaded before has no kernel."""
    for name, function in OPERATORS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
            library.impl(name, _on_its_device(function), "CUDA")


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @wraps(function)
    def launch(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        if first.get_device() == torch._C._cuda_getDevice():
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return launch
