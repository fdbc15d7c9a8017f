"""Forests of shared KV, drawn at random with poison where nothing may be read; and the oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from flashinfer_ops import cascade_attention, plan_cascade
from flashinfer_ops.reference import attention as reference_attention

# Relative error ||out - oracle|| / ||oracle|| allowed for a dtype, and absolute error of an lse.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


PLAIN_PACKAGE = """
import tempfile, torch
program = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
with tempfile.TemporaryDirectory() as folder:
    path = torch._inductor.aoti_compile_and_package(program, package_path=folder + "/relu.pt2")
    print(torch._inductor.aoti_load_package(path)(torch.ones(2)))
"""


@cache
def packages_load() -> bool:
    """Whether AOTInductor serves a model of torch's own here. On some machines the load crashes,
    or never ends."""
    command = [sys.executable, "-c", PLAIN_PACKAGE]
    try:
        result = subprocess.run(command, check=False, capture_output=True, timeout=100)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def needs_packages(device: str) -> None:
    """Skip where torch cannot load what AOTInductor made; the CPU half must never be skipped."""
    if device == "cuda" and not packages_load():
        pytest.skip("torch cannot load an AOTInductor package of ReLU on this machine")


def int32(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.to(expected.device).double(), expected.double()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_lse_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.to(expected.device).double(), expected.double(), atol=tolerance, rtol=1e-6
    )


@dataclass
class Forest:
    """A batch of cascade attention: index arrays, a paged cache in NHD views, and queries."""

    qo_indptr: list[Tensor]
    kv_indptr: list[Tensor]
    kv_indices: list[Tensor]
    kv_last_page_len: list[Tensor]
    cache: Tensor  # [pages, 2, page_size, num_kv_heads, head_dim], NaN in every dead slot
    q: Tensor  # [tokens, num_qo_heads, head_dim]
    page_size: int

    @property
    def arrays(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_last_page_len

    @property
    def numbers(self) -> dict[str, int]:
        return {
            "num_qo_heads": self.q.shape[1],
            "num_kv_heads": self.cache.shape[3],
            "head_dim": self.q.shape[2],
            "page_size": self.page_size,
        }

    def cache_as(self, kv_layout: str, as_tuple: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The cache in a layout, and as one tensor or two that do not lie beside each other."""
        cache = self.cache if kv_layout == "NHD" else self.cache.transpose(2, 3).contiguous()
        return (cache[:, 0].contiguous(), cache[:, 1].contiguous()) if as_tuple else cache

    def oracle(
        self,
        causal: bool = False,
        sm_scale: float | None = None,
        v_scale: float = 1.0,
        device: str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Output and lse in float64, computed on the CPU unless another device is named."""
        indices = [t.to(device) for t in self.kv_indices]
        # Only the pages in use, renumbered: the cache may be too large to convert.
        used, renumbered = torch.unique(torch.cat(indices), return_inverse=True)
        cache = self.cache[used.to(self.cache.device)].to(device).double()
        arrays = [[t.to(device) for t in level] for level in self.arrays]
        arrays[2] = list(renumbered.split([len(t) for t in indices]))
        scale = self.q.shape[2] ** -0.5 if sm_scale is None else sm_scale
        q, schedule = self.q.to(device).double(), torch.empty(0)
        return reference_attention.cascade_attention(
            q, cache[:, 0], cache[:, 1], *arrays, schedule, causal, scale, v_scale
        )


def attend(
    forest: Forest, layout: str = "NHD", cache: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Output and lse by a plan of the forest; `options` are the plan's."""
    plan = plan_cascade(*forest.arrays, **forest.numbers, **options)
    cache = forest.cache_as(layout) if cache is None else cache
    return cascade_attention(forest.q, cache, plan, layout)


def check_attention(
    actual: tuple[Tensor, Tensor],
    forest: Forest,
    *oracle_options: Any,
    each_row: bool = True,
    contiguous: bool = True,
) -> None:
    """Output and lse against float64, on the device of the forest."""
    out, lse = actual
    expected, expected_lse = forest.oracle(*oracle_options, device=str(forest.q.device))
    assert out.shape == forest.q.shape and out.dtype == forest.q.dtype
    assert lse.shape == forest.q.shape[:2] and lse.dtype == torch.float32
    if contiguous:
        assert out.is_contiguous() and lse.is_contiguous()
    assert relative_error(out, expected) < TOLERANCE[out.dtype]
    assert_lse_close(lse, expected_lse, LSE_TOLERANCE[out.dtype])
    assert not out[lse == -torch.inf].any()
    if not each_row:
        return
    # Every row alone: a wrong one must not hide among many. A row's error is a few times larger.
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    seen = lse != -torch.inf
    if bool(seen.any()):
        assert float(error[seen].max()) < 10 * TOLERANCE[out.dtype]


def random_forest(
    seed: int,
    *,
    num_levels: int,
    num_requests: int,
    num_qo_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    max_kv_len: int = 70,
    max_qo_len: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    nested: bool = True,
    extra_rows: int = 0,
) -> Forest:
    """Draw a forest. The last level's groups are the requests, `max_qo_len` rows each at most.

    One group in six has no KV, one request in eight no rows. With `nested`, the groups of a level
    are unions of groups of the next; otherwise each level cuts the rows where it likes. The last
    `extra_rows` rows of q belong to no request.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=g)

    rows = draw(1, max_qo_len, num_requests) * (draw(0, 7, num_requests) > 0)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), rows.cumsum(0)])
    tokens = int(borders[-1])
    levels = [borders]
    for _ in range(num_levels - 1):
        if nested:  # some of the borders below
            inner = levels[0][1:-1]
            inner = inner[torch.rand(len(inner), generator=g) < 0.4]
        else:
            inner = draw(0, tokens, int(draw(0, 4, 1))).sort().values
        levels.insert(0, torch.cat([borders[:1], inner, borders[-1:]]))

    lengths = [
        draw(1, max_kv_len, len(level) - 1) * (draw(0, 5, len(level) - 1) > 0) for level in levels
    ]
    return lay_out(
        g, levels, lengths, num_qo_heads, num_kv_heads, head_dim, page_size, dtype, device,
        extra_rows,
    )  # fmt: skip


def forest_of(
    rows: list[list[int]],
    lengths: list[list[int]],
    *,
    seed: int = 0,
    num_qo_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    extra_rows: int = 0,
) -> Forest:
    """The forest whose groups have so many query rows and so much KV, level by level."""
    borders = [torch.tensor([0, *level]).cumsum(0) for level in rows]
    return lay_out(
        torch.Generator().manual_seed(seed), borders, [torch.tensor(level) for level in lengths],
        num_qo_heads, num_kv_heads, head_dim, page_size, dtype, device, extra_rows,
    )  # fmt: skip


def lay_out(
    g: torch.Generator,
    levels: list[Tensor],
    lengths: list[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    extra_rows: int,
) -> Forest:
    """Random KV of so many tokens a group in random pages, for groups with these row borders."""
    pages = [(length + page_size - 1) // page_size for length in lengths]
    total = int(sum(int(p.sum()) for p in pages))
    order = torch.randperm(total + 3, generator=g)  # three pages stay unused
    cache = torch.randn(
        total + 3, 2, page_size, num_kv_heads, head_dim, generator=g, dtype=torch.float32
    )
    live = torch.zeros(total + 3, page_size, dtype=torch.bool)
    kv_indptr, kv_indices, last_page_len, used = [], [], [], 0
    for length, count in zip(lengths, pages, strict=True):
        indices = order[used : used + int(count.sum())]
        used += int(count.sum())
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
        no_matter = torch.randint(0, 10, (len(count),), generator=g)
        last = torch.where(count > 0, length - (count - 1) * page_size, no_matter)
        live[indices] = True
        for group in range(len(count)):
            if count[group] > 0:
                live[indices[indptr[group + 1] - 1], last[group] :] = False
        kv_indptr.append(indptr)
        kv_indices.append(indices)
        last_page_len.append(last)
    cache.permute(0, 2, 1, 3, 4)[~live] = float("nan")
    q = torch.randn(int(levels[-1][-1]) + extra_rows, num_qo_heads, head_dim, generator=g)

    def move(arrays: list[Tensor]) -> list[Tensor]:
        return [t.to(device, torch.int32) for t in arrays]

    return Forest(
        move(levels),
        move(kv_indptr),
        move(kv_indices),
        move(last_page_len),
        cache.to(device, dtype),
        q.to(device, dtype),
        page_size,
    )


def poison_free_memory(device: str) -> None:
    """Leave NaN in the memory that PyTorch's allocator hands out next: unwritten outputs show."""
    sizes = [1 << 10] * 64 + [1 << 17] * 64 + [1 << 20] * 16 + [1 << 24] * 8
    tensors = [torch.full((size,), float("nan"), device=device) for size in sizes]
    del tensors


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor made without values, scratch memory too, holds NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
