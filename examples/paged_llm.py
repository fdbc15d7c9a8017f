"""A transformers language model whose KV cache is paged and whose attention is a cascade.

The model stays what transformers loaded. Two things are added around it:

- `cascade_paged`, an attention function under transformers' own `AttentionInterface`: it writes the
  new keys and values into the layer's pages and attends to every level of the cascade at once;
- `PagedLM`, which owns the pages and turns a packed, ragged batch of tokens into the next tokens.

A batch is described by its `Level`s and by nothing else: which tokens, which pages, how long. The
same code is the prefill of a system prompt (one level), the prefill of many questions behind it
(two levels, causal in the last) and a decode step (two levels, one token a request).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

import flashinfer_ops


class Level(NamedTuple):
    """One level of the cascade: `groups` runs of consecutive tokens, each with its own KV pages."""

    qo_indptr: Tensor  # int32 [groups + 1]: group g has tokens qo_indptr[g] .. qo_indptr[g + 1]
    kv_indptr: Tensor  # int32 [groups + 1]: and pages kv_indices[kv_indptr[g] .. kv_indptr[g + 1]]
    kv_indices: Tensor  # int32 [at least kv_indptr[-1]]: page numbers
    kv_last_page_len: Tensor  # int32 [groups]: tokens in the last page of each group


def make_level(qo_indptr: Tensor, page_table: Tensor, seq_lens: Tensor, page_size: int) -> Level:
    """Build a `Level` on the device, without asking the host how long anything is.

    Args:
        qo_indptr: int32 [groups + 1].
        page_table: int32 [groups, max_pages], the pages set aside for each group.
        seq_lens: int32 [groups], KV tokens of each group, new ones included. A group of length 0
            takes part in nothing.
        page_size: tokens in a page.
    """
    groups, max_pages = page_table.shape
    num_pages = (seq_lens + page_size - 1) // page_size  # [groups]
    kv_indptr = nn.functional.pad(num_pages.cumsum(0, dtype=torch.int32), (1, 0))  # [groups + 1]
    # kv_indices has room for every page of the table, so its size does not change as answers grow.
    slots = torch.arange(groups * max_pages, dtype=torch.int32, device=page_table.device)
    group = torch.searchsorted(kv_indptr[1:], slots, right=True).clamp(max=groups - 1)
    page = (slots - kv_indptr[group]).clamp(max=max_pages - 1)
    return Level(
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=page_table[group, page],
        kv_last_page_len=seq_lens - (num_pages - 1) * page_size,
    )


class PagedContext(NamedTuple):
    """What each layer's attention needs: a keyword of `model(...)` that reaches `cascade_paged`."""

    kv_caches: Sequence[Tensor]  # per layer [pages, 2, page_size, num_kv_heads, head_dim]
    plan: flashinfer_ops.CascadePlan
    level: Level  # the last level, to which the new tokens are appended
    batch_indices: Tensor  # int32 [tokens]: group of each token in that level
    positions: Tensor  # int32 [tokens]: where the token stands within its group


