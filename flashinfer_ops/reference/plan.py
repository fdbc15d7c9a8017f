"""The reference attention needs no schedule: the plan is a blank one of the right size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..meta.plan import schedule_size


def cascade_plan(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool,
) -> Tensor:
    size = schedule_size([t.shape[0] - 1 for t in kv_indptr], kv_indptr[0].device)
    return kv_indptr[0].new_zeros((size,), dtype=torch.int32)


def cascade_plan_out(
    qo_indptr: Sequence[Tensor],
    kv_indptr: Sequence[Tensor],
    kv_last_page_len: Sequence[Tensor],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool,
    schedule: Tensor,
) -> None:
    schedule.zero_()
