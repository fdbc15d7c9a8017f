"""Forests of shared KV for `benchmarks/cascade.py`: where they come from, their limit, their data.

A forest has levels of groups from the roots to the requests; a group's children are consecutive.
Its limit is the larger of two times: bytes over memory bandwidth (each piece of KV once, q and
out) and floating-point operations over peak, `4 * head_dim` for each packed row and visible token.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROTATED_BYTES = 230e6  # of the KV caches that one graph goes through, together
MAX_COPIES = 256


@dataclass(frozen=True)
class Level:
    requests: np.ndarray  # [groups] requests under each group
    tokens: np.ndarray  # [groups] KV tokens of each group


@dataclass(frozen=True)
class Rates:
    """What the machine can do at best."""

    bytes_per_s: float = 3.35e12
    flops_per_s: float = 989e12


@dataclass(frozen=True)
class Forest:
    set: str
    name: str
    levels: list[Level]
    qo_lens: np.ndarray  # [requests] query tokens of each request
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    causal: bool
    peers_us: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.qo_lens.sum())

    @property
    def num_pages(self) -> int:
        return sum(int((-(-level.tokens // self.page_size)).sum()) for level in self.levels)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def cache_shape(self) -> tuple[int, ...]:
        return (self.num_pages, 2, self.page_size, self.num_kv_heads, self.head_dim)

    @property
    def copies(self) -> int:
        """KV caches to go through, so that KV comes from memory and not from the L2 cache."""
        cache_bytes = max(1, math.prod(self.cache_shape)) * self.torch_dtype.itemsize
        return min(MAX_COPIES, math.ceil(ROTATED_BYTES / cache_bytes))

    @property
    def bytes(self) -> int:
        kv = 2 * self.num_kv_heads * sum(int(level.tokens.sum()) for level in self.levels)
        q_and_out = 2 * self.num_qo_heads * self.num_tokens
        return (kv + q_and_out) * self.head_dim * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        above = sum(np.repeat(level.tokens, level.requests) for level in self.levels[:-1])
        own = self.levels[-1].tokens
        pairs = int((self.qo_lens * (above + own)).sum())
        if self.causal:  # the last row sees all, the one before it one token less, and so on
            for rows, tokens in zip(self.qo_lens, own, strict=True):
                pairs -= int(np.minimum(np.arange(rows), tokens).sum())
        return 4 * self.head_dim * self.num_qo_heads * pairs

    def limit_us(self, rates: Rates) -> float:
        return 1e6 * max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


def read_anchors(path: Path) -> tuple[Rates, list[Forest]]:
    """The forests of an anchors file, and the rates of its machine.

    Raises:
        ValueError: a limit of the file is more than 2% off what its forest gives.
    """
    anchors = json.loads(path.read_text())
    rates = Rates(anchors["hbm_bytes_per_s"], anchors["flops_per_s"])
    forests = [_from_anchor(entry) for entry in anchors["attention"]]
    for entry, forest in zip(anchors["attention"], forests, strict=True):
        got, wanted = forest.limit_us(rates), entry["limit_us"]
        # The file's limits are rounded to 0.01 us.
        if abs(got - wanted) > 0.02 * wanted + 0.005:
            raise ValueError(f"{forest.name}: the limit is {got:.3f} us, {wanted} in {path}")
    return rates, forests


def _from_anchor(entry: dict[str, Any]) -> Forest:
    requests = entry["levels"][-1]["nodes"]
    levels = []
    for level in entry["levels"]:
        nodes = level["nodes"]
        if requests % nodes:
            raise ValueError(f"{entry['name']}: {requests} requests under {nodes} nodes")
        levels.append(Level(np.full(nodes, requests // nodes), np.full(nodes, level["tokens"])))
    copied = (
        *("set", "name", "num_qo_heads", "num_kv_heads", "head_dim", "page_size"),
        *("dtype", "causal"),
    )
    return Forest(
        levels=levels,
        qo_lens=np.full(requests, entry["qo_len"]),
        peers_us=entry["us"],
        **{name: entry[name] for name in copied},
    )


def ragged_forests() -> list[Forest]:
    """Forests whose groups are all different, as they are in serving; the same on every call."""
    rng = np.random.default_rng(0)

    def forest(
        name: str,
        levels: list[Level],
        qo_lens: np.ndarray | None = None,
        heads: tuple[int, int] = (32, 8),
        dtype: str = "float16",
        page_size: int = 16,
        causal: bool = False,
    ) -> Forest:
        requests = len(levels[-1].tokens)
        qo_lens = np.ones(requests, dtype=np.int64) if qo_lens is None else qo_lens
        name = f"ragged_{name}"
        return Forest("ragged", name, levels, qo_lens, *heads, 128, page_size, dtype, causal)

    def leaves(tokens: np.ndarray) -> Level:
        return Level(np.ones(len(tokens), dtype=np.int64), tokens)

    def long_tail(count: int, median: float) -> np.ndarray:
        return np.minimum(1 + (median * rng.lognormal(0, 1.2, count)).astype(np.int64), 32768)

    sizes = rng.integers(1, 21, 37)
    tails = rng.geometric(0.2, 24)
    prefix_empty = rng.integers(0, 2, 24) * rng.integers(1, 2049, 24)
    own_empty = rng.integers(0, 2, 24 * 8) * rng.integers(1, 257, 24 * 8)
    own_empty[:8], prefix_empty[0] = 0, 0  # the first requests see nothing at all
    one_long = rng.integers(16, 101, 128)
    one_long[77] = 65536
    mixed = np.where(rng.random(64) < 0.8, 1, rng.integers(2, 257, 64))
    children = [rng.integers(1, 9, 8)]  # of each root, of each of those, and of theirs
    for _ in range(2):
        children.append(rng.integers(1, 7, children[-1].sum()))
    tree = [leaves(rng.integers(1, 65, children[-1].sum()))]
    for counts in reversed(children):
        under = np.add.reduceat(tree[0].requests, np.cumsum(counts) - counts)
        tree.insert(0, Level(under, rng.integers(1, 513, len(under))))

    forests = [
        forest(
            "sizes",
            [Level(sizes, rng.integers(100, 3001, 37)), leaves(rng.geometric(0.005, sizes.sum()))],
        ),
        forest("long_tail", [Level(tails, long_tail(24, 800)), leaves(long_tail(tails.sum(), 80))]),
        forest(
            "groups_of_24",
            [
                Level(np.full(16, 24), rng.integers(900, 1101, 16)),
                leaves(rng.integers(1, 129, 384)),
            ],
            dtype="bfloat16",
        ),
        forest("empty_groups", [Level(np.full(24, 8), prefix_empty), leaves(own_empty)]),
        forest("one_long", [Level(np.array([128]), np.array([64])), leaves(one_long)]),
        forest(
            "mixed_qo_len",
            [Level(np.full(4, 16), rng.integers(500, 4001, 4)), leaves(mixed + long_tail(64, 100))],
            qo_lens=mixed,
            causal=True,
        ),
        forest("tree_page_1", tree, page_size=1),
    ]
    for num_qo_heads, num_kv_heads in ((24, 8), (28, 4)):
        root = Level(np.array([96]), np.array([777]))
        inner = Level(np.full(8, 12), rng.integers(100, 901, 8))
        forests.append(
            forest(
                f"heads_{num_qo_heads}_{num_kv_heads}",
                [root, inner, leaves(rng.integers(1, 301, 96))],
                heads=(num_qo_heads, num_kv_heads),
            )
        )
    return forests


@dataclass
class Data:
    """The tensors of one forest on a device."""

    qo_indptr: list[Tensor]
    kv_indptr: list[Tensor]
    kv_indices: list[Tensor]
    kv_last_page_len: list[Tensor]
    q: Tensor  # [tokens, num_qo_heads, head_dim]
    caches: Tensor  # [copies, pages, 2, page_size, num_kv_heads, head_dim]

    @property
    def arrays(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_last_page_len


class Pool:
    """One random buffer for each dtype, of which every forest's KV caches are views."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[torch.dtype, Tensor] = {}

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.pop(dtype, None)
        if buffer is None or buffer.numel() < size:
            buffer = None  # frees the old one first
            buffer = torch.empty(size, dtype=dtype, device=self.device).normal_()
        self.buffers[dtype] = buffer
        return buffer[:size].view(shape)


