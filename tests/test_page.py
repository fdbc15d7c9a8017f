"""The paged cache: appending in place, lengths, batch indices and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashinfer_ops
from flashinfer_ops.reference import page as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.flashinfer_ops


def batch(
    seed: int,
    num_requests: int,
    page_size: int,
    heads: int = 2,
    head_dim: int = 8,
    padding: int = 0,
) -> dict[str, Any]:
    """Sequences of 0 to 3 pages in random page order, each appending some of its last tokens."""
    g = torch.Generator().manual_seed(seed)
    seq_lens = torch.randint(0, 3 * page_size + 1, (num_requests,), generator=g)
    appended = (torch.rand(num_requests, generator=g) * (seq_lens + 1)).long()
    pages = (seq_lens + page_size - 1) // page_size
    zero = torch.zeros(1, dtype=torch.long)
    total = int(pages.sum())
    nnz = int(appended.sum()) + padding
    return {
        "append_key": torch.randn(nnz, heads, head_dim, generator=g),
        "append_value": torch.randn(nnz, heads, head_dim, generator=g),
        "append_indptr": torch.cat([zero, appended.cumsum(0)]).int(),
        "seq_lens": seq_lens.int(),
        "kv_indices": torch.randperm(total + 2, generator=g)[:total].int(),
        "kv_indptr": torch.cat([zero, pages.cumsum(0)]).int(),
        "kv_last_page_len": torch.where(pages > 0, seq_lens - (pages - 1) * page_size, 0).int(),
        "cache_shape": (total + 2, 2, page_size, heads, head_dim),
    }


def append(b: dict[str, Any], cache: Any, kv_layout: str = "NHD", dtype: Any = None) -> None:
    key, value = b["append_key"], b["append_value"]
    indices, positions = flashinfer_ops.get_batch_indices_positions(
        b["append_indptr"], b["seq_lens"], key.shape[0]
    )
    flashinfer_ops.append_paged_kv_cache(
        key.to(dtype or key.dtype),
        value.to(dtype or key.dtype),
        indices,
        positions,
        cache,
        b["kv_indices"],
        b["kv_indptr"],
        b["kv_last_page_len"],
        kv_layout,
    )


def by_hand(b: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The cache after the append, one token after another."""
    cache = torch.full(b["cache_shape"], -7.0, dtype=dtype)
    page_size = cache.shape[2]
    for request in range(len(b["seq_lens"])):
        begin, end = b["append_indptr"][request : request + 2].tolist()
        for i in range(begin, end):
            position = int(b["seq_lens"][request]) - (end - i)
            page = b["kv_indices"][int(b["kv_indptr"][request]) + position // page_size]
            cache[page, 0, position % page_size] = b["append_key"][i].to(dtype)
            cache[page, 1, position % page_size] = b["append_value"][i].to(dtype)
    return cache


def move(b: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append(device: str, dtype: torch.dtype, kv_layout: str, page_size: int) -> None:
    b = batch(page_size, 9, page_size, padding=2)
    expected = by_hand(b, dtype)
    if kv_layout == "HND":
        expected = expected.transpose(2, 3)
    b = move(b, device)
    cache = torch.full(expected.shape, -7.0, dtype=dtype, device=device)
    append(b, cache, kv_layout, dtype)
    assert torch.equal(cache.cpu(), expected)
    halves = torch.full_like(cache[:, 0], -7.0), torch.full_like(cache[:, 0], -7.0)
    append(b, halves, kv_layout, dtype)
    assert torch.equal(torch.stack(halves, 1).cpu(), expected)


@given(
    seed=st.integers(0, 999),
    num_requests=st.integers(0, 12),
    page_size=st.integers(1, 20),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    padding=st.integers(0, 3),
)
def test_append_drawn(
    seed: int, num_requests: int, page_size: int, heads: int, head_dim: int, padding: int
) -> None:
    b = batch(seed, num_requests, page_size, heads, head_dim, padding)
    cache = torch.full(b["cache_shape"], -7.0)
    append(b, cache)
    assert torch.equal(cache, by_hand(b, torch.float32))
    lens = flashinfer_ops.get_seq_lens(b["kv_indptr"], b["kv_last_page_len"], page_size)
    assert lens.dtype == torch.int32 and torch.equal(lens, b["seq_lens"])


def test_append_strided(device: str) -> None:
    """Keys and values sliced from one projection, a cache that is a slice of a larger one."""
    b = move(batch(1, 6, 4), device)
    expected = by_hand(move(b, "cpu"), torch.float32)
    packed = torch.cat([b["append_key"], b["append_value"]], 1)
    b["append_key"], b["append_value"] = packed[:, :2], packed[:, 2:]
    large = torch.full((3, *expected.shape), -7.0, device=device)
    append(b, large[1])
    assert torch.equal(large[1].cpu(), expected)
    assert bool((large[::2] == -7.0).all())
    b["append_key"] = b["append_key"].mT.contiguous().mT  # last dimension not contiguous
    again = torch.full_like(large[1], -7.0)
    append(b, again)
    assert torch.equal(again.cpu(), expected)


def test_reference_agrees() -> None:
    b = batch(4, 7, 5, padding=1)
    cache = torch.full(b["cache_shape"], -7.0)
    indices, positions = flashinfer_ops.get_batch_indices_positions(
        b["append_indptr"], b["seq_lens"], b["append_key"].shape[0]
    )
    reference.append_paged_kv_cache_(
        b["append_key"],
        b["append_value"],
        indices,
        positions,
        cache[:, 0],
        cache[:, 1],
        b["kv_indices"],
        b["kv_indptr"],
    )
    assert torch.equal(cache, by_hand(b, torch.float32))


def test_batch_indices_positions(device: str) -> None:
    append_indptr = int32(0, 0, 3, 3, 5, device=device)
    seq_lens = int32(4, 3, 0, 7, device=device)
    indices, positions = flashinfer_ops.get_batch_indices_positions(append_indptr, seq_lens, 7)
    assert indices.dtype == positions.dtype == torch.int32
    assert indices.tolist() == [1, 1, 1, 3, 3, -1, -1]
    assert positions.tolist() == [0, 1, 2, 5, 6, 0, 0]
    empty = flashinfer_ops.get_batch_indices_positions(append_indptr[:1], seq_lens[:0], 2)
    assert [t.tolist() for t in empty] == [[-1, -1], [0, 0]]


def test_seq_lens_of_sequences_without_pages(device: str) -> None:
    lens = flashinfer_ops.get_seq_lens(
        int32(0, 0, 2, 2, 3, device=device), int32(5, 1, 16, 16, device=device), 16
    )
    assert lens.tolist() == [0, 17, 0, 16]


def test_bad_indices_write_nothing() -> None:
    b = batch(2, 6, 4)
    nnz = b["append_key"].shape[0]
    good = flashinfer_ops.get_batch_indices_positions(b["append_indptr"], b["seq_lens"], nnz)
    for field, value, message in (
        ("batch_indices", 6, "batch_indices.* is 6, expected below 6"),
        ("positions", 99, "positions.* is 99, outside of the"),
        ("positions", -1, "positions.* is -1, outside of the"),
        ("kv_indices", 10**6, "kv_indices.* is 1000000, outside of the cache"),
        ("kv_indices", -1, "kv_indices.* is -1, outside of the cache"),
    ):
        args = {"batch_indices": good[0], "positions": good[1], "kv_indices": b["kv_indices"]}
        args[field] = args[field].clone()
        if field == "kv_indices":
            args[field][:] = value
        else:
            args[field][-1] = value
        cache = torch.full(b["cache_shape"], -7.0)
        with pytest.raises(RuntimeError, match=message):
            flashinfer_ops.append_paged_kv_cache(
                b["append_key"],
                b["append_value"],
                args["batch_indices"],
                args["positions"],
                cache,
                args["kv_indices"],
                b["kv_indptr"],
                b["kv_last_page_len"],
            )
        assert bool((cache == -7.0).all())


def bad_calls() -> list[tuple[Callable[[], object], type[Exception], str]]:
    b = batch(2, 6, 4)
    key = b["append_key"]
    cache = torch.zeros(b["cache_shape"])
    index = torch.zeros(key.shape[0], dtype=torch.int32)

    def call(**changes: Any) -> None:
        arguments = {
            "append_key": key,
            "append_value": key,
            "batch_indices": index,
            "positions": index,
            "paged_kv_cache": cache,
            "kv_indices": b["kv_indices"],
            "kv_indptr": b["kv_indptr"],
            "kv_last_page_len": b["kv_last_page_len"],
        }
        flashinfer_ops.append_paged_kv_cache(**(arguments | changes))

    f = flashinfer_ops
    return [
        (lambda: call(append_key=key[0]), ValueError, "append_key has shape .*, expected 3 dim"),
        (lambda: call(append_value=key[1:]), ValueError, "append_value has shape"),
        (lambda: call(append_key=key[..., :4]), ValueError, "append_key has shape"),
        (lambda: call(append_value=key.half()), ValueError, "append_value has dtype torch.float16"),
        (lambda: call(positions=index.long()), ValueError, "positions has dtype torch.int64"),
        (lambda: call(batch_indices=index[1:]), ValueError, "batch_indices has shape"),
        (lambda: call(kv_indptr=index[:3]), ValueError, "kv_indptr has 3 elements, expected 7"),
        (lambda: call(paged_kv_cache=cache[:, 0]), ValueError, "paged_kv_cache has shape"),
        (lambda: call(paged_kv_cache=cache[:, :1]), ValueError, "expected size 2"),
        (lambda: call(paged_kv_cache=(cache,)), ValueError, "paged_kv_cache has 1 tensors"),
        (lambda: call(paged_kv_cache=7), TypeError, "paged_kv_cache is a int"),
        (lambda: call(paged_kv_cache=cache.mT.contiguous().mT), ValueError, "has stride 2 in"),
        (lambda: call(kv_layout="HDN"), ValueError, "kv_layout is 'HDN'"),
        (lambda: call(append_key=key.clone().requires_grad_()), ValueError, "append_key requires"),
        (lambda: f.get_seq_lens(index.long(), index, 4), ValueError, "kv_indptr has dtype"),
        (lambda: f.get_seq_lens(index, index, 4), ValueError, "kv_last_page_len has shape"),
        (lambda: f.get_seq_lens(index, index[1:], 0), ValueError, "page_size is 0, expected 1"),
        (lambda: f.get_seq_lens(index, index[1:], 1.5), TypeError, "page_size is a float"),
        (lambda: f.get_batch_indices_positions(index, index, 3), ValueError, "append_indptr has"),
        (lambda: f.get_batch_indices_positions(index, index[1:], -1), ValueError, "nnz is -1"),
    ]


@pytest.mark.parametrize("index", range(len(bad_calls())))
def test_bad_input(index: int) -> None:
    call, error, message = bad_calls()[index]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    b = move(batch(3, 6, 4), device)
    indices, positions = flashinfer_ops.get_batch_indices_positions(
        b["append_indptr"], b["seq_lens"], b["append_key"].shape[0]
    )
    key, value = b["append_key"].to(dtype), b["append_value"].to(dtype)
    cache = torch.zeros(b["cache_shape"], dtype=dtype, device=device)
    two = cache[:, 0].clone(), cache[:, 1].clone()
    hnd = torch.zeros_like(cache).transpose(2, 3).contiguous().transpose(2, 3)
    for k_cache, v_cache in (two, (hnd[:, 0].clone(), hnd[:, 1].clone())):
        torch.library.opcheck(
            ops.append_paged_kv_cache_.default,
            (key, value, indices, positions, k_cache, v_cache, b["kv_indices"], b["kv_indptr"]),
        )
    torch.library.opcheck(
        ops.append_paged_kv_cache_.default,
        (key[:0], value[:0], indices[:0], positions[:0], *two, b["kv_indices"], b["kv_indptr"]),
    )
