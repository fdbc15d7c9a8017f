"""Cascade attention on the CPU against what PyTorch itself offers, interleaved in one run.

    ours          cascade_attention on the paged cache
    sdpa          scaled_dot_product_attention over each request's full KV, one contiguous copy of
                  the prefix a request; gathering it is not timed
    aten cascade  PyTorch's flash kernel on the contiguous prefix, on the contiguous suffixes, and
                  the two states merged

Every round runs each contender once; medians over the rounds are printed, the best in brackets.
The KV of consecutive rounds lies in different caches, together larger than the last-level cache.
The streaming table holds requests that share nothing, in GB/s of KV, beside the machine's read
bandwidth: torch.sum over a large buffer, in the same rounds.

    python benchmarks/cpu_attention.py
    python benchmarks/cpu_attention.py --requests 8 --prefix 8192 --suffix 256 --dtype bfloat16
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashinfer_ops

PAGE_SIZE = 16
ROTATED_BYTES = 256 << 20  # of the caches that the rounds go through, together
PROBE_BYTES = 256 << 20
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((32, 2048, 64), (32, 512, 64), (16, 4096, 256), (8, 2048, 64), (64, 1024, 32))
STREAMING = (64, 512, 2048)

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Case:
    requests: int
    prefix: int
    suffix: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        tokens = self.requests * (self.prefix + self.suffix)
        return 4 * self.head_dim * self.num_qo_heads * tokens

    @property
    def kv_bytes(self) -> int:
        tokens = self.prefix + self.requests * self.suffix
        return 2 * tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def copies(self) -> int:
        return max(1, min(8, ROTATED_BYTES // self.kv_bytes))


@dataclass
class Times:
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


Contenders = dict[str, Callable[[int], object]]


def measure(contenders: Contenders, rounds: int) -> dict[str, Times]:
    times = {name: Times() for name in contenders}
    for run in contenders.values():
        run(0)
    for i in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(i)
            times[name].seconds.append(time.perf_counter() - start)
    return times


def paged(case: Case) -> tuple[flashinfer_ops.CascadePlan, list[tuple[Tensor, Tensor]]]:
    """The plan of a case and (q, cache) pairs that it fits."""
    shared = case.prefix // PAGE_SIZE
    own = -(-case.suffix // PAGE_SIZE)
    num_pages = shared + case.requests * own
    pages = torch.randperm(num_pages).int()
    rows = torch.arange(case.requests + 1, dtype=torch.int32)
    ends = torch.tensor([0, case.requests], dtype=torch.int32)
    last = torch.full((case.requests,), (case.suffix - 1) % PAGE_SIZE + 1, dtype=torch.int32)
    full = torch.tensor([PAGE_SIZE], dtype=torch.int32)
    first = torch.tensor([0, shared], dtype=torch.int32)
    levels = [(ends, first, pages[:shared], full)] if shared else []
    levels.append((rows, rows * own, pages[shared:], last))
    plan = flashinfer_ops.plan_cascade(
        *map(list, zip(*levels, strict=True)),
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=PAGE_SIZE,
    )
    kv_shape = (num_pages, 2, PAGE_SIZE, case.num_kv_heads, case.head_dim)
    q_shape = (case.requests, case.num_qo_heads, case.head_dim)
    inputs = [
        (torch.randn(q_shape).to(case.dtype), torch.randn(kv_shape).to(case.dtype))
        for _ in range(case.copies)
    ]
    return plan, inputs


def ours(case: Case) -> Callable[[int], object]:
    plan, inputs = paged(case)
    return lambda i: flashinfer_ops.cascade_attention(*inputs[i % len(inputs)], plan)


def contiguous(case: Case, requests: int, tokens: int) -> Tensor:
    shape = (2, requests, case.num_kv_heads, tokens, case.head_dim)
    return torch.randn(shape).to(case.dtype)


def sdpa(case: Case) -> Callable[[int], object]:
    k, v = contiguous(case, case.requests, case.prefix + case.suffix)
    q = torch.randn(case.requests, case.num_qo_heads, 1, case.head_dim).to(case.dtype)
    return lambda i: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def aten_cascade(case: Case) -> Callable[[int], object]:
    """The query heads of a KV head as its query rows: so flash reads KV once a group."""
    group = case.num_qo_heads // case.num_kv_heads
    q = torch.randn(case.requests, case.num_kv_heads, group, case.head_dim).to(case.dtype)
    caches = [
        (contiguous(case, 1, case.prefix), contiguous(case, case.requests, case.suffix))
        for _ in range(case.copies)
    ]

    def run(i: int) -> Tensor:
        (k_shared, v_shared), (k_own, v_own) = caches[i % len(caches)]
        rows = q.transpose(0, 1).reshape(1, case.num_kv_heads, -1, case.head_dim)
        v_a, s_a = flash(rows, k_shared, v_shared)
        v_b, s_b = flash(q, k_own, v_own)
        v_a = v_a.view(case.num_kv_heads, case.requests, group, case.head_dim).transpose(0, 1)
        s_a = s_a.reshape(case.num_kv_heads, case.requests, group).transpose(0, 1)
        s_b = s_b.reshape(case.requests, case.num_kv_heads, group)
        weight = torch.sigmoid(s_a - s_b).unsqueeze(-1)
        return torch.lerp(v_b.float(), v_a.float(), weight).to(case.dtype)

    return run


def probe() -> Callable[[int], object]:
    buffer = torch.ones(PROBE_BYTES // 4)
    return lambda i: buffer.sum()


def milliseconds(times: Times | None) -> str:
    return "" if times is None else f"{times.median * 1e3:.2f} ({times.best * 1e3:.2f})"


@click.command(context_settings={"show_default": True})
@click.option("--requests", type=int, help="One shape, not the table; with --prefix, --suffix.")
@click.option("--prefix", type=int, default=2048)
@click.option("--suffix", type=int, default=64)
@click.option("--num-qo-heads", type=int, default=32)
@click.option("--num-kv-heads", type=int, default=8)
@click.option("--head-dim", type=int, default=128)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES)
@click.option("--rounds", type=int, default=15)
@click.option("--threads", type=int, default=torch.get_num_threads)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@torch.inference_mode()
def main(
    requests: int | None,
    prefix: int,
    suffix: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtypes: tuple[str, ...],
    rounds: int,
    threads: int,
    json_path: Path | None,
) -> None:
    """Cascade attention on the CPU against PyTorch's own kernels."""
    torch.set_num_threads(threads)
    console = Console(width=120)
    heads = (num_qo_heads, num_kv_heads, head_dim)
    records = []

    def record(case: Case, times: dict[str, Times]) -> None:
        results = {name: {"median": t.median, "best": t.best} for name, t in times.items()}
        fields = asdict(case) | {"dtype": str(case.dtype), "threads": threads}
        records.append(fields | {"seconds": results})

    table = Table(title=f"Shared prefix, {threads} threads: ms, median (best)")
    shape_names = ("requests", "prefix", "suffix")
    for name in (*shape_names, "dtype", "ours", "GFLOP/s", "aten cascade", "sdpa"):
        table.add_column(name, justify="right")
    for shape in SHAPES if requests is None else ((requests, prefix, suffix),):
        for dtype in dtypes:
            case = Case(*shape, *heads, getattr(torch, dtype))
            contenders: Contenders = {"ours": ours(case)}
            if case.prefix > 0:
                contenders["aten cascade"] = aten_cascade(case)
            contenders["sdpa"] = sdpa(case)
            times = measure(contenders, rounds)
            record(case, times)
            cells = [milliseconds(times.get(name)) for name in ("ours", "aten cascade", "sdpa")]
            cells.insert(1, f"{case.flops / times['ours'].median / 1e9:.0f}")
            table.add_row(*map(str, shape), dtype, *cells)
    console.print(table)

    table = Table(title="Nothing shared: GB/s of KV, median (best), and the share of the bandwidth")
    for name in ("requests", "tokens each", "dtype", "ours", "read bandwidth", "share"):
        table.add_column(name, justify="right")
    for tokens in STREAMING if requests is None else (suffix,):
        for dtype in dtypes:
            case = Case(requests or 32, 0, tokens, *heads, getattr(torch, dtype))
            times = measure({"ours": ours(case), "probe": probe()}, rounds)
            record(case, times)
            got, limit = times["ours"], times["probe"]
            rate = [case.kv_bytes / x / 1e9 for x in (got.median, got.best)]
            bound = [PROBE_BYTES / x / 1e9 for x in (limit.median, limit.best)]
            cells = [f"{a:.1f} ({b:.1f})" for a, b in (rate, bound)]
            share = f"{rate[0] / bound[0]:.2f} ({rate[1] / bound[1]:.2f})"
            table.add_row(str(case.requests), str(tokens), dtype, *cells, share)
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
