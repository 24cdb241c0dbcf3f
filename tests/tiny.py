"""Tiny random decoders, one per architecture: two layers, 32 wide, weights large enough for greedy tokens to differ."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 97
POSITIONS = 256
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LIMITS = {"max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

ARCHITECTURES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, **_LIMITS, num_key_value_heads=2, intermediate_size=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, **_LIMITS, num_key_value_heads=2, intermediate_size=64)),
    "gemma": lambda: GemmaForCausalLM(
        GemmaConfig(**_SIZES, **_LIMITS, num_key_value_heads=1, head_dim=8, intermediate_size=64)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_SIZES, **_LIMITS, ffn_dim=64, word_embed_proj_dim=32)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, **_LIMITS, intermediate_size=64)),
}


def tiny_model(architecture: str) -> PreTrainedModel:
    """A fresh copy each time: callers hook it and change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ARCHITECTURES[architecture]()
    model.load_state_dict(_weights(architecture))
    return model.eval().requires_grad_(False)


@functools.cache
def _weights(architecture: str) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ARCHITECTURES[architecture]()
    generator = torch.Generator().manual_seed(sum(map(ord, architecture)))
    state = model.state_dict()
    for name, value in state.items():
        if value.ndim == 2:
            value.normal_(std=0.3, generator=generator)
        elif name.endswith("bias"):
            value.normal_(std=0.1, generator=generator)
    return state


def save_servable(directory: Path) -> Path:
    """A tiny llama and a byte-level tokenizer in one directory: a base model that a server process can be given."""
    from tests.api.fakes import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
