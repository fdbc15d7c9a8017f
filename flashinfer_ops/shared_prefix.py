"""FlashInfer's wrappers for one shared prefix: two attention calls, merged in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .attention import cascade_attention
from .checks import check_index, check_tensor
from .merge import merge_state_in_place
from .page import PagedKVCache
from .plan import CascadePlan, make_plan
from .wrappers import MultiLevelCascadeAttentionWrapper, check_data_types


class _SharedPrefixWrapper:
    """One prefix that all rows share, a plain tensor, and unique suffixes in a paged cache."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        """Create a wrapper.

        Args:
            float_workspace_buffer: accepted for compatibility; its device is where plans are made.
            kv_layout: "NHD" or "HND", of the shared tensors and of the unique cache.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        self._unique = MultiLevelCascadeAttentionWrapper(1, float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout
        self._shared: CascadePlan | None = None

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Keep another workspace buffer; see `MultiLevelCascadeAttentionWrapper`."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def end_forward(self) -> None:
        """Nothing to do; kept for FlashInfer's callers."""

    def _run(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: PagedKVCache,
        sm_scale: float | None = None,
    ) -> Tensor:
        plan = self._unique._plan
        if plan is None:
            raise RuntimeError("call begin_forward before forward")
        if sm_scale is not None:
            plan = replace(plan, sm_scale=float(sm_scale))
        check_tensor("k_shared", k_shared, dim=3)
        check_tensor("v_shared", v_shared, dim=3)
        out, lse = cascade_attention(q, unique_kv_cache, plan, self._kv_layout)
        shared_len = k_shared.shape[0 if self._kv_layout == "NHD" else 1]
        if shared_len > 0:
            shared_plan = self._shared_plan(q, shared_len, plan)
            shared_cache = (k_shared[None], v_shared[None])
            merge_state_in_place(
                out, lse, *cascade_attention(q, shared_cache, shared_plan, self._kv_layout)
            )
        return out

    def _shared_plan(self, q: Tensor, shared_len: int, unique: CascadePlan) -> CascadePlan:
        """The plan in which every row of q sees one page, the whole shared prefix."""
        plan = self._shared
        if (
            plan is None
            or plan.max_tokens != q.shape[0]
            or plan.page_size != shared_len
            or (plan.num_qo_heads, plan.num_kv_heads) != (unique.num_qo_heads, unique.num_kv_heads)
            or plan.head_dim != unique.head_dim
            or plan.schedule.device != q.device
        ):
            indptr = torch.arange(2, dtype=torch.int32, device=q.device)
            plan = make_plan(
                ([indptr * q.shape[0]], [indptr], [indptr[:1]], [indptr[1:] * shared_len]),
                q.device,
                num_qo_heads=unique.num_qo_heads,
                num_kv_heads=unique.num_kv_heads,
                head_dim=unique.head_dim,
                page_size=shared_len,
                max_tokens=q.shape[0],
                causal=False,
                sm_scale=unique.sm_scale,
                out=None,
            )
            self._shared = plan
        return replace(plan, sm_scale=unique.sm_scale)


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefixWrapper):
    """Decode attention, one query token a request, of a batch that shares one prefix.

    The prefix's KV is a plain tensor, each request's own KV is paged. Both parts are computed by
    `cascade_attention` where they lie, and merged in place.

    Members: `begin_forward`, `forward`, `end_forward`, `reset_workspace_buffer`.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> wrapper = flashinfer_ops.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(
        ...     torch.empty(1024, dtype=torch.uint8))
        >>> wrapper.begin_forward(i(0, 1, 2), i(1, 0), i(5, 9), 4, 2, 64, 16)
        >>> q, cache = torch.randn(2, 4, 64).half(), torch.randn(2, 2, 16, 2, 64).half()
        >>> k_shared, v_shared = torch.randn(2, 100, 2, 64).half()
        >>> wrapper.forward(q, k_shared, v_shared, cache).shape
        torch.Size([2, 4, 64])
    """

    def begin_forward(
        self,
        unique_kv_indptr: Tensor,
        unique_kv_indices: Tensor,
        unique_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str | torch.dtype = "float16",
    ) -> None:
        """Plan the unique part.

        Args:
            unique_kv_indptr: `[batch_size + 1]` int32, where each request's pages start.
            unique_kv_indices: `[pages]` int32, page numbers in the unique cache.
            unique_kv_last_page_len: `[batch_size]` int32, tokens in each request's last page.
            num_qo_heads, num_kv_heads, head_dim, page_size: as in `plan_cascade`.
            data_type: dtype of q and of all KV, or its name.

        Raises:
            TypeError, ValueError: as `plan_cascade`.
        """
        check_index("unique_kv_indptr", unique_kv_indptr)
        qo_indptr = torch.arange(
            unique_kv_indptr.shape[0], dtype=torch.int32, device=unique_kv_indptr.device
        )
        self._unique.plan(
            [qo_indptr],
            [unique_kv_indptr],
            [unique_kv_indices],
            [unique_kv_last_page_len],
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    def forward(
        self, q: Tensor, k_shared: Tensor, v_shared: Tensor, unique_kv_cache: PagedKVCache
    ) -> Tensor:
        """Attention of each request's token over the shared prefix and its own KV.

        Args:
            q: `[batch_size, num_qo_heads, head_dim]`.
            k_shared, v_shared: `[len, num_kv_heads, head_dim]` (NHD) or
                `[num_kv_heads, len, head_dim]` (HND).
            unique_kv_cache: paged cache of the requests' own KV; see `cascade_attention`.

        Returns:
            `[batch_size, num_qo_heads, head_dim]` in q's dtype.

        Raises:
            RuntimeError: `begin_forward` has not been called.
            TypeError, ValueError: as `cascade_attention`.
        """
        self._check_forward(q, unique_kv_cache)
        return self._run(q, k_shared, v_shared, unique_kv_cache)

    def _check_forward(self, q: Tensor, unique_kv_cache: PagedKVCache) -> None:
        if self._unique._dtypes is None:
            raise RuntimeError("call begin_forward before forward")
        check_data_types(self._unique._dtypes, q, unique_kv_cache)


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefixWrapper):
    """Attention of several query tokens a request, of a batch that shares one prefix.

    As `BatchDecodeWithSharedPrefixPagedKVCacheWrapper`, with any number of query tokens a request.

    Members: `begin_forward`, `forward`, `end_forward`, `reset_workspace_buffer`.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> wrapper = flashinfer_ops.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(
        ...     torch.empty(1024, dtype=torch.uint8))
        >>> wrapper.begin_forward(i(0, 3, 5), i(0, 1, 2), i(1, 0), i(5, 9), 4, 2, 64, 16)
        >>> q, cache = torch.randn(5, 4, 64), torch.randn(2, 2, 16, 2, 64)
        >>> k_shared, v_shared = torch.randn(2, 100, 2, 64)
        >>> wrapper.forward(q, k_shared, v_shared, cache, causal=True).shape
        torch.Size([5, 4, 64])
    """

    def begin_forward(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Plan the unique part.

        Args:
            qo_indptr: `[batch_size + 1]` int32, where each request's query rows start.
            paged_kv_indptr: `[batch_size + 1]` int32, where each request's pages start.
            paged_kv_indices: `[pages]` int32, page numbers in the unique cache.
            paged_kv_last_page_len: `[batch_size]` int32, tokens in each request's last page.
            num_qo_heads, num_kv_heads, head_dim, page_size: as in `plan_cascade`.

        Raises:
            TypeError, ValueError: as `plan_cascade`.
        """
        self._unique.plan(
            [qo_indptr],
            [paged_kv_indptr],
            [paged_kv_indices],
            [paged_kv_last_page_len],
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
        )

    def forward(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: PagedKVCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Attention of each request's rows over the shared prefix and its own KV.

        Args:
            q: `[tokens, num_qo_heads, head_dim]`.
            k_shared, v_shared: `[len, num_kv_heads, head_dim]` (NHD) or
                `[num_kv_heads, len, head_dim]` (HND).
            unique_kv_cache: paged cache of the requests' own KV; see `cascade_attention`.
            causal: a request's rows see its own KV only up to their own position.
            use_fp16_qk_reduction: accepted and ignored: accumulation is float32.
            sm_scale: factor of the logits; default `1 / sqrt(head_dim)`.
            rope_scale, rope_theta: ignored, since rotary embedding is not applied here.

        Returns:
            `[tokens, num_qo_heads, head_dim]` in q's dtype.

        Raises:
            RuntimeError: `begin_forward` has not been called.
            TypeError, ValueError: as `cascade_attention`.
        """
        plan = self._unique._plan
        if plan is not None and plan.causal != causal:
            self._unique.plan(
                plan.qo_indptr,
                plan.kv_indptr,
                plan.kv_indices,
                plan.kv_last_page_len,
                plan.num_qo_heads,
                plan.num_kv_heads,
                plan.head_dim,
                plan.page_size,
                causal=causal,
            )
        return self._run(q, k_shared, v_shared, unique_kv_cache, sm_scale)
