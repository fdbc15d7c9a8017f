"""Many questions behind one system prompt: page tables, prefill and the decode loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from paged_llm import Level, PagedLM, make_level
from torch import Tensor, nn
from transformers import PreTrainedModel


def compilations() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that `tokens` tokens need."""
    return -(-tokens // page_size)


class State(NamedTuple):
    """What a decode step reads for n requests; each tensor's first dimension grows with n."""

    token_ids: Tensor  # [n], the newest token of each request
    shared: Level  # level 0: the system prompt
    page_table: Tensor  # int32 [n, max_pages], level 1: each request's own pages
    seq_lens: Tensor  # int32 [n], tokens in them


class ChatSession:
    """Requests that share a system prompt, over one paged cache.

    The cache's first pages hold the system prompt, once; then come the requests' own pages. With
    `with_copies` there is room for a copy of the system prompt for every request as well, only to
    measure what sharing saves: both ways run through the same compiled step, since what is shared
    is said by the index arrays of level 0 and by nothing else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix_ids: list[int],
        questions: list[list[int]],
        new_tokens: int,
        page_size: int = 16,
        with_copies: bool = False,
    ) -> None:
        self.device = model.device
        self.prefix_ids, self.questions = prefix_ids, questions
        own_tokens = max(map(len, questions)) + new_tokens
        rows = len(questions)
        prefix_pages = pages_for(len(prefix_ids), page_size)
        own_pages = pages_for(own_tokens, page_size)
        num_pages = prefix_pages + rows * own_pages + (rows * prefix_pages if with_copies else 0)
        pages = torch.arange(num_pages, dtype=torch.int32, device=self.device)
        first, own, copies = pages.split(
            [prefix_pages, rows * own_pages, num_pages - prefix_pages - rows * own_pages]
        )
        self.prefix_pages = first.view(1, prefix_pages)
        self.own_pages = own.view(rows, own_pages)
        self.copied_pages = copies.view(-1, prefix_pages)
        self.lm = PagedLM(model, num_pages, page_size)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.step = torch.compile(self.lm.decode_step, fullgraph=True, mode=mode)

    def int32(self, values: list[int]) -> Tensor:
        """An index array."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def prefill_prefix(self) -> None:
        """Fill the system prompt's pages: one level, one group, causal."""
        token_ids = torch.tensor(self.prefix_ids, device=self.device)  # [tokens]
        level = self.prefix_level(len(token_ids))
        self.lm(token_ids, [level], logits_at=level.qo_indptr[1:] - 1, causal=True)

    def copy_prefix(self) -> None:
        """Copy the system prompt's pages once for every request (only to compare)."""
        for kv_cache in self.lm.kv_caches:
            kv_cache[self.copied_pages] = kv_cache[self.prefix_pages]

    def prefix_level(self, tokens: int) -> Level:
        """The system prompt as one group over `tokens` tokens."""
        length = self.int32([len(self.prefix_ids)])
        return make_level(self.int32([0, tokens]), self.prefix_pages, length, self.lm.page_size)

    def decode_level(self, n: int, copied: bool = False) -> Level:
        """The system prompt in a decode step of n requests: one group or, with `copied`, n groups.

        The arrays have room for n groups either way (unused ones are empty), so that their sizes
        follow from n and one compilation serves both.
        """
        length = len(self.prefix_ids)
        if copied:
            qo_indptr, seq_lens = list(range(n + 1)), [length] * n
            page_table = self.copied_pages[:n]
        else:
            qo_indptr, seq_lens = [0] + [n] * n, [length] + [0] * (n - 1)
            page_table = self.prefix_pages.expand(n, -1)
        return make_level(
            self.int32(qo_indptr), page_table, self.int32(seq_lens), self.lm.page_size
        )

    def prefill_questions(self, n: int) -> State:
        """Run the first n questions, packed one after the other, causal in their own level."""
        questions = self.questions[:n]
        lengths = self.int32([len(question) for question in questions])
        qo_indptr = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # [n + 1]
        packed = list(itertools.chain.from_iterable(questions))
        token_ids = torch.tensor(packed, device=self.device)  # [tokens]
        page_table = self.own_pages[:n]
        own = make_level(qo_indptr, page_table, lengths, self.lm.page_size)
        levels = [self.prefix_level(len(token_ids)), own]
        first_tokens = self.lm(token_ids, levels, logits_at=qo_indptr[1:] - 1, causal=True)
        return State(first_tokens, self.decode_level(n), page_table, lengths)

    def decode_step(self, state: State) -> Tensor:
        """The next token of each request, [n]. Compiled at its first call, for any n from 2 up."""
        for tensor in (state.token_ids, *state.shared, state.page_table, state.seq_lens):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.step(*state).clone()  # a CUDA graph's output is overwritten by its next replay

    def decode(self, state: State, new_tokens: int, on_step: Callable[[], object]) -> Tensor:
        """Answer greedily: [n, new_tokens], the prefill's token first."""
        answers = [state.token_ids]
        while len(answers) < new_tokens:
            token_ids = self.decode_step(state)
            answers.append(token_ids)
            state = state._replace(token_ids=token_ids, seq_lens=state.seq_lens + 1)
            on_step()
        return torch.stack(answers, dim=1)
