"""Forests drawn at random over everything that the GPU's kernels tell apart, each attended to
several times beside other work: right against float64, and with the same bits each time.

    pytest -m "gpu and slow" tests/test_forests_gpu.py
"""

from __future__ import annotations

import random

import pytest
import torch
from helpers import Forest, check_attention, forest_of, random_forest

from flashinfer_ops import cascade_attention, plan_cascade

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
TIMES = 5
MOST_ROWS = 16_000  # packed; the oracle takes long


def draw(seed: int, device: str) -> tuple[Forest, bool]:
    """A forest, and whether attention over it is causal."""
    rng = random.Random(seed)
    num_kv_heads = rng.choice([1, 1, 2, 4, 8])
    group_size = rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 128])
    num_kv_heads = max(1, min(num_kv_heads, 128 // group_size))
    numbers = {
        "num_qo_heads": num_kv_heads * group_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": rng.choice([64, 128, 128, 128, 128, 256]),
        "page_size": rng.choice([1, 1, 2, 5, 16, 16, 16, 24, 32, 64]),
        "dtype": rng.choice([torch.float16, torch.bfloat16]),
        "device": device,
    }
    causal = rng.random() < 0.5
    if rng.random() < 0.35:  # a prefix and requests, as they are in serving
        requests = rng.choice([1, 8, 16, 64, 100, 256])
        longest = rng.choice([16, 33, 64, 100, 128, 300])
        longest = min(longest, max(16, 30_000 // requests))
        qo_len = rng.choice([1, 1, 1, 2, 4])
        if requests * qo_len * numbers["num_qo_heads"] > MOST_ROWS:
            qo_len, numbers["num_qo_heads"], numbers["num_kv_heads"] = 1, 8, 1
        uneven = rng.random() < 0.5
        lengths = [longest - (rng.randrange(longest) if uneven else 0) for _ in range(requests)]
        rows = [[requests * qo_len], [qo_len] * requests]
        prefix = rng.choice([64, 512, 1000, 2048, 5000])
        return forest_of(rows, [[prefix], lengths], seed=seed, **numbers), causal
    requests, qo_len = rng.choice([1, 2, 5, 13, 40, 100, 200]), rng.choice([1, 1, 1, 2, 4, 9, 40])
    forest = random_forest(
        seed,
        num_levels=rng.choice([1, 2, 2, 3, 4, 5]),
        num_requests=requests,
        max_kv_len=rng.choice([20, 64, 130, 300, 700, 2000]),
        max_qo_len=qo_len if requests * qo_len <= 1500 else 1,
        nested=rng.random() < 0.7,
        extra_rows=rng.choice([0, 0, 3]),
        **numbers,
    )
    return forest, causal


@pytest.mark.parametrize("seed", range(300))
def test_forest(cuda: str, seed: int) -> None:
    forest, causal = draw(seed, cuda)
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
    other, stream = torch.randn(1 << 22, device=cuda), torch.cuda.Stream()
    states = []
    for time in range(TIMES):
        if time % 2:
            with torch.cuda.stream(stream):
                other.mul_(1.0)
        out = torch.full_like(forest.q, torch.nan)
        lse = torch.full(forest.q.shape[:2], torch.nan, device=cuda)
        cascade_attention(forest.q, forest.cache, plan, out=out, lse=lse)
        states.append((out, lse))
    for again in states[1:]:
        assert torch.equal(again[0], states[0][0]) and torch.equal(again[1], states[0][1])
    check_attention(states[0], forest, causal)
