"""A batch that is served step by step: requests join, grow, are rolled back and leave."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from helpers import Forest
from torch import Tensor

from flashinfer_ops import CascadePlan, plan_cascade

FIELDS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")


class Serving:
    """Two trees of three requests: prefixes on level 0, the requests' own KV on level 1.

    Each place in the batch has pages of its own; a request that is not there has no rows and no
    pages, and the rows of those that are there come first. The plan's buffers are allocated once,
    on `device`, and filled in place.
    """

    num_qo_heads, num_kv_heads, head_dim = 4, 2, 64

    def __init__(
        self,
        seed: int,
        device: str,
        *,
        trees: int = 2,
        places: int = 6,
        max_pages: int = 4,
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        join_length: int | None = None,
    ) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.device, self.page_size, self.trees, self.places = device, page_size, trees, places
        self.max_pages, self.max_length = max_pages, max_pages * page_size
        self.join_length = join_length
        self.prefixes, self.lengths = [0] * trees, [0] * places
        pages = (trees + places) * max_pages
        self.pages = torch.randperm(pages, generator=self.g).view(-1, max_pages).tolist()
        shape = (pages, 2, page_size, self.num_kv_heads, self.head_dim)
        self.values = torch.randn(shape, generator=self.g).to(device, dtype)
        self.cache = torch.full_like(self.values, float("nan"))
        self.q = torch.zeros(places, self.num_qo_heads, self.head_dim, dtype=dtype, device=device)
        self.step()
        self.plan = plan_cascade(*self.full_arrays(), **self.numbers)

    @property
    def numbers(self) -> dict[str, int]:
        return {
            "num_qo_heads": self.num_qo_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
        }

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def step(self) -> None:
        """Lengths of the next step, and a cache with NaN wherever there is no live token."""
        for tree in range(self.trees):
            if self.draw(0, 9) == 0 or self.prefixes[tree] == 0:
                self.prefixes[tree] = self.draw(0, self.max_length)
        for place, length in enumerate(self.lengths):
            event = self.draw(0, 19)
            if length == 0:
                joins = event < 5
                self.lengths[place] = self._first_length() if joins else 0
            elif event == 0 or length == self.max_length:
                self.lengths[place] = 0
            elif event == 1:  # rolled back, as after a rejected draft
                self.lengths[place] = self.draw(1, length)
            else:
                self.lengths[place] = length + 1
        live = torch.zeros(len(self.values), self.page_size, dtype=torch.bool)
        for group, length in enumerate([*self.prefixes, *self.lengths]):
            page, slot = divmod(length, self.page_size)
            live[self.pages[group][:page]] = True
            if slot:
                live[self.pages[group][page], :slot] = True
        mask = live.to(self.device)[:, None, :, None, None]
        self.cache.copy_(torch.where(mask, self.values, float("nan")))
        self.q.copy_(torch.randn(self.q.shape, generator=self.g))

    def _first_length(self) -> int:
        return self.draw(1, self.max_length) if self.join_length is None else self.join_length

    @property
    def rows(self) -> int:
        return sum(length > 0 for length in self.lengths)

    def arrays(self) -> list[list[Tensor]]:
        """The index arrays of this step, exact lengths, on the CPU."""
        here = [int(length > 0) for length in self.lengths]
        per_tree = self.places // self.trees
        rows = [
            [sum(here[t * per_tree : (t + 1) * per_tree]) for t in range(self.trees)],
            here,
        ]
        result: list[list[Tensor]] = [[], [], [], []]
        first = 0
        for level, lengths in enumerate((self.prefixes, self.lengths)):
            counts = [-(-length // self.page_size) for length in lengths]
            indices = [
                page
                for group, count in enumerate(counts)
                for page in self.pages[first + group][:count]
            ]
            last = [(length - 1) % self.page_size + 1 if length else 0 for length in lengths]
            qo, kv = [0, *accumulate(rows[level])], [0, *accumulate(counts)]
            for field, values in zip(result, (qo, kv, indices, last), strict=True):
                field.append(torch.tensor(values, dtype=torch.int32))
            first += len(lengths)
        return result

    def full_arrays(self) -> list[list[Tensor]]:
        """The index arrays with room for every page, on the device, as compiled steps take them."""
        arrays = self.arrays()
        for level, groups in enumerate((self.trees, self.places)):
            indices = torch.zeros(groups * self.max_pages, dtype=torch.int32)
            indices[: len(arrays[2][level])] = arrays[2][level]
            arrays[2][level] = indices
        return [[t.to(self.device) for t in level] for level in arrays]

    def fill(self, plan: CascadePlan | None = None) -> None:
        """Write this step's index arrays into the plan's buffers, where they lie."""
        plan = plan or self.plan
        for name, given in zip(FIELDS, self.full_arrays(), strict=True):
            for buffer, array in zip(getattr(plan, name), given, strict=True):
                buffer[: len(array)].copy_(array)
                tail = array[-1] if name.endswith("indptr") else 0
                buffer[len(array) :] = tail

    def replan(self) -> None:
        """Plan what the plan's own buffers hold, into its own schedule."""
        plan = self.plan
        arrays = plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len
        plan_cascade(*arrays, **self.numbers, out=plan)

    def oracle(self) -> tuple[Tensor, Tensor]:
        return Forest(*self.arrays(), self.cache, self.q, self.page_size).oracle()


class Captured:
    """A function of no arguments in a CUDA graph: `outputs` hold what the last replay computed."""

    def __init__(self, function: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and load all that the capture must not
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()
