"""Uploads: LoRA adapters of the tiny base as files in memory, sound ones and broken ones."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

Files = dict[str, bytes]

HIDDEN, RANK = 32, 4
_LAYER = "base_model.model.model.layers.{}.self_attn.q_proj"


def lora(seed: int, *, strength: float = 0.5) -> Files:
    """Different enough from the base, and from every other seed, for greedy answers to differ."""
    return packed(tensors(seed, strength))


def tensors(seed: int, strength: float = 0.5) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (RANK, HIDDEN), "lora_B": (HIDDEN, RANK)}
    return {
        f"{_LAYER.format(layer)}.{half}.weight": torch.randn(*shape, generator=random) * strength
        for layer in range(2)
        for half, shape in shapes.items()
    }


def packed(weights: Mapping[str, Tensor], **config: object) -> Files:
    """The two files of `save_pretrained()`; keyword arguments change the config."""
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    return {"adapter_config.json": json.dumps(fields).encode(), "adapter_model.safetensors": save(dict(weights))}
