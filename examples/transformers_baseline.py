"""The same prompts through transformers' own `generate`: sdpa, left padding, greedy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepClock(LogitsProcessor):
    """Notes the time whenever `generate` has the logits of its next tokens."""

    def __init__(self, on_step: Callable[[], object]) -> None:
        self.times: list[float] = []
        self.on_step = on_step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronize(scores.device)
        self.times.append(time.perf_counter())
        self.on_step()
        return scores


class Generated(NamedTuple):
    """What `generate` answered and what it took."""

    tokens: Tensor  # [requests, new_tokens]
    logits: Tensor  # [requests, new_tokens, vocabulary]
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int


def cache_bytes(cache: DynamicCache) -> int:
    """Memory that the cache's keys and values take."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    on_step: Callable[[], object],
) -> Generated:
    """Answer all prompts in one batch, each with its own copy of the system prompt's KV."""
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None  # all requests run for the same number of steps
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    input_ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    clock = StepClock(on_step)
    synchronize(model.device)
    start = time.perf_counter()
    out = model.generate(
        torch.tensor(input_ids, device=model.device),  # [requests, longest]
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
        logits_processor=[clock],
    )
    return Generated(
        tokens=out.sequences[:, longest:],
        logits=torch.stack(out.logits, dim=1),
        prefill_seconds=clock.times[0] - start,
        decode_seconds=clock.times[-1] - clock.times[0],
        kv_bytes=cache_bytes(out.past_key_values),
    )


class CachedPrefix:
    """Decode steps of transformers' own kind behind a prefix that is computed once, then copied."""

    def __init__(self, model: PreTrainedModel, prefix_ids: list[int]) -> None:
        model.set_attn_implementation("sdpa")
        self.model = model
        prefix = torch.tensor([prefix_ids], device=model.device)
        self.cache = model(prefix, use_cache=True, logits_to_keep=1).past_key_values

    def for_requests(self, n: int) -> Callable[[Tensor], Tensor]:
        """A function from the newest tokens, [n], to the next ones; it extends its own cache."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(n)

        def decode_step(token_ids: Tensor) -> Tensor:
            return self.model(token_ids[:, None], past_key_values=cache).logits[:, -1].argmax(-1)

        return decode_step
