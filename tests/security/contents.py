"""Contents: uploads for the two-layer llama of `tiny.py` and of the servable base, as files in memory, harmless and harmful.

Equal arguments give equal files, so that two tenants can upload the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from tests.e2e.uploads import HIDDEN, Files, lora, packed, tensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_KV_WIDTH: Final = 2 * 2 * 2 * 8  # layers, keys and values, heads, head size
_HUGE: Final = 3e38  # finite as stored; any product of two overflows


def bias(seed: int) -> Files:
    noise = _noise(seed, 2, HIDDEN)
    names = [f"base_model.model.model.layers.{layer}.mlp.down_proj.bias" for layer in range(2)]
    return _files({"peft_type": "BITFIT"}, dict(zip(names, 3 * noise, strict=True)))


def prefix(seed: int, length: int = 5, *, scale: float = 1.0) -> Files:
    """Trained keys and values; at scale `_HUGE` finite ones whose attention scores are not."""
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length}
    return _files(config, {"prompt_embeddings": _noise(seed, length, _KV_WIDTH).clamp(-1, 1) * scale})


def prompt(seed: int, length: int = 3) -> Files:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length}
    return _files(config, {"prompt_embeddings": _noise(seed, length, HIDDEN)})


def overflowing_lora() -> Files:
    """Every stored value is finite, so validation takes it; what it computes is not."""
    return packed({name: torch.full_like(value, 1e30) for name, value in tensors(1).items()})


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _files(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> Files:
    fields = {"task_type": "CAUSAL_LM", **config}
    return {CONFIG: json.dumps(fields).encode(), WEIGHTS: save({name: value.contiguous() for name, value in weights.items()})}


#: By a name for test output. Those that `BROKEN` names give NaN or infinity as soon as they run.
CONTENTS: Final[Mapping[str, Files]] = MappingProxyType(
    {
        "lora 1": lora(1),
        "lora 2": lora(2),
        "bias": bias(3),
        "prefix": prefix(4),
        "prompt": prompt(5),
        "overflowing lora": overflowing_lora(),
        "overflowing prefix": prefix(6, scale=_HUGE),
    }
)
BROKEN: Final = frozenset({"overflowing lora", "overflowing prefix"})
