"""The names of FlashInfer's module `flashinfer.cascade`."""

from .merge import (
    merge_state,
    merge_state_in_place,
    merge_states,
    variable_length_merge_states,
)
from .shared_prefix import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from .wrappers import MultiLevelCascadeAttentionWrapper

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "variable_length_merge_states",
]
