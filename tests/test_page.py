"""Appending to the paged KV cache, and the index arithmetic around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Append:
    """Sequences of random lengths in random pages, and rows for the ends of some of them."""

    def __init__(
        self,
        seed: int,
        page_size: int = 3,
        num_heads: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        batch: int = 9,
        padding: int = 2,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 4 * page_size + 1, (batch,), generator=g)
        counts = (lengths * torch.rand(batch, generator=g)).ceil().long()
        pages = (lengths + page_size - 1) // page_size
        total = int(pages.sum()) + 2
        zero = torch.zeros(1, dtype=torch.long)
        self.page_size = page_size
        self.lengths, self.counts = lengths.tolist(), counts.tolist()
        self.kv_indptr = torch.cat([zero, pages.cumsum(0)]).to(device, torch.int32)
        self.kv_indices = torch.randperm(total, generator=g)[: total - 2].to(device, torch.int32)
        last = lengths - (pages - 1) * page_size
        last[pages == 0] = 5  # must not matter
        self.last = last.to(device, torch.int32)
        self.append_indptr = torch.cat([zero, counts.cumsum(0)]).to(device, torch.int32)
        self.nnz = int(counts.sum()) + padding
        self.k, self.v = torch.randn(2, self.nnz, num_heads, head_dim, generator=g).to(
            device, dtype
        )
        self.cache = torch.randn(
            total, 2, page_size, num_heads, head_dim, generator=g
        ).to(device, dtype)  # fmt: skip
        self.seq_lens = flashinfer_ops.get_seq_lens(self.kv_indptr, self.last, page_size)
        self.batch, self.positions = flashinfer_ops.get_batch_indices_positions(
            self.append_indptr, self.seq_lens, self.nnz
        )

    def run(self, cache: Any, kv_layout: str = "NHD", **changes: Any) -> None:
        arguments = {
            "append_key": self.k,
            "append_value": self.v,
            "batch_indices": self.batch,
            "positions": self.positions,
            "paged_kv_cache": cache,
            "kv_indices": self.kv_indices,
            "kv_indptr": self.kv_indptr,
            "kv_last_page_len": self.last,
        }
        flashinfer_ops.append_paged_kv_cache(**{**arguments, **changes}, kv_layout=kv_layout)

    def expected(self) -> Tensor:
        """By a loop over sequences and tokens; everything else stays as it was."""
        cache, row = self.cache.clone(), 0
        for b, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            for token in range(length - count, length):
                page = self.kv_indices[self.kv_indptr[b] + token // self.page_size]
                cache[page, 0, token % self.page_size] = self.k[row]
                cache[page, 1, token % self.page_size] = self.v[row]
                row += 1
        return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["one", "tuple", "strided"])
def test_append(device: str, dtype: torch.dtype, page_size: int, kv_layout: str, form: str) -> None:
    append = Append(page_size, page_size, dtype=dtype, device=device)
    cache = append.cache if kv_layout == "NHD" else append.cache.transpose(2, 3).contiguous()
    given: Any = cache.clone()
    if form == "tuple":
        given = (cache[:, 0].clone(), cache[:, 1].clone())
    if form == "strided":  # every other page of a pool with wider heads
        pool = cache.new_full((2 * cache.shape[0], *cache.shape[1:-1], 12), 7.0)
        given = pool[::2, ..., 2:10]
        given.copy_(cache)
    append.run(given, kv_layout)
    result = torch.stack(given, 1) if form == "tuple" else given
    result = result if kv_layout == "NHD" else result.transpose(2, 3)
    assert torch.equal(result, append.expected())
    if form == "strided":
        given.fill_(7.0)
        assert bool((pool == 7.0).all())


@given(
    seed=st.integers(0, 10**6),
    page_size=st.integers(1, 20),
    num_heads=st.integers(1, 9),
    head_dim=st.integers(1, 130),
    batch=st.integers(0, 20),
    padding=st.integers(0, 3),
)
def test_drawn_shapes(seed: int, padding: int, batch: int, **numbers: int) -> None:
    append = Append(seed, batch=batch, padding=padding, **numbers)
    cache, by_reference = append.cache.clone(), append.cache.clone()
    append.run(cache)
    assert torch.equal(cache, append.expected())
    reference.append_paged_kv_cache_(
        append.k, append.v, append.batch, append.positions, by_reference[:, 0], by_reference[:, 1],
        append.kv_indices, append.kv_indptr,
    )  # fmt: skip
    assert torch.equal(by_reference, cache)


def test_strided_rows(device: str) -> None:
    append = Append(4, device=device)
    wide = torch.zeros(2, append.nnz, 2, 16, device=device)
    k, v = wide[0, ..., ::2], wide[1].transpose(1, 2).contiguous().transpose(1, 2)[..., :8]
    k.copy_(append.k), v.copy_(append.v)
    assert k.stride(-1) == 2 and not v.is_contiguous()
    cache = append.cache.clone()
    append.run(cache, append_key=k, append_value=v)
    assert torch.equal(cache, append.expected())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("batch", [0, 5])
def test_opcheck(device: str, kv_layout: str, batch: int) -> None:
    append = Append(1, batch=batch, device=device)
    cache = append.cache if kv_layout == "NHD" else append.cache.transpose(2, 3).contiguous()
    k_cache, v_cache = cache[:, 0].clone(), cache[:, 1].clone()
    if kv_layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    results = torch.library.opcheck(
        torch.ops.flashinfer_ops.append_paged_kv_cache_.default,
        (append.k, append.v, append.batch, append.positions, k_cache, v_cache, append.kv_indices,
         append.kv_indptr),
    )  # fmt: skip
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_two_views_of_one_cache(device: str) -> None:
    append = Append(1, device=device)
    cache = append.cache.clone()
    results = torch.library.opcheck(
        torch.ops.flashinfer_ops.append_paged_kv_cache_.default,
        (append.k, append.v, append.batch, append.positions, cache[:, 0], cache[:, 1],
         append.kv_indices, append.kv_indptr),
        test_utils=["test_schema", "test_faketensor"],
    )  # fmt: skip
    assert set(results.values()) == {"SUCCESS"}


def test_index_arithmetic(device: str) -> None:
    kv_indptr, last = int32(0, 2, 2, 5, device=device), int32(3, 7, 16, device=device)
    seq_lens = flashinfer_ops.get_seq_lens(kv_indptr, last, 16)
    assert seq_lens.dtype == torch.int32 and seq_lens.tolist() == [19, 0, 48]
    assert flashinfer_ops.get_seq_lens(kv_indptr, last, 1).tolist() == [4, 0, 18]
    indptr = int32(0, 2, 2, 5, device=device)
    batch, positions = flashinfer_ops.get_batch_indices_positions(indptr, seq_lens, 7)
    assert batch.dtype == positions.dtype == torch.int32
    assert batch.tolist() == [0, 0, 2, 2, 2, -1, -1]
    assert positions.tolist() == [17, 18, 45, 46, 47, 0, 0]
    none = flashinfer_ops.get_batch_indices_positions(
        int32(0, device=device), int32(device=device), 2
    )
    assert none[0].tolist() == [-1, -1] and none[1].tolist() == [0, 0]


def test_refusals(device: str) -> None:
    append = Append(0, device=device)
    before = append.cache.clone()
    for changes, error, message in [
        ({"append_key": append.k[0]}, ValueError, r"append_key has shape .* expected 3 dimensions"),
        ({"append_key": append.k.half()}, ValueError, r"append_key has dtype torch.float16"),
        ({"append_value": append.v[1:]}, ValueError, r"append_value has shape"),
        ({"append_value": append.v[..., :4]}, ValueError, r"append_value has shape"),
        ({"batch_indices": append.batch.long()}, ValueError, r"batch_indices has dtype"),
        ({"positions": append.positions[1:]}, ValueError, r"positions has shape"),
        ({"kv_indices": append.kv_indices.tolist()}, TypeError, r"kv_indices is a list"),
        ({"kv_indptr": append.kv_indptr[1:]}, ValueError, r"kv_indptr has \d+ elements, expected"),
        ({"kv_layout": "NDH"}, ValueError, r"kv_layout is 'NDH', expected 'NHD' or 'HND'"),
        ({"paged_kv_cache": append.cache[:, 0]}, ValueError, r"paged_kv_cache has shape"),
        ({"paged_kv_cache": (append.cache[:, 0],)}, ValueError, r"paged_kv_cache has 1 tensors"),
        ({"paged_kv_cache": 3}, TypeError, r"paged_kv_cache is a int"),
        (
            {"paged_kv_cache": append.cache.transpose(3, 4)},
            ValueError,
            r"paged_kv_cache has stride",
        ),
        (
            {"append_key": append.k.clone().requires_grad_()},
            ValueError,
            r"append_key requires grad",
        ),
    ]:
        with pytest.raises(error, match=message):
            append.run(append.cache, **changes)
    assert torch.equal(append.cache, before)
    with pytest.raises(ValueError, match=r"page_size is 0, expected 1 or more"):
        flashinfer_ops.get_seq_lens(append.kv_indptr, append.last, 0)
    with pytest.raises(TypeError, match=r"nnz is a float, expected an int"):
        flashinfer_ops.get_batch_indices_positions(append.append_indptr, append.seq_lens, 1.0)
    with pytest.raises(ValueError, match=r"append_indptr has 9 elements, expected 10"):
        flashinfer_ops.get_batch_indices_positions(append.append_indptr[1:], append.seq_lens, 1)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("batch_indices", 9, r"batch_indices\[1\] is 9, expected below 9"),
        ("positions", -1, r"positions\[1\] is -1, outside of the \d+ slots of sequence"),
        ("positions", 1000, r"positions\[1\] is 1000, outside of the \d+ slots of sequence"),
    ],
)
def test_bad_targets_leave_the_cache_as_it_was(name: str, value: int, message: str) -> None:
    append = Append(3)
    bad = {"batch_indices": append.batch, "positions": append.positions}[name].clone()
    bad[1] = value
    cache = append.cache.clone()
    with pytest.raises(RuntimeError, match=message):
        append.run(cache, **{name: bad})
    pages = append.kv_indices.clone()
    pages[:] = 10**6
    with pytest.raises(RuntimeError, match=r"kv_indices\[\d+\] is 1000000, outside of the cache"):
        append.run(cache, kv_indices=pages)
    assert torch.equal(cache, append.cache)
    with pytest.raises(RuntimeError, match="k_cache is written, but its elements in dim 0"):
        append.run(cache[:1].expand(cache.shape))
    with pytest.raises(RuntimeError, match="k_cache has pages of no tokens"):
        append.run(cache[:, :, :0])
