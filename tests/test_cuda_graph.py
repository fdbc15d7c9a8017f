"""CUDA graphs: planning and attention captured once serve every later batch that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LSE_TOLERANCE,
    TOLERANCE,
    assert_lse_close,
    forest_of,
    int32,
    poisoned_allocations,
    random_forest,
    relative_error,
)
from serving import Captured, Serving
from torch import Tensor

import flashinfer_ops
from flashinfer_ops import CascadePlan, cascade_attention, plan_cascade

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def assert_right(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    dtype = actual[0].dtype
    assert relative_error(actual[0], expected[0]) < TOLERANCE[dtype]
    assert_lse_close(actual[1], expected[1], LSE_TOLERANCE[dtype])


def spoil(outputs: tuple[Tensor, Tensor]) -> None:
    """So that a replay which does not write an element shows."""
    for output in outputs:
        output.fill_(NAN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_a_thousand_steps(cuda: str, dtype: torch.dtype) -> None:
    serving = Serving(1, cuda, dtype=dtype)

    def step() -> tuple[Tensor, Tensor]:
        serving.replan()
        return cascade_attention(serving.q, serving.cache, serving.plan)

    captured = Captured(step)
    seen = set()
    for i in range(1000):
        serving.step()
        serving.fill()
        spoil(captured.outputs)
        serving.plan.schedule.fill_(-1)
        captured.replay()
        seen.add(serving.rows)
        if i % 5 == 0:
            actual = [t.clone() for t in captured.outputs]
            assert_same_bits(actual, step())
        if i % 25 == 0:
            assert_right(captured.outputs, serving.oracle())
    assert len(seen) > 4 and 0 in seen  # requests joined and left, all of them at times


def test_functional_planning_captured(cuda: str) -> None:
    """A plan made inside of the graph: its schedule is the graph's own memory."""
    serving = Serving(2, cuda)
    plan = serving.plan
    arrays = (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)

    def step() -> tuple[Tensor, Tensor]:
        made = plan_cascade(*arrays, **serving.numbers)
        return cascade_attention(serving.q, serving.cache, made)

    captured = Captured(step)
    for i in range(60):
        serving.step()
        serving.fill()
        spoil(captured.outputs)
        captured.replay()
        if i % 6 == 0:
            assert_right(captured.outputs, serving.oracle())


def test_outputs_and_scratch_without_values(cuda: str) -> None:
    """The graph fills what its operators allocate with NaN and large integers before they run."""
    serving = Serving(3, cuda)

    def step() -> tuple[Tensor, Tensor]:
        serving.replan()
        return cascade_attention(serving.q, serving.cache, serving.plan)

    with poisoned_allocations():
        captured = Captured(step)
    for i in range(40):
        serving.step()
        serving.fill()
        captured.replay()
        if i % 5 == 0:
            assert_right(captured.outputs, serving.oracle())


def graph_buffers(device: str, groups: list[int], pages: list[int]) -> dict[str, Any]:
    def make(sizes: list[int]) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.int32, device=device) for size in sizes]

    return {
        "use_cuda_graph": True,
        "qo_indptr_buf_arr": make([n + 1 for n in groups]),
        "paged_kv_indptr_buf_arr": make([n + 1 for n in groups]),
        "paged_kv_indices_buf_arr": make(pages),
        "paged_kv_last_page_len_buf_arr": make(groups),
    }


@pytest.mark.parametrize("arrays_on", ["cpu", "cuda"])
def test_wrapper_as_flashinfer_s_users_do(cuda: str, arrays_on: str) -> None:
    """Buffers given, `run` captured, `plan` called again between the replays."""
    wrapper = flashinfer_ops.MultiLevelCascadeAttentionWrapper(
        2,
        torch.empty(1024, dtype=torch.uint8, device=cuda),
        **graph_buffers(cuda, [16, 24], [128, 256]),
    )
    dtype = torch.float16
    q = torch.zeros(24, 4, 64, dtype=dtype, device=cuda)
    cache = torch.zeros(300, 2, 16, 2, 64, dtype=dtype, device=cuda)

    def batch(seed: int) -> Any:
        forest = random_forest(
            seed, num_levels=2, num_requests=[24, 3, 17, 1][seed % 4], dtype=dtype, device=cuda
        )
        arrays = [[t.to(arrays_on) for t in level] for level in forest.arrays]
        wrapper.plan(*arrays, **forest.numbers, q_data_type=dtype)
        q.fill_(NAN)
        cache.fill_(NAN)
        q[: len(forest.q)] = forest.q
        cache[: len(forest.cache)] = forest.cache
        return forest

    batch(0)
    captured = Captured(lambda: wrapper.run(q, cache, return_lse=True))
    for seed in range(40):
        forest = batch(seed)
        spoil(captured.outputs)
        captured.replay()
        rows = len(forest.q)
        out, lse = captured.outputs
        assert_right((out[:rows], lse[:rows]), forest.oracle())
        assert not out[rows:].any() and bool((lse[rows:] == -INF).all())
        if seed % 4 == 0:
            actual = out.clone(), lse.clone()
            assert_same_bits(actual, wrapper.run(q, cache, return_lse=True))


