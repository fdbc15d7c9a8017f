"""Every operator in plain PyTorch: the oracle of the tests (in float64, given float64 inputs), and
what serves devices that have no kernels of their own."""

from __future__ import annotations

from ..meta import library
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
from .plan import cascade_plan, cascade_plan_out

OPERATORS = {
    "merge_state": merge_state,
    "merge_state.omd": merge_state_omd,
    "merge_state_": merge_state_,
    "merge_state_.omd": merge_state_omd_,
    "merge_states": merge_states,
    "merge_states.list": merge_states_list,
    "merge_states.ragged": merge_states_ragged,
    "append_paged_kv_cache_": append_paged_kv_cache_,
    "cascade_plan": cascade_plan,
    "cascade_plan.out": cascade_plan_out,
    "cascade_attention": cascade_attention,
    "cascade_attention.out": cascade_attention_out,
    "cascade_attention.portable": cascade_attention_out,
}


def register() -> None:
    """Register them for every device without a kernel of its own."""
    for name, function in OPERATORS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
