"""Tiny random decoders, one per architecture: two layers, 32 wide, weights large enough for greedy tokens to differ."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB = 97
POSITIONS = 256
WINDOW = 24  # shorter than the longest texts of the parity tests, so that it is felt
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FULL = {**_SIZES, "intermediate_size": 64}
_GQA = {**_FULL, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}

#: Hugging Face's model type -> the arguments of its config that are not its defaults.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": _GQA,
    "qwen2": _GQA,
    "gemma": {**_GQA, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {**_GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": _FULL,
    "mistral": {**_GQA, "sliding_window": WINDOW},
    "mixtral": {**_GQA, "num_local_experts": 4},
    "qwen3": {**_GQA, "head_dim": 8},
    "gemma2": {**_GQA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "gemma3_text": {**_GQA, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": _FULL,
    "phi3": _GQA,
    "olmo2": _GQA,
    "granite": {**_GQA, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "cohere": {**_GQA, "logit_scale": 0.5},
    "starcoder2": _GQA,
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
}


def tiny_model(architecture: str) -> PreTrainedModel:
    """A fresh copy each time: callers hook it and change it."""
    model = _build(architecture)
    model.load_state_dict(_weights(architecture))
    return model.eval().requires_grad_(False)


def _build(architecture: str) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@functools.cache
def _weights(architecture: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, architecture)))
    state = _build(architecture).state_dict()
    for name, value in state.items():
        if value.ndim >= 2:
            value.normal_(std=0.3, generator=generator)
        elif name.endswith("bias"):
            value.normal_(std=0.1, generator=generator)
        else:  # a norm's: around what it starts as
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
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