def build(forest: Forest, pool: Pool, max_copies: int = MAX_COPIES) -> Data:
    """Page tables in random order, q, and views of the pool as KV caches."""
    device = pool.device

    def index(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    rows = np.concatenate([[0], np.cumsum(forest.qo_lens)])
    pages = torch.randperm(forest.num_pages, device=device).to(torch.int32)
    arrays: tuple[list[Tensor], ...] = ([], [], [], [])
    taken = 0
    for level in forest.levels:
        num_pages = -(-level.tokens // forest.page_size)
        ends = np.concatenate([[0], np.cumsum(num_pages)])
        arrays[0].append(index(rows[np.concatenate([[0], np.cumsum(level.requests)])]))
        arrays[1].append(index(ends))
        arrays[2].append(pages[taken : taken + int(ends[-1])].clone())
        last = level.tokens - (num_pages - 1) * forest.page_size
        arrays[3].append(index(np.where(num_pages > 0, last, 0)))
        taken += int(ends[-1])
    q = torch.randn(
        (forest.num_tokens, forest.num_qo_heads, forest.head_dim),
        dtype=forest.torch_dtype,
        device=device,
    )
    copies = min(forest.copies, max_copies)
    return Data(*arrays, q, pool.view((copies, *forest.cache_shape), forest.torch_dtype))


TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
MAX_CHECKED = 32


@dataclass
class Errors:
    out: float  # ||out - reference|| / ||reference||
    lse: float  # the largest difference; infinite where the empty states are not the same

    def within(self, tolerance: float) -> bool:
        return self.out <= tolerance and self.lse <= tolerance


def check(forest: Forest, data: Data, copy: int, out: Tensor, lse: Tensor) -> Errors:
    """What `out` and `lse` are off from dense attention in plain PyTorch, request by request.

    In float32, in float64 where the data is float32. All requests up to 32, else a random 32 and
    the one with the most KV; but every element must be a number.
    """
    if out.isnan().any() or lse.isnan().any():
        return Errors(math.nan, math.nan)
    requests = len(forest.qo_lens)
    chosen = torch.randperm(requests)[:MAX_CHECKED].tolist()
    kv_lens = sum(np.repeat(level.tokens, level.requests) for level in forest.levels)
    chosen = sorted({*chosen, int(np.argmax(kv_lens))})
    wide = torch.float64 if forest.torch_dtype == torch.float32 else torch.float32
    rows = np.concatenate([[0], np.cumsum(forest.qo_lens)])
    tables = [
        (np.repeat(np.arange(len(level.tokens)), level.requests), kv_indptr.tolist(), kv_indices)
        for level, kv_indptr, kv_indices in zip(
            forest.levels, data.kv_indptr, data.kv_indices, strict=True
        )
    ]
    squares = difference = lse_error = torch.zeros((), dtype=torch.float64, device=out.device)
    for request in chosen:
        pieces = []
        for level, (groups, starts, pages) in zip(forest.levels, tables, strict=True):
            group = groups[request]
            kv = data.caches[copy][pages[starts[group] : starts[group + 1]].long()]
            kv = kv.transpose(0, 1).flatten(1, 2)  # [2, tokens, num_kv_heads, head_dim]
            pieces.append(kv[:, : int(level.tokens[group])])
        own = slice(int(rows[request]), int(rows[request + 1]))
        k, v = torch.cat(pieces, dim=1).to(wide)
        q = data.q[own].to(wide)
        wanted, wanted_lse = _dense(q, k, v, pieces[-1].shape[1] if forest.causal else None)
        squares = squares + wanted.double().square().sum()
        difference = difference + (out[own].to(wide) - wanted).double().square().sum()
        gap = (lse[own].double() - wanted_lse.double()).abs()
        gap = torch.where(lse[own] == wanted_lse, 0.0, gap)  # both -inf
        lse_error = torch.maximum(lse_error, gap.max())
    return Errors(float((difference / squares.clamp(min=1e-30)).sqrt()), float(lse_error))


def _dense(q: Tensor, k: Tensor, v: Tensor, causal_tokens: int | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of `[rows, heads, head_dim]` and its base-2 lse; the last
    `causal_tokens` tokens are seen up to each row's own position."""
    rows, num_qo_heads, head_dim = q.shape
    tokens, num_kv_heads, _ = k.shape
    packed = q.view(rows, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    logits = packed @ k.permute(1, 2, 0) * head_dim**-0.5  # [num_kv_heads, packed rows, tokens]
    if causal_tokens is not None:
        last_seen = torch.arange(rows, device=q.device) + tokens - rows
        position = torch.arange(tokens, device=q.device)
        hidden = (position > last_seen[:, None]) & (position >= tokens - causal_tokens)
        logits.view(num_kv_heads, rows, -1, tokens).masked_fill_(hidden[:, None], -math.inf)
    lse = logits.logsumexp(-1)
    empty = lse == -math.inf
    weights = (logits - lse.masked_fill(empty, 0.0)[..., None]).exp_()
    out = weights @ v.transpose(0, 1)
    out = out.view(num_kv_heads, rows, -1, head_dim).transpose(0, 1)
    lse = lse.view(num_kv_heads, rows, -1).transpose(0, 1) / math.log(2)
    return out.reshape(q.shape), lse.reshape(rows, num_qo_heads)
