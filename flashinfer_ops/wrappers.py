"""FlashInfer's multi-level wrapper, a thin cover of `plan_cascade` and `cascade_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .attention import cascade_attention
from .checks import check_device, check_index, check_tensor
from .page import PagedKVCache, check_layout
from .plan import CascadePlan, check_arguments, fits, make_plan, new_schedule

_Arrays = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class MultiLevelCascadeAttentionWrapper:
    """Attention over a paged KV cache whose prefixes are shared on several levels.

    `plan` lays out the work of a batch, once a step; `run` computes attention, once a layer.
    Planning again for a batch that fits into the same buffers (which have room to grow) keeps their
    addresses: compiled callers and captured graphs that hold them see the new batch.

    Members: `is_cuda_graph_enabled`, `reset_workspace_buffer`, `plan`, `run`, and the older names
    `begin_forward`, `end_forward`, `forward`, `forward_return_lse`.

    Example:
        >>> import torch, flashinfer_ops
        >>> i = lambda *x: torch.tensor(x, dtype=torch.int32)
        >>> wrapper = flashinfer_ops.MultiLevelCascadeAttentionWrapper(
        ...     2, torch.empty(1024, dtype=torch.uint8))
        >>> wrapper.plan(  # 2 requests share pages 0 and 1, own one each
        ...     [i(0, 2), i(0, 1, 2)], [i(0, 2), i(0, 1, 2)], [i(0, 1), i(2, 3)], [i(16), i(5, 9)],
        ...     num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
        >>> q, cache = torch.randn(2, 4, 64).half(), torch.randn(4, 2, 16, 2, 64).half()
        >>> wrapper.run(q, cache).shape
        torch.Size([2, 4, 64])
    """

    def __init__(
        self,
        num_levels: int | Tensor | None = None,
        float_workspace_buffer: Tensor | str | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[Tensor] | None = None,
    ) -> None:
        """Create a wrapper: `(num_levels, float_workspace_buffer, kv_layout="NHD", ...)`, or
        `(float_workspace_buffer, kv_layout="NHD")`, which takes the number of levels from `plan`.

        Args:
            num_levels: levels that `plan` will be given.
            float_workspace_buffer: accepted for compatibility; its device is where plans are made.
                The operators find their scratch memory themselves.
            kv_layout: "NHD" or "HND".
            use_cuda_graph: keep the index arrays in the buffers given next, for captured graphs.
            qo_indptr_buf_arr: for each level an int32 buffer of groups + 1 elements at most.
            paged_kv_indptr_buf_arr: as `qo_indptr_buf_arr`.
            paged_kv_indices_buf_arr: for each level an int32 buffer with room for all its pages.
            paged_kv_last_page_len_buf_arr: for each level an int32 buffer of as many groups.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        """
        if isinstance(num_levels, Tensor):
            if isinstance(float_workspace_buffer, str):
                kv_layout = float_workspace_buffer
            num_levels, float_workspace_buffer = None, num_levels
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        assert isinstance(float_workspace_buffer, Tensor)
        check_layout(kv_layout)
        if num_levels is not None and (not isinstance(num_levels, int) or num_levels < 1):
            raise ValueError(f"num_levels is {num_levels!r}, expected an int of 1 or more")
        self._num_levels = num_levels
        self._workspace = float_workspace_buffer
        self._device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._plan: CascadePlan | None = None
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None
        self._buffers: _Arrays | None = None
        if use_cuda_graph:
            self._buffers = self._check_buffers(
                {
                    "qo_indptr_buf_arr": qo_indptr_buf_arr,
                    "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
                    "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
                    "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
                }
            )

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the index arrays live in the buffers given to the constructor."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffers: Any = None
    ) -> None:
        """Keep another workspace buffer; plans are made on its device from now on.

        Args:
            float_workspace_buffer: see the constructor.
            int_workspace_buffers: accepted for compatibility.
        """
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        if float_workspace_buffer.device != self._device:
            if self._use_cuda_graph:
                check_device(
                    "float_workspace_buffer",
                    float_workspace_buffer,
                    self._device,
                    "qo_indptr_buf_arr",
                )
            self._plan = None
        self._workspace = float_workspace_buffer
        self._device = float_workspace_buffer.device

    def plan(
        self,
        qo_indptr_arr: Sequence[Tensor],
        paged_kv_indptr_arr: Sequence[Tensor],
        paged_kv_indices_arr: Sequence[Tensor],
        paged_kv_last_page_len: Sequence[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        custom_mask: Any = None,
        sinks: Any = None,
    ) -> None:
        """Plan the attention of a batch. The index arrays may be on any device.

        Args:
            qo_indptr_arr: for each level `[groups + 1]` int32, where each group's query rows start.
            paged_kv_indptr_arr: for each level `[groups + 1]` int32, where its pages start.
            paged_kv_indices_arr: for each level `[pages]` int32, page numbers in the cache.
            paged_kv_last_page_len: for each level `[groups]` int32, tokens in the last page.
            num_qo_heads, num_kv_heads, head_dim, page_size: as in `plan_cascade`.
            causal: rows of the last level see its KV only up to their own position.
            pos_encoding_mode: "NONE"; other modes are not there yet.
            use_fp16_qk_reduction: accepted and ignored: accumulation is float32.
            sm_scale: factor of the logits; default `1 / sqrt(head_dim)`.
            window_left: -1; windows are not there yet.
            logits_soft_cap: None or 0; soft caps are not there yet.
            rope_scale, rope_theta: used with a `pos_encoding_mode` only, hence ignored.
            q_data_type: dtype of q, or its name.
            kv_data_type: dtype of the cache, or its name; default that of q.
            custom_mask, sinks: None; not there yet.

        Raises:
            NotImplementedError: a feature that is not there yet, by the argument's name.
            TypeError, ValueError: as `plan_cascade`; more levels than `num_levels`, or arrays that
                do not fit into the CUDA-graph buffers. The earlier plan is then unchanged.
        """
        _refuse_features(
            pos_encoding_mode=(pos_encoding_mode, "NONE"),
            window_left=(window_left, -1),
            logits_soft_cap=(logits_soft_cap or None, None),
            custom_mask=(custom_mask, None),
            sinks=(sinks, None),
        )
        dtypes = _data_types(q_data_type, kv_data_type)
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        check_arguments(arrays, num_qo_heads, num_kv_heads, head_dim, page_size, None)
        if self._num_levels is not None and len(qo_indptr_arr) != self._num_levels:
            raise ValueError(
                f"qo_indptr_arr has {len(qo_indptr_arr)} levels, expected num_levels = "
                f"{self._num_levels}"
            )
        numbers: dict[str, Any] = {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "page_size": page_size,
            "max_tokens": None,
            "causal": bool(causal),
            "sm_scale": float(head_dim) ** -0.5 if sm_scale is None else float(sm_scale),
        }
        out = self._plan
        if out is None and self._buffers is not None:
            out = self._empty_plan(self._buffers, numbers)
        if out is not None and (self._use_cuda_graph or fits(arrays, out)):
            out = replace(out, **numbers)
        else:
            out = None
        self._plan = make_plan(arrays, self._device, out=out, **numbers)
        self._dtypes = dtypes

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedKVCache,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the planned batch; arguments and errors as `cascade_attention`.

        Args:
            q: `[tokens, num_qo_heads, head_dim]` in the planned `q_data_type`.
            paged_kv_cache: in the wrapper's `kv_layout` and the planned `kv_data_type`.
            out, lse: written instead of new tensors.
            return_lse: also return the base-2 log-sum-exp, `[tokens, num_qo_heads]` float32.
            k_scale, v_scale: factors of the keys and of the values.

        Returns:
            `out`, or `(out, lse)` with `return_lse`.

        Raises:
            RuntimeError: `plan` has not been called.
        """
        if self._plan is None or self._dtypes is None:
            raise RuntimeError("call plan before run")
        check_data_types(self._dtypes, q, paged_kv_cache)
        result = cascade_attention(
            q,
            paged_kv_cache,
            self._plan,
            self._kv_layout,
            out=out,
            lse=lse,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return result if return_lse else result[0]

    begin_forward = plan
    forward = run

    def forward_return_lse(
        self, q: Tensor, paged_kv_cache: PagedKVCache, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`run` with `return_lse=True`."""
        result = self.run(q, paged_kv_cache, **(options | {"return_lse": True}))
        assert isinstance(result, tuple)
        return result

    def end_forward(self) -> None:
        """Nothing to do; kept for FlashInfer's callers."""

    def _check_buffers(self, named: dict[str, Sequence[Tensor] | None]) -> _Arrays:
        levels = self._num_levels
        for name, buffers in named.items():
            if not isinstance(buffers, (list, tuple)):
                raise ValueError(
                    f"{name} is {buffers!r}, expected a list with one buffer a level, since "
                    "use_cuda_graph is set"
                )
            levels = levels or len(buffers)
            if len(buffers) != levels:
                raise ValueError(
                    f"{name} has {len(buffers)} buffers, expected {levels}, one a level"
                )
            for level, buffer in enumerate(buffers):
                check_index(f"{name}[{level}]", buffer)
                check_device(f"{name}[{level}]", buffer, self._device, "float_workspace_buffer")
        qo, kv, indices, last = (list(buffers or ()) for buffers in named.values())
        for level in range(len(qo)):
            groups = qo[level].shape[0] - 1
            if groups < 0 or kv[level].shape[0] != groups + 1 or last[level].shape[0] < groups:
                raise ValueError(
                    f"level {level}'s buffers have {qo[level].shape[0]} (qo_indptr_buf_arr), "
                    f"{kv[level].shape[0]} (paged_kv_indptr_buf_arr) and {last[level].shape[0]} "
                    "(paged_kv_last_page_len_buf_arr) elements, expected n + 1, n + 1 and n"
                )
            last[level] = last[level][:groups]
        return qo, kv, indices, last

    def _empty_plan(self, buffers: _Arrays, numbers: dict[str, Any]) -> CascadePlan:
        """A plan in the CUDA-graph buffers themselves, of no groups yet."""
        for arrays in buffers:
            for buffer in arrays:
                buffer.zero_()
                torch._dynamo.maybe_mark_dynamic(buffer, 0)
        qo, kv, indices, last = buffers
        shape = [numbers[n] for n in ("num_qo_heads", "num_kv_heads", "head_dim", "page_size")]
        schedule = new_schedule(qo, kv, last, *shape, numbers["causal"])
        return CascadePlan(qo, kv, indices, last, schedule, **numbers)


def _refuse_features(**features: tuple[Any, Any]) -> None:
    for name, (value, supported) in features.items():
        if value is not supported and (isinstance(value, Tensor) or value != supported):
            raise NotImplementedError(
                f"{name} is {value!r}, but this feature is not there yet; expected {supported!r}"
            )


def _data_types(
    q_data_type: str | torch.dtype, kv_data_type: str | torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    q_dtype = _data_type("q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else _data_type("kv_data_type", kv_data_type)
    if kv_dtype != q_dtype:
        raise NotImplementedError(
            f"kv_data_type is {kv_dtype}, but a cache of another dtype than q's is not there yet; "
            f"expected {q_dtype}"
        )
    return q_dtype, kv_dtype


def _data_type(name: str, value: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is {value!r}, expected a torch dtype or its name")
    if dtype.itemsize == 1 and dtype.is_floating_point:
        raise NotImplementedError(f"{name} is {dtype}, but fp8 is not there yet")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {dtype}, expected float32, float16 or bfloat16")
    return dtype


def check_data_types(
    dtypes: tuple[torch.dtype, torch.dtype], q: Tensor, paged_kv_cache: PagedKVCache
) -> None:
    check_tensor("q", q)
    k_cache = paged_kv_cache if isinstance(paged_kv_cache, Tensor) else paged_kv_cache[0]
    for name, tensor, dtype in (("q", q, dtypes[0]), ("paged_kv_cache", k_cache, dtypes[1])):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype} as planned")
