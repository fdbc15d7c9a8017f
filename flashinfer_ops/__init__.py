"""torch.compile-friendly operators for cascade attention, with FlashInfer's API."""

from importlib.metadata import version as _version

import torch as _torch

from . import cascade, meta, native, reference  # noqa: F401 (meta: the schemas)
from .attention import cascade_attention
from .cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
    variable_length_merge_states,
)
from .page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from .plan import CascadePlan, plan_cascade

__version__ = _version("flashinfer-ops")

# The C++ kernels take the CPU, and CUDA where torch has it and the library was built; Triton
# takes what it has for CUDA beyond that, plain PyTorch any device that has no kernels of its own.
native.load("_C")
native.load_cuda()
if _torch.version.cuda is not None:
    try:
        from . import triton_kernels
    except ImportError as _error:
        raise ImportError(
            f"flashinfer_ops: the Triton kernels for CUDA do not import: {_error}. "
            "Install Triton with `pip install 'triton>=3.6'`."
        ) from _error
    triton_kernels.register()
reference.register()

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "CascadePlan",
    "MultiLevelCascadeAttentionWrapper",
    "append_paged_kv_cache",
    "cascade",
    "cascade_attention",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "plan_cascade",
    "variable_length_merge_states",
]
