"""The Triton append kernel: Triton's interpreter, and compilation for Ampere and Hopper."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_page import Append
from triton_helpers import CAPABILITIES, compiled_by, interpreted

from flashinfer_ops.triton_kernels import OPERATORS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
append_ = OPERATORS["append_paged_kv_cache_"]


def run(append: Append, cache: torch.Tensor, **changes: Any) -> None:
    """Into an NHD view of the cache, [pages, 2, page_size, num_kv_heads, head_dim]."""
    arguments = {
        "append_key": append.k,
        "append_value": append.v,
        "batch_indices": append.batch,
        "positions": append.positions,
        "k_cache": cache[:, 0],
        "v_cache": cache[:, 1],
        "kv_indices": append.kv_indices,
        "kv_indptr": append.kv_indptr,
    }
    append_(*{**arguments, **changes}.values())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("form", ["nhd", "hnd", "strided"])
def test_append(dtype: torch.dtype, page_size: int, form: str) -> None:
    append = Append(page_size, page_size, dtype=dtype, batch=4)
    cache, pool = append.cache.clone(), None
    if form == "hnd":
        cache = append.cache.transpose(2, 3).contiguous().transpose(2, 3)
    if form == "strided":  # every other page of a pool with wider heads
        pool = cache.new_full((2 * cache.shape[0], *cache.shape[1:-1], 12), 7.0)
        cache = pool[::2, ..., 2:10]
        cache.copy_(append.cache)
    run(append, cache)
    assert torch.equal(cache, append.expected())
    if pool is not None:
        cache.fill_(7.0)
        assert bool((pool == 7.0).all())


@interpreted
@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    page_size=st.integers(1, 8),
    num_heads=st.integers(1, 9),
    head_dim=st.integers(1, 130),
    batch=st.integers(0, 5),
    padding=st.integers(0, 3),
)
def test_drawn_shapes(seed: int, padding: int, batch: int, **numbers: int) -> None:
    append = Append(seed, batch=batch, padding=padding, **numbers)
    cache = append.cache.clone()
    run(append, cache)
    assert torch.equal(cache, append.expected())


@interpreted
def test_strided_rows_and_wide_heads() -> None:
    append = Append(4, batch=3, head_dim=2100)
    wide = torch.zeros(2, append.nnz, 2, 4200)
    k, v = wide[0, ..., ::2], wide[1].transpose(1, 2).contiguous().transpose(1, 2)[..., :2100]
    k.copy_(append.k), v.copy_(append.v)
    cache = append.cache.clone()
    run(append, cache, append_key=k, append_value=v)
    assert torch.equal(cache, append.expected())


@interpreted
def test_rows_without_a_sound_target_are_skipped() -> None:
    """Nothing else changes; the other rows are written."""
    append = Append(3)
    num_sequences = append.kv_indptr.shape[0] - 1
    for name, array, value in [
        ("batch_indices", append.batch, -1),
        ("batch_indices", append.batch, num_sequences),
        ("positions", append.positions, -1),
        ("positions", append.positions, 1000),
    ]:
        changed = array.clone()
        changed[1] = value
        cache = append.cache.clone()
        run(append, cache, **{name: changed})
        expected = append.expected()
        page = append.kv_indices[
            append.kv_indptr[append.batch[1]] + append.positions[1] // append.page_size
        ]
        slot = append.positions[1] % append.page_size
        expected[page, :, slot] = append.cache[page, :, slot]
        assert torch.equal(cache, expected)
    for page in (10**6, -1, append.cache.shape[0]):
        cache = append.cache.clone()
        run(append, cache, kv_indices=torch.full_like(append.kv_indices, page))
        assert torch.equal(cache, append.cache)
    cache = append.cache.clone()
    run(append, cache, kv_indices=append.kv_indices[:0])
    run(append, cache, kv_indptr=append.kv_indptr[:1])
    run(append, cache, kv_indptr=append.kv_indptr - 10**6)
    assert torch.equal(cache, append.cache)
    with pytest.raises(RuntimeError, match="k_cache has pages of no tokens"):
        run(append, append.cache[:, :, :0])


def test_a_cpu_only_torch_imports_no_triton() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code = "import sys, flashinfer_ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads,head_dim", [(8, 128), (1, 576), (3, 80), (2, 2100)])
def test_compiles(dtype: torch.dtype, num_heads: int, head_dim: int, capability: int) -> None:
    append = Append(0, 16, num_heads, head_dim, dtype)
    arguments = (append.k, append.v, append.batch, append.positions)
    cache = append.cache[:, 0], append.cache[:, 1]
    (kernel,) = compiled_by(
        capability, append_, *arguments, *cache, append.kv_indices, append.kv_indptr
    )
    ptx = kernel.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    if head_dim % 16 == 0:
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
