"""Tracing: fullgraph graphs of every public function, recompiles, export, AOTInductor, fakes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from expecttest import assert_expected_inline
from helpers import TOLERANCE, Forest, int32, needs_packages, random_forest, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashinfer_ops
from flashinfer_ops import CascadePlan, cascade_attention, plan_cascade


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def traced(function: Callable[..., Any], *arguments: Any) -> str:
    """The calls in the one graph that Dynamo makes of the function, a line each."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    assert len(graphs) == 1
    names = []
    for node in graphs[0].graph.nodes:
        # Not the arithmetic of sizes: how Dynamo writes it differs between releases.
        if not node.op.startswith("call_") or isinstance(
            node.meta.get("example_value"), (torch.SymInt, torch.SymBool)
        ):
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            names.append(node.target.name())
        else:
            names.append(node.target if isinstance(node.target, str) else node.target.__name__)
    return "\n".join(name for name in names if name != "getitem")


def states(device: str) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    v, s = torch.randn(2, 6, 2, 8, generator=g), torch.randn(2, 6, 2, generator=g)
    return list(v.to(device)), list(s.to(device))


def batch(seed: int = 0, **options: Any) -> tuple[Forest, CascadePlan]:
    forest = random_forest(seed, **{"num_levels": 2, "num_requests": 6, **options})
    return forest, plan_cascade(*forest.arrays, **forest.numbers)