def cascade_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedContext,
    **_: Any,
) -> tuple[Tensor, None]:
    """Append the new keys and values, then attend to all levels; called by transformers.

    Args:
        module: the attention layer that calls; `layer_idx` says which.
        query: [1, num_qo_heads, tokens, head_dim], RoPE applied.
        key: [1, num_kv_heads, tokens, head_dim], RoPE applied.
        value: [1, num_kv_heads, tokens, head_dim].
        attention_mask: not used; the plan says who attends to what.
        paged: the pages, the plan and where the new tokens go.

    Returns:
        The attention output, [1, tokens, num_qo_heads, head_dim], and no weights.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    kv_cache = paged.kv_caches[module.layer_idx]
    flashinfer_ops.append_paged_kv_cache(
        k,
        v,
        paged.batch_indices,
        paged.positions,
        kv_cache,
        paged.level.kv_indices,
        paged.level.kv_indptr,
        paged.level.kv_last_page_len,
    )
    out, _lse = flashinfer_ops.cascade_attention(q, kv_cache, paged.plan)
    return out[None], None


AttentionInterface.register("cascade_paged", cascade_paged)


class PagedLM(nn.Module):
    """A causal language model over a paged KV cache: packed tokens in, greedy next tokens out."""

    def __init__(self, model: PreTrainedModel, num_pages: int, page_size: int = 16) -> None:
        super().__init__()
        config = model.config
        model.set_attn_implementation("cascade_paged")
        self.model = model
        self.page_size = page_size
        self.num_layers: int = config.num_hidden_layers
        self.heads = {
            "num_qo_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        }
        page = (2, page_size, config.num_key_value_heads, config.head_dim)
        for layer in range(self.num_layers):
            # Buffers, because a compiled graph may rely on their address, as CUDA graphs must.
            pages = torch.zeros(num_pages, *page, dtype=model.dtype, device=model.device)
            self.register_buffer(f"kv_cache_{layer}", pages, persistent=False)

    @property
    def kv_caches(self) -> list[Tensor]:
        """Per layer, [pages, 2, page_size, num_kv_heads, head_dim]."""
        return [self.get_buffer(f"kv_cache_{layer}") for layer in range(self.num_layers)]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take in all layers together."""
        element = self.kv_caches[0].element_size()
        return 2 * self.num_layers * self.heads["num_kv_heads"] * self.heads["head_dim"] * element

    def forward(
        self, token_ids: Tensor, levels: Sequence[Level], logits_at: Tensor, causal: bool = False
    ) -> Tensor:
        """Run packed tokens through the model and choose the next token of each request.

        Args:
            token_ids: [tokens], the new tokens of all requests, one request after the other.
            levels: root first. The last level's pages take the new tokens' KV; its lengths count
                them already.
            logits_at: [requests], the last token of each request.
            causal: whether a new token must not see later ones of its own group (prefill).

        Returns:
            [requests], the most likely next tokens.
        """
        tokens = token_ids.shape[0]
        position = torch.zeros_like(token_ids)  # [tokens], absolute: for RoPE
        for level in levels:
            seq_lens = flashinfer_ops.get_seq_lens(
                level.kv_indptr, level.kv_last_page_len, self.page_size
            )  # [groups]
            batch_indices, in_group = flashinfer_ops.get_batch_indices_positions(
                level.qo_indptr, seq_lens, tokens
            )  # [tokens] each
            is_last = level is levels[-1]
            position = position + (in_group if is_last else seq_lens[batch_indices])
        plan = flashinfer_ops.plan_cascade(
            [level.qo_indptr for level in levels],
            [level.kv_indptr for level in levels],
            [level.kv_indices for level in levels],
            [level.kv_last_page_len for level in levels],
            page_size=self.page_size,
            causal=causal,
            **self.heads,
        )
        logits = self.model(
            token_ids[None],
            position_ids=position[None],
            use_cache=False,
            logits_to_keep=logits_at,
            paged=PagedContext(self.kv_caches, plan, levels[-1], batch_indices, in_group),
        ).logits  # [1, requests, vocabulary]
        return logits[0].argmax(-1)

    def decode_step(
        self, token_ids: Tensor, shared: Level, page_table: Tensor, seq_lens: Tensor
    ) -> Tensor:
        """One greedy step of all requests: plan, append and attend. Compile this function.

        Args:
            token_ids: [requests], the newest token of each request, not yet in the cache.
            shared: the KV that requests have in common (any number of groups).
            page_table: int32 [requests, max_pages], each request's own pages.
            seq_lens: int32 [requests], tokens in them before this step.

        Returns:
            [requests], the next tokens.
        """
        requests = token_ids.shape[0]
        one_each = torch.arange(requests + 1, dtype=torch.int32, device=token_ids.device)
        own = make_level(one_each, page_table, seq_lens + 1, self.page_size)
        return self(token_ids, [shared, own], logits_at=one_each[:-1])