def large_batch(device: str, dtype: torch.dtype) -> Any:
    """Long KV, many rows and causal tiles: several units a tile, whose states are merged."""
    return forest_of(
        [[108], [73, 35], [70, 1, 1, 1, 30, 1, 0, 1, 3]],
        [[3000], [500, 0], [90, 7, 900, 33, 64, 1, 12, 0, 250]],
        num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype=dtype, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fifty_replays_have_the_same_bits(cuda: str, dtype: torch.dtype) -> None:
    forest = large_batch(cuda, dtype)
    plan = plan_cascade(*forest.arrays, **forest.numbers, causal=True)
    eager = cascade_attention(forest.q, forest.cache, plan)
    assert_right(eager, forest.oracle(True))
    captured = Captured(lambda: cascade_attention(forest.q, forest.cache, plan))
    for _ in range(50):
        spoil(captured.outputs)
        captured.replay()
        assert_same_bits(captured.outputs, eager)


def refill(plan: CascadePlan, forest: Any, **options: Any) -> None:
    assert plan_cascade(*forest.arrays, **forest.numbers, **options, out=plan) is plan


def test_replanning_with_other_shapes_between_replays(cuda: str) -> None:
    """The graph holds attention only; planning outside of it, for fewer groups, rows and pages."""
    options = {"num_levels": 3, "max_qo_len": 5, "device": cuda, "dtype": torch.float16}
    first = random_forest(0, num_requests=64, max_kv_len=300, **options)
    plan = plan_cascade(*first.arrays, **first.numbers, causal=True)
    q = torch.full((400, 4, 64), NAN, dtype=torch.float16, device=cuda)
    cache = torch.full((len(first.cache), *first.cache.shape[1:]), NAN, dtype=q.dtype, device=cuda)

    def put(forest: Any) -> None:
        q[: len(forest.q)] = forest.q
        cache[: len(forest.cache)] = forest.cache

    put(first)
    captured = Captured(lambda: cascade_attention(q, cache, plan))
    for seed, num_requests in enumerate([1, 40, 2, 63, 7, 33, 20, 12, 50, 3]):
        longest = 70 if num_requests > 20 else 300
        forest = random_forest(seed, num_requests=num_requests, max_kv_len=longest, **options)
        refill(plan, forest, causal=True)
        put(forest)
        spoil(captured.outputs)
        captured.replay()
        rows = len(forest.q)
        out, lse = captured.outputs
        assert_right((out[:rows], lse[:rows]), forest.oracle(True))
        assert not out[rows:].any() and bool((lse[rows:] == -INF).all())


def test_out_form_captured(cuda: str) -> None:
    """Outputs given by the caller, strided ones, keep their address over the replays."""
    serving = Serving(4, cuda)
    wide = torch.full((serving.places, 2 * serving.num_qo_heads, serving.head_dim), 7.0,
                      device=cuda)  # fmt: skip
    out, lse = wide[:, ::2], torch.empty(serving.q.shape[:2], device=cuda)

    def step() -> tuple[Tensor, Tensor]:
        serving.replan()
        return cascade_attention(serving.q, serving.cache, serving.plan, out=out, lse=lse)

    captured = Captured(step)
    assert captured.outputs[0] is out and captured.outputs[1] is lse
    for _ in range(20):
        serving.step()
        serving.fill()
        spoil((out, lse))
        captured.replay()
        assert_right((out, lse), serving.oracle())
        assert bool((wide[:, 1::2] == 7.0).all())


def test_merges_captured(cuda: str) -> None:
    shape, num = (33, 3, 40), 4
    v = torch.zeros(num, *shape, device=cuda, dtype=torch.float16)
    s, d = torch.zeros(num, *shape[:2], device=cuda), torch.ones(num, *shape[:2], device=cuda)
    mask = torch.arange(shape[0], device=cuda) % 3 == 0
    indptr = int32(0, 0, 5, 5, 33, device=cuda)

    def step() -> list[Tensor]:
        mine, mine_omd = (v[0].clone(), s[0].clone()), (v[0].clone(), s[0].clone(), d[0].clone())
        flashinfer_ops.merge_state_in_place(*mine, v[1], s[1], mask)
        flashinfer_ops.merge_state_in_place(*mine_omd, v[1], s[1], d[1])
        return [
            *mine,
            *mine_omd,
            *flashinfer_ops.merge_state(v[0], s[0], v[1], s[1]),
            *flashinfer_ops.merge_state(v[0], s[0], d[0], v[1], s[1], d[1]),
            *flashinfer_ops.merge_states(v.transpose(0, 1), s.transpose(0, 1)),
            *flashinfer_ops.merge_states(list(v), list(s)),
            *flashinfer_ops.variable_length_merge_states(v[2], s[2], indptr),
        ]

    captured = Captured(step)
    g = torch.Generator().manual_seed(0)
    for i in range(10):
        lse = torch.randn(s.shape, generator=g) * 5
        lse[torch.rand(s.shape, generator=g) < 0.2] = -INF
        v.copy_(torch.randn(v.shape, generator=g))
        s.copy_(lse)
        d.copy_(torch.rand(d.shape, generator=g) + 0.5)
        mask.logical_not_()
        indptr.copy_(int32(0, i, 2 * i, 20, 20 + i))
        for output in captured.outputs:
            output.fill_(NAN)
        captured.replay()
        assert_same_bits(captured.outputs, step())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_append_captured(cuda: str, kv_layout: str) -> None:
    """The rows' places are worked out inside of the graph, from the index arrays' contents."""
    page_size, batch, nnz = 4, 5, 12
    shape = (20, 2, page_size, 2, 64) if kv_layout == "NHD" else (20, 2, 2, page_size, 64)
    cache = torch.zeros(shape, device=cuda)
    kv_indptr, append_indptr = (torch.zeros(batch + 1, dtype=torch.int32, device=cuda)
                                for _ in range(2))  # fmt: skip
    indices = torch.zeros(20, dtype=torch.int32, device=cuda)
    last = torch.zeros(batch, dtype=torch.int32, device=cuda)
    k, v = torch.zeros(2, nnz, 2, 64, device=cuda)

    def append(cache: Tensor) -> None:
        seq_lens = flashinfer_ops.get_seq_lens(kv_indptr, last, page_size)
        where = flashinfer_ops.get_batch_indices_positions(append_indptr, seq_lens, nnz)
        flashinfer_ops.append_paged_kv_cache(
            k, v, *where, cache, indices, kv_indptr, last, kv_layout
        )

    captured = Captured(lambda: append(cache))
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(0, 4 * page_size + 1, (batch,), generator=g)
        counts = torch.minimum(lengths, torch.randint(0, 3, (batch,), generator=g))
        pages = (lengths + page_size - 1) // page_size
        zero = torch.zeros(1, dtype=torch.long)
        kv_indptr.copy_(torch.cat([zero, pages.cumsum(0)]))
        append_indptr.copy_(torch.cat([zero, counts.cumsum(0)]))
        indices.copy_(torch.randperm(20, generator=g))
        last.copy_(lengths - (pages - 1) * page_size)
        k.copy_(torch.randn(k.shape, generator=g))
        v.copy_(torch.randn(v.shape, generator=g))
        cache.copy_(torch.randn(shape, generator=g))
        before, expected = cache.clone(), cache.clone()
        captured.replay()
        append(expected)
        assert torch.equal(cache, expected)
        on_cpu = before.cpu()
        where = flashinfer_ops.get_batch_indices_positions(
            append_indptr.cpu(),
            flashinfer_ops.get_seq_lens(kv_indptr.cpu(), last.cpu(), page_size),
            nnz,
        )
        flashinfer_ops.append_paged_kv_cache(
            k.cpu(), v.cpu(), *where, on_cpu, indices.cpu(), kv_indptr.cpu(), last.cpu(), kv_layout
        )
        assert torch.equal(cache.cpu(), on_cpu)