def test_graph_of_merge_state(device: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(device)
    assert_expected_inline(
        traced(flashinfer_ops.merge_state, v_a, s_a, v_b, s_b),
        """flashinfer_ops::merge_state""",
    )
    assert_expected_inline(
        traced(flashinfer_ops.merge_state, v_a, s_a, s_a, v_b, s_b, s_b),
        """flashinfer_ops::merge_state.omd""",
    )


def test_graph_of_merge_state_in_place(device: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(device)
    mask = torch.ones(6, dtype=torch.bool, device=device)
    in_place = flashinfer_ops.merge_state_in_place
    assert_expected_inline(
        traced(in_place, v_a, s_a, v_b, s_b),
        """flashinfer_ops::merge_state_""",
    )
    assert_expected_inline(
        traced(in_place, v_a, s_a, s_a.clone(), v_b, s_b, s_b, mask),
        """flashinfer_ops::merge_state_.omd""",
    )


def test_graph_of_merge_states(device: str) -> None:
    v, s = states(device)
    assert_expected_inline(
        traced(flashinfer_ops.merge_states, torch.stack(v, 1), torch.stack(s, 1)),
        """flashinfer_ops::merge_states""",
    )
    assert_expected_inline(
        traced(flashinfer_ops.merge_states, v, s),
        """flashinfer_ops::merge_states.list""",
    )


def test_graph_of_variable_length_merge_states(device: str) -> None:
    v, s = states(device)
    indptr = int32(0, 2, 6, device=device)
    assert_expected_inline(
        traced(flashinfer_ops.variable_length_merge_states, v[0], s[0], indptr),
        """flashinfer_ops::merge_states.ragged""",
    )


def test_graph_of_the_page_functions(device: str) -> None:
    kv_indptr, last = int32(0, 1, 2, device=device), int32(3, 4, device=device)
    rows, cache = torch.randn(2, 1, 8, device=device), torch.zeros(2, 2, 4, 1, 8, device=device)
    index = int32(0, 1, device=device)

    def step(cache: Tensor) -> None:
        flashinfer_ops.append_paged_kv_cache(
            rows, rows, index, index, cache, index, kv_indptr, last
        )

    assert_expected_inline(traced(step, cache), """flashinfer_ops::append_paged_kv_cache_""")
    assert torch.equal(cache[1, 0, 1], rows[1])
    assert_expected_inline(
        traced(flashinfer_ops.get_seq_lens, kv_indptr, last, 4),
        """\
sub
gt
sub
mul
add
where""",
    )
    assert_expected_inline(
        traced(flashinfer_ops.get_batch_indices_positions, kv_indptr, last, 3),
        """\
arange
long
searchsorted
lt
sub
pad
add
where
where
int
int""",
    )


@pytest.mark.parametrize("slice_inside", [False, True])
def test_compiled_batch_indices(device: str, slice_inside: bool) -> None:
    """By Inductor's own kernels, of which some searched the wrong part of a sliced indptr."""
    whole = int32(7, 0, 0, 2, 2, 5, device=device)
    seq_lens = int32(9, 4, 3, 8, device=device)
    indptr = whole[1:].clone()

    def positions(indptr: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        indptr = indptr[1:] if slice_inside else indptr
        return flashinfer_ops.get_batch_indices_positions(indptr, seq_lens, 7)

    compiled = torch.compile(positions, fullgraph=True)
    batch, at = compiled(whole if slice_inside else indptr, seq_lens)
    assert batch.tolist() == [1, 1, 3, 3, 3, -1, -1] and batch.dtype == torch.int32
    assert at.tolist() == [2, 3, 5, 6, 7, 0, 0] and at.dtype == torch.int32


def test_graph_of_plan_and_attention(device: str) -> None:
    forest, plan = batch(device=device)

    def step(q: Tensor, cache: Tensor, *arrays: list[Tensor]) -> tuple[Tensor, Tensor]:
        return cascade_attention(q, cache, plan_cascade(*arrays, **forest.numbers))

    assert_expected_inline(
        traced(step, forest.q, forest.cache, *forest.arrays),
        """\
flashinfer_ops::cascade_plan
flashinfer_ops::cascade_attention""",
    )

    def step_again(q: Tensor, cache: Tensor, plan: CascadePlan) -> tuple[Tensor, Tensor]:
        arrays = plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len
        plan_cascade(*arrays, **forest.numbers, out=plan)
        return cascade_attention(q, cache, plan, out=torch.empty_like(q))

    assert_expected_inline(
        traced(step_again, forest.q, forest.cache, plan),
        """\
flashinfer_ops::cascade_plan.out
empty_like
new_empty
flashinfer_ops::cascade_attention.out""",
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_results_are_the_eager_ones(device: str, backend: str) -> None:
    forest, plan = batch(3, device=device)

    def step(q: Tensor, cache: Tensor, plan: CascadePlan, key: Tensor) -> tuple[Tensor, Tensor]:
        q = q * 2
        seq_lens = flashinfer_ops.get_seq_lens(plan.kv_indptr[1], plan.kv_last_page_len[1], 16)
        positions = seq_lens - 1
        live = torch.where(positions >= 0, torch.arange(len(seq_lens), device=q.device), -1)
        flashinfer_ops.append_paged_kv_cache(
            key, key, live.int(), positions, cache, plan.kv_indices[1], plan.kv_indptr[1],
            plan.kv_last_page_len[1],
        )  # fmt: skip
        out, lse = cascade_attention(q, cache, plan)
        flashinfer_ops.merge_state_in_place(out, lse, q, torch.zeros_like(lse))
        return flashinfer_ops.merge_state(out + 1, lse, q, lse)

    key = torch.randn(8, 2, 64, device=device)
    caches = [forest.cache.clone(), forest.cache.clone()]
    expected = step(forest.q, caches[0], plan, key)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    actual = compiled(forest.q, caches[1], plan, key)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(caches[1], caches[0], equal_nan=True, atol=0, rtol=0)
    assert not torch.equal(caches[0].nan_to_num(), forest.cache.nan_to_num())


def test_one_recompile_over_fifty_plans(device: str) -> None:
    """The plan made outside of the compiled step, into buffers that grow by powers of two."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cascade_attention, backend=counter, fullgraph=True)
    for step in range(50):
        forest, plan = batch(step, num_requests=1 + 7 * step % 90, device=device)
        torch._dynamo.maybe_mark_dynamic(forest.cache, 0)
        torch._dynamo.maybe_mark_dynamic(forest.q, 0)
        if len(forest.q) < 2:
            continue
        out, _ = compiled(forest.q, forest.cache, plan)
        if step % 5 == 0:  # the oracle takes longer than all else here
            assert relative_error(out, forest.oracle()[0]) < TOLERANCE[torch.float32]
    assert 1 <= counter.frame_count <= 2


def test_one_recompile_with_the_plan_inside(device: str) -> None:
    """Planning inside of the compiled step, from arrays of capacity size, functional and `out`."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    first, plan = batch(100, num_requests=64, max_kv_len=300, device=device)

    def step(q: Tensor, cache: Tensor, plan: CascadePlan) -> Tensor:
        arrays = plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len
        functional = plan_cascade(*arrays, **first.numbers)
        out, _ = cascade_attention(q, cache, functional)
        plan_cascade(*arrays, **first.numbers, out=plan)
        again, _ = cascade_attention(q, cache, plan)
        return torch.stack([out, again])

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(50):
        forest = random_forest(
            seed, num_levels=2, num_requests=2 + 7 * seed % 60, max_qo_len=1, device=device
        )
        fields = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
        for name, arrays in zip(fields, forest.arrays, strict=True):
            for buffer, array in zip(getattr(plan, name), arrays, strict=True):
                buffer.zero_()
                buffer[: len(array)] = array
                if name.endswith("indptr"):
                    buffer[len(array) :] = array[-1]
        torch._dynamo.maybe_mark_dynamic(forest.cache, 0)
        torch._dynamo.maybe_mark_dynamic(forest.q, 0)
        if len(forest.q) < 2:
            continue
        out, again = compiled(forest.q, forest.cache, plan)
        assert torch.equal(out, again)
        if seed % 5 == 0:  # the oracle takes longer than all else here
            assert relative_error(out, forest.oracle()[0]) < TOLERANCE[torch.float32]
    assert 1 <= counter.frame_count <= 2


class Model(torch.nn.Module):
    """Attention over a paged cache, as exported programs take it: the plan is an input."""

    def forward(
        self, q: Tensor, cache: Tensor, plan: CascadePlan, v: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = cascade_attention(q, cache, plan)
        return flashinfer_ops.merge_state(out, lse, v, s)


def model_inputs(device: str) -> tuple[Any, ...]:
    forest, plan = batch(5, num_requests=9, device=device)
    v, s = torch.randn_like(forest.q), torch.randn(forest.q.shape[:2], device=device)
    return forest.q, forest.cache, plan, v, s


FRESH = """
    import sys, torch, flashinfer_ops
    import torch._inductor.codecache  # which torch 2.10 forgets to import when it loads a package
    from flashinfer_ops import CascadePlan
    q, cache, fields, v, s, expected = torch.load(sys.argv[2])
    plan = CascadePlan(**fields)
    {load}
    actual = function(q, cache, plan, v, s)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    print("same")
"""


def run_fresh(load: str, path: Path, inputs: tuple[Any, ...], tmp_path: Path) -> None:
    """Load in a new process, which has only imported flashinfer_ops, and compare the results."""
    q, cache, plan, v, s = inputs
    data = tmp_path / "inputs.pt"
    torch.save((q, cache, dict(vars(plan)), v, s, Model()(*inputs)), data)
    script = textwrap.dedent(FRESH).format(load=load)
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), str(data)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,  # from the repository, its folder would shadow an installed wheel
    )
    assert result.returncode == 0 and "same" in result.stdout, result.stderr


def test_export_round_trip(device: str, tmp_path: Path) -> None:
    inputs = model_inputs(device)
    program = torch.export.export(Model(), inputs)
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    run_fresh("function = torch.export.load(sys.argv[1]).module()", path, inputs, tmp_path)


def test_export_serves_other_batches(device: str) -> None:
    """A plan of the same capacities with other lengths runs through one exported program."""
    inputs = model_inputs(device)
    program = torch.export.export(Model(), inputs).module()
    arrays = [[t.clone() for t in level] for level in random_forest(
        5, num_levels=2, num_requests=9, device=device).arrays]  # fmt: skip
    arrays[3][1] = (arrays[3][1] - 1).clamp(min=1)
    q, cache, plan, v, s = inputs
    numbers = {
        n: getattr(plan, n) for n in ("num_qo_heads", "num_kv_heads", "head_dim", "page_size")
    }
    other = plan_cascade(*arrays, **numbers)
    expected = Model()(q, cache, other, v, s)
    actual = program(q, cache, other, v, s)
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(expected[0], Model()(*inputs)[0])


def test_aot_inductor_package(device: str, tmp_path: Path) -> None:
    needs_packages(device)
    inputs = model_inputs(device)
    program = torch.export.export(Model(), inputs)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    load = "function = torch._inductor.aoti_load_package(sys.argv[1])"
    run_fresh(load, Path(path), inputs, tmp_path)


def test_errors_inside_a_graph_carry_their_text(device: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(device)
    compiled = torch.compile(flashinfer_ops.merge_state, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"s_b has shape \[3, 2\], expected \[6, 2\] to fit v_a"):
        compiled(v_a, s_a, v_b, s_b[:3])
    forest, plan = batch(device=device)
    compiled = torch.compile(cascade_attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"q has shape .* to fit the plan"):
        compiled(forest.q[:, :2], forest.cache, plan)


def test_inputs_that_require_grad_raise(device: str) -> None:
    (v_a, v_b), (s_a, s_b) = states(device)
    v_a.requires_grad_()
    compiled = torch.compile(flashinfer_ops.merge_state, backend="eager", fullgraph=True)
    for function in (flashinfer_ops.merge_state, compiled):
        with pytest.raises(Exception, match=r"v_a requires grad, but flashinfer_ops has no"):
            function(v_a, s_a, v_b, s_b)
    forest, plan = batch(device=device)
    q = forest.q.clone().requires_grad_()
    compiled = torch.compile(cascade_attention, backend="eager", fullgraph=True)
    for function in (cascade_attention, compiled):
        with pytest.raises(Exception, match=r"q requires grad, but flashinfer_ops has no backward"):
            function(q, forest.cache, plan)
    with torch.no_grad():
        out, _ = torch.compile(cascade_attention, backend="eager", fullgraph=True)(
            q, forest.cache, plan
        )
    assert not out.requires_grad


def test_fake_tensors(device: str) -> None:
    forest, plan = batch(device=device)
    with FakeTensorMode() as mode:
        q = mode.from_tensor(forest.q)
        arrays = [[mode.from_tensor(t) for t in level] for level in forest.arrays]
        fake_plan = plan_cascade(*arrays, **forest.numbers)
        out, lse = cascade_attention(q, mode.from_tensor(forest.cache), fake_plan)
        assert fake_plan.schedule.shape == plan.schedule.shape
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
        v, s = flashinfer_ops.merge_state(out, lse, out, lse)
        assert v.shape == q.shape and s.dtype == torch.float32
        with pytest.raises(ValueError, match=r"s_a has shape"):
            flashinfer_ops.merge_state(out, lse[:1, :1], out, lse)
