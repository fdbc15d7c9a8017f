"""FlashInfer's wrapper classes: plans, runs, buffers, both constructor forms, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import LSE_TOLERANCE, TOLERANCE, assert_lse_close, int32, random_forest, relative_error
from torch import Tensor

import flashinfer_ops

MultiLevel = flashinfer_ops.MultiLevelCascadeAttentionWrapper
Decode = flashinfer_ops.BatchDecodeWithSharedPrefixPagedKVCacheWrapper
Prefill = flashinfer_ops.BatchPrefillWithSharedPrefixPagedKVCacheWrapper
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def workspace(device: str) -> Tensor:
    return torch.empty(1024, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels,num_requests", [(1, 1), (2, 7), (3, 40), (9, 300)])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_multi_level(
    device: str, dtype: torch.dtype, num_levels: int, num_requests: int, kv_layout: str
) -> None:
    forest = random_forest(
        num_levels, num_levels=num_levels, num_requests=num_requests, dtype=dtype, device=device
    )
    wrapper = MultiLevel(num_levels, workspace(device), kv_layout)
    wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=dtype)
    out, lse = wrapper.run(forest.q, forest.cache_as(kv_layout), return_lse=True)
    expected, expected_lse = forest.oracle()
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert_lse_close(lse, expected_lse, LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_append_and_arguments(device: str, causal: bool) -> None:
    forest = random_forest(3, num_levels=2, num_requests=9, max_qo_len=20, device=device)
    wrapper = MultiLevel(2, workspace(device))
    wrapper.begin_forward(
        *forest.arrays, **forest.numbers, causal=causal, sm_scale=0.3, q_data_type="float32"
    )
    expected, expected_lse = forest.oracle(causal, sm_scale=0.3 * 0.5, v_scale=2.0)
    cache = forest.cache_as("NHD", as_tuple=True)
    out = torch.full_like(forest.q, float("nan"))
    lse = torch.full(out.shape[:2], float("nan"), device=device)
    result = wrapper.run(forest.q, cache, out=out, lse=lse, k_scale=0.5, v_scale=2.0)
    assert result is out
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert_lse_close(lse, expected_lse, LSE_TOLERANCE[torch.float32])
    again, lse_again = wrapper.forward_return_lse(forest.q, cache, k_scale=0.5, v_scale=2.0)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    assert torch.equal(wrapper.forward(forest.q, cache, k_scale=0.5, v_scale=2.0), out)
    wrapper.end_forward()


def test_both_constructor_forms(device: str) -> None:
    buffer = workspace(device)
    forest = random_forest(5, num_levels=3, num_requests=5, device=device)
    results = []
    for wrapper in (
        MultiLevel(3, buffer, "NHD"),
        MultiLevel(num_levels=3, float_workspace_buffer=buffer),
        MultiLevel(buffer, "NHD"),
        MultiLevel(buffer, kv_layout="NHD"),
        MultiLevel(float_workspace_buffer=buffer, kv_layout="NHD"),
    ):
        assert wrapper.is_cuda_graph_enabled is False
        wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
        results.append(wrapper.run(forest.q, forest.cache))
    assert all(torch.equal(result, results[0]) for result in results)
    assert MultiLevel(buffer, "HND")._kv_layout == "HND"


def test_plans_again_into_the_same_memory(device: str) -> None:
    """Addresses stay while a batch fits; a larger one gets new buffers; both compute right."""
    wrapper = MultiLevel(2, workspace(device))
    addresses = set()
    for seed, num_requests in enumerate([32, 20, 1, 19, 18, 17]):  # the largest first
        forest = random_forest(seed, num_levels=2, num_requests=num_requests, device=device)
        wrapper.plan(
            *forest.arrays, **forest.numbers, causal=seed % 2 == 0, q_data_type=torch.float32
        )
        plan = wrapper._plan
        assert plan is not None
        tensors = [*plan.qo_indptr, *plan.kv_indptr, *plan.kv_last_page_len, plan.schedule]
        addresses.add(tuple(t.data_ptr() for t in tensors))
        expected, _ = forest.oracle(causal=seed % 2 == 0)
        actual = wrapper.run(forest.q, forest.cache)
        assert relative_error(actual, expected) < TOLERANCE[torch.float32]
    assert len(addresses) == 1
    forest = random_forest(9, num_levels=2, num_requests=200, device=device)
    wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
    actual = wrapper.run(forest.q, forest.cache)
    assert relative_error(actual, forest.oracle()[0]) < TOLERANCE[torch.float32]


def graph_buffers(device: str, levels: int = 2, groups: int = 32, pages: int = 256) -> Any:
    def make(size: int) -> list[Tensor]:
        return [torch.empty(size, dtype=torch.int32, device=device) for _ in range(levels)]

    return {
        "use_cuda_graph": True,
        "qo_indptr_buf_arr": make(groups + 1),
        "paged_kv_indptr_buf_arr": make(groups + 1),
        "paged_kv_indices_buf_arr": make(pages),
        "paged_kv_last_page_len_buf_arr": make(groups),
    }


def test_cuda_graph_buffers(device: str) -> None:
    buffers = graph_buffers(device)
    wrapper = MultiLevel(2, workspace(device), **buffers)
    assert wrapper.is_cuda_graph_enabled is True
    for seed in range(4):
        forest = random_forest(seed, num_levels=2, num_requests=30 - 9 * seed, device=device)
        wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
        plan = wrapper._plan
        assert plan is not None
        for name, field in (
            ("qo_indptr_buf_arr", plan.qo_indptr),
            ("paged_kv_indptr_buf_arr", plan.kv_indptr),
            ("paged_kv_indices_buf_arr", plan.kv_indices),
            ("paged_kv_last_page_len_buf_arr", plan.kv_last_page_len),
        ):
            assert [t.data_ptr() for t in field] == [t.data_ptr() for t in buffers[name]]
        for buffer, array in zip(buffers["qo_indptr_buf_arr"], forest.qo_indptr, strict=True):
            assert torch.equal(buffer[: len(array)], array)
            assert bool((buffer[len(array) :] == array[-1]).all())
        actual = wrapper.run(forest.q, forest.cache)
        assert relative_error(actual, forest.oracle()[0]) < TOLERANCE[torch.float32]


def test_cuda_graph_buffers_refuse_what_does_not_fit(device: str) -> None:
    buffers = graph_buffers(device)
    wrapper = MultiLevel(2, workspace(device), **buffers)
    forest = random_forest(0, num_levels=2, num_requests=20, device=device)
    wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
    before = [t.clone() for t in buffers["qo_indptr_buf_arr"]]
    large = random_forest(1, num_levels=2, num_requests=40, device=device)
    with pytest.raises(ValueError, match=r"qo_indptr\[1\] has 41 elements, expected at most 33"):
        wrapper.plan(*large.arrays, **large.numbers, q_data_type=torch.float32)
    assert all(map(torch.equal, before, buffers["qo_indptr_buf_arr"]))
    actual = wrapper.run(forest.q, forest.cache)
    assert relative_error(actual, forest.oracle()[0]) < TOLERANCE[torch.float32]

    with pytest.raises(ValueError, match="qo_indptr_buf_arr is None, expected a list"):
        MultiLevel(2, workspace(device), use_cuda_graph=True)
    with pytest.raises(ValueError, match="qo_indptr_buf_arr has 1 buffers, expected 2"):
        MultiLevel(2, workspace(device), **graph_buffers(device, levels=1))
    buffers["paged_kv_indices_buf_arr"][0] = torch.zeros(9, device=device)
    with pytest.raises(ValueError, match=r"paged_kv_indices_buf_arr\[0\] has dtype torch.float32"):
        MultiLevel(2, workspace(device), **buffers)


def test_refusals(device: str) -> None:
    forest = random_forest(2, num_levels=2, num_requests=5, device=device)
    wrapper = MultiLevel(2, workspace(device))
    with pytest.raises(RuntimeError, match="call plan before run"):
        wrapper.run(forest.q, forest.cache)
    for argument, value in {
        "pos_encoding_mode": "ROPE_LLAMA",
        "window_left": 128,
        "logits_soft_cap": 30.0,
        "custom_mask": torch.ones(3),
        "sinks": torch.ones(4),
        "q_data_type": torch.float8_e4m3fn,
        "kv_data_type": "float8_e4m3fn",
    }.items():
        with pytest.raises(NotImplementedError, match=argument):
            wrapper.plan(*forest.arrays, **forest.numbers, **{argument: value})
    with pytest.raises(ValueError, match="q_data_type is 'float17'"):
        wrapper.plan(*forest.arrays, **forest.numbers, q_data_type="float17")
    with pytest.raises(ValueError, match="expected num_levels = 2"):
        wrapper.plan(*[a[:1] for a in forest.arrays], **forest.numbers)
    wrapper.plan(
        *forest.arrays,
        **forest.numbers,
        q_data_type=torch.float32,
        logits_soft_cap=0.0,
        use_fp16_qk_reduction=True,
        rope_scale=1.0,
        rope_theta=1e4,
    )
    for i in range(4):  # on a re-plan, too, each argument is looked at before any is used
        arrays = [*forest.arrays[:i], [[0, 1], [0, 1]], *forest.arrays[i + 1 :]]
        with pytest.raises(TypeError, match=r"is a list, expected a torch.Tensor"):
            wrapper.plan(*arrays, **forest.numbers)
    with pytest.raises(ValueError, match="head_dim is 0, expected 1 or more"):
        wrapper.plan(*forest.arrays, **{**forest.numbers, "head_dim": 0})
    with pytest.raises(
        ValueError, match=r"q has dtype torch.float16, expected torch.float32 as pl"
    ):
        wrapper.run(forest.q.half(), forest.cache)
    with pytest.raises(ValueError, match="paged_kv_cache has dtype torch.float16"):
        wrapper.run(forest.q, forest.cache.half())
    with pytest.raises(ValueError, match=r"q has shape .*, expected \[tokens, 4, 64\]"):
        wrapper.run(forest.q[:, :2], forest.cache)
    with pytest.raises(ValueError, match="paged_kv_cache has page_size"):
        wrapper.run(forest.q, forest.cache[:, :, :8])
    with pytest.raises(ValueError, match="q requires grad"):
        wrapper.run(forest.q.clone().requires_grad_(), forest.cache)
    with pytest.raises(ValueError, match="kv_layout is 'NDH'"):
        MultiLevel(2, workspace(device), "NDH")
    with pytest.raises(TypeError, match="float_workspace_buffer is a NoneType"):
        MultiLevel(2)
    with pytest.raises(ValueError, match="num_levels is 0"):
        MultiLevel(0, workspace(device))


def test_reset_workspace_buffer(device: str) -> None:
    wrapper = MultiLevel(2, workspace(device))
    forest = random_forest(2, num_levels=2, num_requests=5, device=device)
    wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
    wrapper.reset_workspace_buffer(workspace(device), [])
    actual = wrapper.run(forest.q, forest.cache)
    assert relative_error(actual, forest.oracle()[0]) < TOLERANCE[torch.float32]
    with pytest.raises(TypeError, match="float_workspace_buffer is a int"):
        wrapper.reset_workspace_buffer(3)


def shared_prefix(
    device: str, shared_len: int, max_qo_len: int, dtype: torch.dtype, seed: int = 0
) -> Any:
    """A one-level forest, a shared prefix, and the two-level forest that is the same batch."""
    forest = random_forest(
        seed, num_levels=1, num_requests=11, max_qo_len=max_qo_len, dtype=dtype, device=device
    )
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, shared_len, 2, 64, generator=generator).to(device, dtype)
    pages = (shared_len + 15) // 16
    whole = random_forest(
        seed, num_levels=1, num_requests=11, max_qo_len=max_qo_len, dtype=dtype, device=device
    )
    padded = torch.full((2, pages * 16, 2, 64), float("nan"), dtype=dtype, device=device)
    padded[:, :shared_len] = shared
    first = forest.cache.shape[0]
    whole.cache = torch.cat([forest.cache, padded.unflatten(1, (pages, 16)).transpose(0, 1)])
    rows = forest.q.shape[0]
    whole.qo_indptr.insert(0, int32(0, rows, device=device))
    whole.kv_indptr.insert(0, int32(0, pages, device=device))
    whole.kv_indices.insert(0, int32(*range(first, first + pages), device=device))
    whole.kv_last_page_len.insert(0, int32((shared_len - 1) % 16 + 1, device=device))
    return forest, shared[0], shared[1], whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("shared_len", [0, 1, 100])
def test_shared_prefix_decode(
    device: str, dtype: torch.dtype, kv_layout: str, shared_len: int
) -> None:
    forest, k, v, whole = shared_prefix(device, shared_len, 1, dtype)
    wrapper = Decode(workspace(device), kv_layout)
    rows = forest.qo_indptr[0].diff().bool()  # decode has one row for each request
    batch = int(rows.sum())
    last = forest.kv_last_page_len[0][rows]
    pages = forest.kv_indptr[0].diff()
    keep = torch.repeat_interleave(rows, pages)
    indptr = torch.cat([int32(0, device=device), pages[rows].cumsum(0, dtype=torch.int32)])
    wrapper.begin_forward(
        indptr, forest.kv_indices[0][keep], last, **forest.numbers, data_type=dtype
    )
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    out = wrapper.forward(forest.q, k, v, forest.cache_as(kv_layout))
    assert out.shape == (batch, 4, 64)
    # two roundings to the output's dtype: each part's, and the merge's
    assert relative_error(out, whole.oracle()[0]) < 2 * TOLERANCE[dtype]
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(workspace(device))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_shared_prefix_prefill(device: str, kv_layout: str, causal: bool) -> None:
    wrapper = Prefill(workspace(device), kv_layout)
    for seed, shared_len in enumerate([37, 100, 100, 0]):
        forest, k, v, whole = shared_prefix(device, shared_len, 9, torch.float32, seed)
        wrapper.begin_forward(*[a[0] for a in forest.arrays], **forest.numbers)
        if kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        cache = forest.cache_as(kv_layout)
        out = wrapper.forward(forest.q, k, v, cache, causal=causal, sm_scale=0.2)
        expected, _ = whole.oracle(causal, sm_scale=0.2)
        assert relative_error(out, expected) < TOLERANCE[torch.float32]
        plain = wrapper.forward(forest.q, k, v, cache)
        assert relative_error(plain, whole.oracle()[0]) < TOLERANCE[torch.float32]
    wrapper.end_forward()


@pytest.mark.parametrize("wrapper_class", [Decode, Prefill])
def test_shared_prefix_refusals(device: str, wrapper_class: Any) -> None:
    forest, k, v, _ = shared_prefix(device, 20, 1, torch.float32)
    wrapper = wrapper_class(workspace(device))
    with pytest.raises(RuntimeError, match="call begin_forward before forward"):
        wrapper.forward(forest.q, k, v, forest.cache)
    arrays = [a[0] for a in forest.arrays]
    if wrapper_class is Decode:
        with pytest.raises(ValueError, match="unique_kv_indptr has dtype torch.int64"):
            wrapper.begin_forward(arrays[1].long(), *arrays[2:], **forest.numbers)
        wrapper.begin_forward(*arrays[1:], **forest.numbers, data_type="float32")
    else:
        with pytest.raises(ValueError, match=r"qo_indptr\[0\] has dtype torch.int64"):
            wrapper.begin_forward(arrays[0].long(), *arrays[1:], **forest.numbers)
        wrapper.begin_forward(*arrays, **forest.numbers)
    rows = 11 if wrapper_class is Decode else forest.q.shape[0]
    q = torch.randn(rows, 4, 64, device=device)
    with pytest.raises(ValueError, match="k_shared has shape .*, expected 3 dimensions"):
        wrapper.forward(q, k[0], v, forest.cache)
    with pytest.raises(ValueError, match="paged_kv_cache.*has shape"):
        wrapper.forward(q, k, v[:3], forest.cache)


def test_compiled_caller_sees_the_next_plan(device: str) -> None:
    """One fullgraph compilation of `run` serves every later plan of the same capacity."""
    wrapper = MultiLevel(2, workspace(device))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, cache: Tensor) -> Tensor:
        out = wrapper.run(q * 2, cache)
        assert isinstance(out, Tensor)
        return out + 1

    for seed in range(8):
        forest = random_forest(seed, num_levels=2, num_requests=20, device=device)
        wrapper.plan(*forest.arrays, **forest.numbers, q_data_type=torch.float32)
        expected, _ = forest.oracle(sm_scale=2 * 0.125)
        actual = step(forest.q, forest.cache)
        assert relative_error(actual - 1, expected) < 10 * TOLERANCE[torch.float32]
    assert counter.frame_count <= 2  # static sizes first, then dynamic ones
