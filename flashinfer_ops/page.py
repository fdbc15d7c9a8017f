"""The paged KV cache: its two layouts, and appending new keys and values to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_dtype,
    check_index,
    check_int,
    check_like,
    check_tensor,
    check_unit_stride,
    refuse_grad,
)

PagedKVCache: TypeAlias = Tensor | Sequence[Tensor]

_ops = torch.ops.flashinfer_ops


def check_layout(kv_layout: Any) -> None:
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"kv_layout is {kv_layout!r}, expected 'NHD' or 'HND'")


def split_cache(paged_kv_cache: Any, kv_layout: str = "NHD") -> tuple[Tensor, Tensor]:
    """Views of the keys and the values, `[pages, page_size, num_kv_heads, head_dim]` each."""
    check_layout(kv_layout)
    if isinstance(paged_kv_cache, Tensor):
        check_tensor("paged_kv_cache", paged_kv_cache, dim=5)
        if paged_kv_cache.shape[1] != 2:
            raise ValueError(
                f"paged_kv_cache has shape {list(paged_kv_cache.shape)}, expected size 2 (keys "
                "and values) in dimension 1"
            )
        k_cache, v_cache = paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    elif isinstance(paged_kv_cache, (tuple, list)):
        if len(paged_kv_cache) != 2:
            raise ValueError(
                f"paged_kv_cache has {len(paged_kv_cache)} tensors, expected (k_cache, v_cache)"
            )
        k_cache, v_cache = paged_kv_cache
        check_tensor("paged_kv_cache[0]", k_cache, dim=4)
        check_tensor("paged_kv_cache[1]", v_cache, dim=4)
        check_like("paged_kv_cache[1]", v_cache, k_cache.shape, "paged_kv_cache[0]")
        check_dtype("paged_kv_cache[1]", v_cache, (k_cache.dtype,))
        check_device("paged_kv_cache[1]", v_cache, k_cache.device, "paged_kv_cache[0]")
    else:
        raise TypeError(
            f"paged_kv_cache is a {type(paged_kv_cache).__name__}, expected a 5-D tensor or a "
            "tuple of two 4-D tensors"
        )
    check_unit_stride("paged_kv_cache", k_cache)
    check_unit_stride("paged_kv_cache", v_cache)
    if kv_layout == "HND":
        return k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write new keys and values into the pages of a KV cache, in place.

    Row i goes to token `positions[i]` of sequence `batch_indices[i]`, whose pages must have been
    assigned before: `kv_indices`, `kv_indptr` and `kv_last_page_len` describe the cache after the
    append, as in FlashInfer.

    Args:
        append_key, append_value: `[nnz, num_kv_heads, head_dim]` in the cache's dtype.
        batch_indices: `[nnz]` int32; a negative one marks a padding row, which is skipped.
        positions: `[nnz]` int32, in tokens from the start of the sequence.
        paged_kv_cache: `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD),
            `[pages, 2, num_kv_heads, page_size, head_dim]` (HND), or a tuple of two such tensors
            without the dimension of size 2; written. Any strides but a contiguous last dimension.
        kv_indices: `[num_pages]` int32, the pages of all sequences.
        kv_indptr: `[batch_size + 1]` int32, where each sequence's pages start in `kv_indices`.
        kv_last_page_len: `[batch_size]` int32, tokens in each sequence's last page. Not needed to
            find the targets, and checked for its shape only.
        kv_layout: "NHD" or "HND".

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: on the CPU, a target outside of its sequence's pages or of the cache. The
            cache is then unchanged.

    Example:
        >>> import torch, flashinfer_ops
        >>> cache = torch.zeros(4, 2, 16, 8, 64)
        >>> kv_indices = torch.tensor([2, 0], dtype=torch.int32)
        >>> kv_indptr = torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> last = torch.tensor([3, 1], dtype=torch.int32)
        >>> append_indptr = torch.tensor([0, 3, 4], dtype=torch.int32)
        >>> seq_lens = flashinfer_ops.get_seq_lens(kv_indptr, last, 16)
        >>> batch, pos = flashinfer_ops.get_batch_indices_positions(append_indptr, seq_lens, 4)
        >>> k, v = torch.randn(2, 4, 8, 64)
        >>> flashinfer_ops.append_paged_kv_cache(
        ...     k, v, batch, pos, cache, kv_indices, kv_indptr, last)
        >>> bool((cache[2, 0, :3] == k[:3]).all())
        True
    """
    k_cache, v_cache = split_cache(paged_kv_cache, kv_layout)
    _, _, num_kv_heads, head_dim = k_cache.shape
    check_tensor("append_key", append_key, dim=3)
    nnz = append_key.shape[0]
    for name, rows in (("append_key", append_key), ("append_value", append_value)):
        check_tensor(name, rows, dim=3)
        check_like(name, rows, (nnz, num_kv_heads, head_dim), "append_key and paged_kv_cache")
        check_dtype(name, rows, (k_cache.dtype,))
        check_device(name, rows, k_cache.device, "paged_kv_cache")
    indices = {
        "batch_indices": batch_indices,
        "positions": positions,
        "kv_indices": kv_indices,
        "kv_indptr": kv_indptr,
        "kv_last_page_len": kv_last_page_len,
    }
    for name, index in indices.items():
        check_index(name, index)
        check_device(name, index, k_cache.device, "paged_kv_cache")
    check_like("batch_indices", batch_indices, (nnz,), "append_key")
    check_like("positions", positions, (nnz,), "append_key")
    if kv_indptr.shape[0] != kv_last_page_len.shape[0] + 1:
        raise ValueError(
            f"kv_indptr has {kv_indptr.shape[0]} elements, expected "
            f"{kv_last_page_len.shape[0] + 1}, one more than kv_last_page_len"
        )
    refuse_grad(append_key=append_key, append_value=append_value, paged_kv_cache=k_cache)
    _ops.append_paged_kv_cache_.default(
        append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr
    )


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Lengths in tokens of the sequences of a paged KV cache, `[batch_size]` int32.

    Args:
        kv_indptr: `[batch_size + 1]` int32, where each sequence's pages start.
        kv_last_page_len: `[batch_size]` int32, tokens in each sequence's last page.
        page_size: tokens a page.

    A sequence without pages has length 0, whatever its `kv_last_page_len`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Example:
        >>> import torch, flashinfer_ops
        >>> kv_indptr = torch.tensor([0, 2, 2], dtype=torch.int32)
        >>> last = torch.tensor([3, 7], dtype=torch.int32)
        >>> flashinfer_ops.get_seq_lens(kv_indptr, last, 16).tolist()
        [19, 0]
    """
    check_index("kv_indptr", kv_indptr)
    check_index("kv_last_page_len", kv_last_page_len)
    check_device("kv_last_page_len", kv_last_page_len, kv_indptr.device, "kv_indptr")
    check_int("page_size", page_size, 1)
    check_like("kv_last_page_len", kv_last_page_len, (kv_indptr.shape[0] - 1,), "kv_indptr")
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0)


def get_batch_indices_positions(
    append_indptr: Tensor, seq_lens: Tensor, nnz: int
) -> tuple[Tensor, Tensor]:
    """Which sequence each appended row belongs to, and at which token it stands there.

    Args:
        append_indptr: `[batch_size + 1]` int32: sequence b appends the rows `append_indptr[b]` to
            `append_indptr[b + 1] - 1`.
        seq_lens: `[batch_size]` int32, tokens of each sequence after the append.
        nnz: number of rows. Rows from `append_indptr[-1]` on are padding: batch index -1,
            position 0.

    Returns:
        `(batch_indices, positions)`, `[nnz]` int32 each, as `append_paged_kv_cache` takes them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Example:
        >>> import torch, flashinfer_ops
        >>> append_indptr = torch.tensor([0, 1, 3], dtype=torch.int32)
        >>> seq_lens = torch.tensor([4, 2], dtype=torch.int32)
        >>> batch, positions = flashinfer_ops.get_batch_indices_positions(
        ...     append_indptr, seq_lens, 4)
        >>> batch.tolist(), positions.tolist()
        ([0, 1, 1, -1], [3, 0, 1, 0])
    """
    check_index("append_indptr", append_indptr)
    check_index("seq_lens", seq_lens)
    check_device("seq_lens", seq_lens, append_indptr.device, "append_indptr")
    check_int("nnz", nnz, 0)
    if append_indptr.shape[0] != seq_lens.shape[0] + 1:
        raise ValueError(
            f"append_indptr has {append_indptr.shape[0]} elements, expected "
            f"{seq_lens.shape[0] + 1}, one more than seq_lens"
        )
    row = torch.arange(nnz, device=append_indptr.device)
    # Converted, and so a tensor of its own: torch 2.11's Inductor searches a slice from its base's
    # first element on (pytorch/pytorch#182343).
    ends = append_indptr[1:].long()
    batch = torch.searchsorted(ends, row, right=True)
    live = batch < ends.shape[0]
    # How far each sequence's end is ahead of its last row; one entry more for the padding rows.
    shift = torch.nn.functional.pad(seq_lens - ends, (0, 1))
    positions = torch.where(live, row + shift[batch], 0)
    return torch.where(live, batch, -1).int(), positions.int()
