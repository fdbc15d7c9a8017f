"""No host sync, several streams and threads at once, and nothing left unwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import (
    LSE_TOLERANCE,
    TOLERANCE,
    Forest,
    assert_lse_close,
    forest_of,
    poison_free_memory,
    poisoned_allocations,
    random_forest,
    relative_error,
)
from serving import Serving
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import cascade_attention, plan_cascade

pytestmark = pytest.mark.gpu
NAN = float("nan")


@contextmanager
def no_sync() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_planning_and_attention_never_wait(cuda: str) -> None:
    serving = Serving(5, cuda)
    arrays = serving.full_arrays()
    wrapper = flashinfer_ops.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(16, dtype=torch.uint8, device=cuda)
    )
    out, lse = torch.empty_like(serving.q), torch.empty(serving.q.shape[:2], device=cuda)

    def step() -> list[Tensor]:
        serving.replan()
        fresh = plan_cascade(*arrays, **serving.numbers)
        wrapper.plan(*arrays, **serving.numbers, q_data_type=torch.float32)
        results = [
            *cascade_attention(serving.q, serving.cache, serving.plan),
            *cascade_attention(serving.q, serving.cache, fresh),
            *cascade_attention(serving.q, serving.cache, fresh, out=out, lse=lse),
            wrapper.run(serving.q, serving.cache),
        ]
        return [t.clone() for t in results]

    step()  # compile and load
    for i in range(100):
        serving.step()
        serving.fill()
        arrays = serving.full_arrays()
        with no_sync():
            results = step()
        if i % 20 == 0:
            expected = serving.oracle()
            for result, wanted in zip(results, [*expected * 3, expected[0]], strict=True):
                torch.testing.assert_close(
                    result.cpu().double(), wanted, atol=2e-5, rtol=1e-6, check_dtype=False
                )


def test_merges_and_append_never_wait(cuda: str) -> None:
    v, s = torch.randn(3, 20, 4, 64, device=cuda), torch.randn(3, 20, 4, device=cuda)
    indptr = torch.tensor([0, 3, 20], dtype=torch.int32, device=cuda)
    mask = torch.arange(20, device=cuda) % 2 == 0
    cache = torch.zeros(8, 2, 4, 4, 64, device=cuda)
    pages = torch.arange(8, dtype=torch.int32, device=cuda)
    kv_indptr = torch.tensor([0, 3, 8], dtype=torch.int32, device=cuda)
    last = torch.tensor([4, 4], dtype=torch.int32, device=cuda)

    def step() -> None:
        flashinfer_ops.merge_state(v[0], s[0], v[1], s[1])
        flashinfer_ops.merge_state(v[0], s[0], s[0], v[1], s[1], s[1])
        flashinfer_ops.merge_state_in_place(v[0], s[0], v[1], s[1], mask)
        flashinfer_ops.merge_state_in_place(v[0], s[0], s[2], v[1], s[1], s[1])
        flashinfer_ops.merge_states(v.transpose(0, 1), s.transpose(0, 1))
        flashinfer_ops.merge_states(list(v), list(s))
        flashinfer_ops.variable_length_merge_states(v[0], s[0], indptr)
        seq_lens = flashinfer_ops.get_seq_lens(kv_indptr, last, 4)
        where = flashinfer_ops.get_batch_indices_positions(indptr.clamp(max=12), seq_lens, 20)
        flashinfer_ops.append_paged_kv_cache(v[0], v[1], *where, cache, pages, kv_indptr, last)

    step()
    with no_sync():
        step()


def batches(device: str) -> list[tuple[Forest, bool]]:
    """Different work for different streams: trees of decoding requests, and causal appends."""
    kinds = [
        ({"num_levels": 4, "num_requests": 90, "max_kv_len": 200}, False),
        ({"num_levels": 2, "num_requests": 9, "max_qo_len": 60, "max_kv_len": 900}, True),
    ]
    return [
        (
            random_forest(seed, num_qo_heads=8, head_dim=128, dtype=torch.bfloat16, device=device,
                          **options),
            causal,
        )
        for seed, (options, causal) in enumerate(kinds)
    ]  # fmt: skip


def planned_attention(forest: Forest, causal: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """Plans anew on each call, into memory of its own, and computes attention twice."""
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)

    def step() -> tuple[Tensor, Tensor]:
        plan_cascade(*forest.arrays, **forest.numbers, causal=causal, out=plan)
        cascade_attention(forest.q, forest.cache, plan)
        return cascade_attention(forest.q, forest.cache, plan)

    return step


def assert_all_same(results: list[tuple[Tensor, Tensor]], expected: tuple[Tensor, Tensor]) -> None:
    for out, lse in results:
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_two_streams(cuda: str) -> None:
    """Enqueued on two streams at once, with one plan between them as well."""
    steps = [planned_attention(forest, causal) for forest, causal in batches(cuda)]
    expected = [step() for step in steps]
    shared_forest = batches(cuda)[0][0]
    plan = plan_cascade(*shared_forest.arrays, **shared_forest.numbers)
    streams = [torch.cuda.Stream() for _ in steps]
    results: list[list[Any]] = [[] for _ in steps]
    shared_results = []
    torch.cuda.synchronize()
    for _ in range(25):
        for stream, step, mine in zip(streams, steps, results, strict=True):
            with torch.cuda.stream(stream):
                mine.append(step())
                shared_results.append(cascade_attention(shared_forest.q, shared_forest.cache, plan))
    torch.cuda.synchronize()
    for mine, wanted in zip(results, expected, strict=True):
        assert_all_same(mine, wanted)
    assert_all_same(shared_results, expected[0])


def test_two_threads(cuda: str) -> None:
    """Each thread on a stream of its own; the operators hold no state between calls."""
    steps = [planned_attention(forest, causal) for forest, causal in batches(cuda)]
    expected = [step() for step in steps]
    v, s = torch.randn(6, 40, 4, 64, device=cuda), torch.randn(6, 40, 4, device=cuda)
    merged = flashinfer_ops.merge_states(list(v), list(s))
    torch.cuda.synchronize()

    def work(step: Callable[[], Any]) -> list[Any]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [(step(), flashinfer_ops.merge_states(list(v), list(s))) for _ in range(25)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(steps)) as pool:
        for results, wanted in zip(pool.map(work, steps), expected, strict=True):
            assert_all_same([attention for attention, _ in results], wanted)
            assert_all_same([merge for _, merge in results], merged)


@pytest.mark.parametrize("case", ["tree", "append", "long", "empty"])
@pytest.mark.parametrize("poison", ["free memory", "every allocation"])
def test_nothing_is_left_unwritten(cuda: str, case: str, poison: str) -> None:
    """What the operators allocate, outputs, partial states and schedules, holds poison first."""
    causal = case == "append"
    if case in ("tree", "append"):
        forest = batches(cuda)[int(causal)][0]
    elif case == "long":
        forest = forest_of([[3, 0, 2]], [[9000, 40, 1]], head_dim=128, device=cuda)
    else:
        forest = forest_of([[3], [1, 1, 1]], [[0], [0, 0, 0]], extra_rows=9, device=cuda)

    def run() -> tuple[Tensor, Tensor]:
        plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
        return cascade_attention(forest.q, forest.cache, plan)

    first = run()
    if poison == "free memory":
        poison_free_memory(cuda)
        out, lse = run()
    else:
        with poisoned_allocations():
            out, lse = run()
    expected, expected_lse = forest.oracle(causal)
    assert relative_error(out, expected) < TOLERANCE[out.dtype]
    assert_lse_close(lse, expected_lse, LSE_TOLERANCE[out.dtype])
    assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


def test_merges_leave_nothing_unwritten(cuda: str) -> None:
    v, s = torch.randn(5, 33, 3, 40, device=cuda), torch.randn(5, 33, 3, device=cuda)
    s[:, ::4] = float("-inf")
    indptr = torch.tensor([0, 0, 7, 33], dtype=torch.int32, device=cuda)

    def run() -> list[Tensor]:
        return [
            *flashinfer_ops.merge_state(v[0], s[0], v[1], s[1]),
            *flashinfer_ops.merge_state(v[0], s[0], s[2].exp2(), v[1], s[1], s[3].exp2()),
            *flashinfer_ops.merge_states(v.transpose(0, 1), s.transpose(0, 1)),
            *flashinfer_ops.merge_states(list(v), list(s)),
            *flashinfer_ops.variable_length_merge_states(v[0], s[0], indptr),
        ]

    expected = run()
    poison_free_memory(cuda)
    again = run()
    with poisoned_allocations():
        results = run()
    assert all(map(torch.equal, expected, again)) and all(map(torch.equal, expected, results))
    assert not any(t.isnan().any() for t in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bits_on_every_run(cuda: str, dtype: torch.dtype) -> None:
    """Plans made anew and memory handed out in another order change nothing."""
    for causal, max_qo_len, max_kv_len in ((False, 1, 3000), (True, 150, 900)):
        forest = random_forest(
            7, num_levels=3, num_requests=40, num_qo_heads=8, head_dim=128, max_qo_len=max_qo_len,
            max_kv_len=max_kv_len, dtype=dtype, device=cuda,
        )  # fmt: skip
        results, held = [], []
        for i in range(10):
            held.append(torch.empty(1000 + 777 * i, device=cuda))
            plan = plan_cascade(*forest.arrays, **forest.numbers, causal=causal)
            results.append(cascade_attention(forest.q, forest.cache, plan))
        assert_all_same(results, results[0])
