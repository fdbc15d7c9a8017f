"""A small Llama under `torch.compile(mode="reduce-overhead")`: CUDA graphs, nothing skipped."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._inductor.cudagraph_trees
from serving import Serving
from torch import Tensor, nn
from torch._dynamo.utils import counters

import flashinfer_ops
from flashinfer_ops import CascadePlan, cascade_attention, plan_cascade

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, HEAD_DIM = Serving.num_qo_heads, Serving.num_kv_heads, Serving.head_dim
HIDDEN, VOCABULARY, PAGE_SIZE = 128, 64, 4
NUMBERS = {
    "num_qo_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "page_size": PAGE_SIZE,
}


@dataclass
class Step:
    """What every layer of one decode step needs."""

    plan: CascadePlan
    batch: Tensor  # [tokens] the place in the batch of each row, -1 for padding
    positions: Tensor  # [tokens] in the request's own pages
    cos: Tensor  # [tokens, 1, HEAD_DIM / 2]
    sin: Tensor


def rotate(x: Tensor, step: Step) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat(
        [first * step.cos - second * step.sin, second * step.cos + first * step.sin], -1
    )


class Layer(nn.Module):
    def __init__(self, pages: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.output = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.cache: Tensor
        cache = torch.full((pages, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM), float("nan"))
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))  # [tokens, heads, dim]
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rotate(q, step), rotate(k, step)
        plan = step.plan
        flashinfer_ops.append_paged_kv_cache(
            k, v, step.batch, step.positions, self.cache, plan.kv_indices[1], plan.kv_indptr[1],
            plan.kv_last_page_len[1],
        )  # fmt: skip
        out, _ = cascade_attention(q, self.cache, plan)
        x = x + self.output(out.flatten(1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Llama(nn.Module):
    """Two layers over a paged cache of two levels; the planner is part of the step."""

    def __init__(self, pages: int, places_a_tree: int) -> None:
        super().__init__()
        self.places_a_tree = places_a_tree
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(pages) for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, arrays: list[list[Tensor]], out: CascadePlan | None) -> Any:
        plan = plan_cascade(*arrays, **NUMBERS, out=out)
        prefix = flashinfer_ops.get_seq_lens(plan.kv_indptr[0], plan.kv_last_page_len[0], PAGE_SIZE)
        own = flashinfer_ops.get_seq_lens(plan.kv_indptr[1], plan.kv_last_page_len[1], PAGE_SIZE)
        batch, positions = flashinfer_ops.get_batch_indices_positions(
            plan.qo_indptr[1], own, tokens.shape[0]
        )
        absolute = positions + prefix[batch.clamp(min=0) // self.places_a_tree]
        powers = torch.arange(0, HEAD_DIM, 2, device=tokens.device) / HEAD_DIM
        angles = absolute[:, None] * 10000.0**-powers
        step = Step(plan, batch, positions, angles.cos()[:, None], angles.sin()[:, None])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, step)
        return self.head(self.norm(x))


def recorded_graphs() -> int:
    """CUDA graphs that the compiled code of this thread has recorded."""
    container = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device())
    manager = container.tree_manager
    return 0 if manager is None else manager.new_graph_id().id


@pytest.mark.parametrize("planning", ["functional", "in place"])
def test_reduce_overhead(cuda: str, planning: str) -> None:
    """Logits and tokens are the eager ones over steps at which requests join and leave."""
    torch.compiler.reset()
    counters.clear()
    serving = Serving(11, cuda, page_size=PAGE_SIZE, join_length=1)
    serving.lengths = [0] * serving.places  # the caches hold no request's KV yet
    torch.manual_seed(0)
    eager = Llama(len(serving.values), serving.places // serving.trees).to(cuda).eval()
    prefix_pages = [page for group in serving.pages[: serving.trees] for page in group]
    for layer in eager.layers:
        layer.cache[prefix_pages] = torch.randn_like(layer.cache[prefix_pages])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    plan = None
    if planning == "in place":  # the plan's memory is the caller's, and stays where it is
        plan = serving.plan
        for tensors in (*zip(*serving_arrays(plan), strict=True), (plan.schedule,)):
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    rows_seen, mismatches = set(), 0
    tokens = torch.zeros(serving.places, dtype=torch.long, device=cuda)
    with torch.no_grad():
        for i in range(120):
            serving.step()
            if plan is None:
                arrays = serving.full_arrays()
            else:
                serving.fill()
                arrays = serving_arrays(plan)
            tokens.copy_(torch.randint(0, VOCABULARY, tokens.shape, generator=serving.g))
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(tokens, arrays, plan).clone()
            expected = eager(tokens, serving.full_arrays(), None)
            rows = serving.rows
            rows_seen.add(rows)
            torch.testing.assert_close(logits[:rows], expected[:rows], atol=2e-4, rtol=2e-4)
            mismatches += int((logits[:rows].argmax(-1) != expected[:rows].argmax(-1)).sum())
            if i == 3:
                graphs, compilations = recorded_graphs(), counters["stats"]["unique_graphs"]
    assert mismatches == 0 and len(rows_seen) > 4
    for ours, theirs in zip(model.layers, eager.layers, strict=True):
        torch.testing.assert_close(ours.cache, theirs.cache, atol=2e-4, rtol=2e-4, equal_nan=True)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert compilations == counters["stats"]["unique_graphs"] == 1
    # `recorded_graphs` itself takes a number each time it is asked.
    assert graphs >= 1 and recorded_graphs() == graphs + 1, "recorded anew after the first steps"
    torch.compiler.reset()


def serving_arrays(plan: CascadePlan) -> list[list[Tensor]]:
    return [plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len]
