"""Random adapters of every family, as the files that PEFT or AdapterHub would have saved for a given base.

Owns names and shapes of those files, and values small enough that logits stay finite. Knows no weights of the base.

    files = make_adapter("lora", Dimensions.of(info), np.random.default_rng(0), rank=16)
    {"adapter_config.json": b"{...}", "adapter_model.safetensors": b"..."}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from .dimensions import Dimensions
from .options import BenchError, Family, Precision

Array = NDArray[np.float32]
Files = dict[str, bytes]

#: Standard deviation of everything trained: moves the logits visibly, far from overflow in any base.
_SCALE: Final = 0.02
_REDUCTION: Final = 16  # hidden size / bottleneck width, AdapterHub's default
_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class Recipe:
    """What the sizes of one adapter depend on besides the base."""

    dimensions: Dimensions
    random: np.random.Generator
    rank: int
    virtual_tokens: int
    precision: Precision

    def noise(self, *shape: int) -> Array:
        """Random weights in fp32; of bf16 precision as training in bf16 leaves them, unless asked for otherwise."""
        weights: Array = self.random.standard_normal(shape, dtype=np.float32) * np.float32(_SCALE)
        if self.precision == "fp32":
            return weights
        return (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def make_adapter(
    family: Family,
    dimensions: Dimensions,
    random: np.random.Generator,
    *,
    rank: int = 16,
    virtual_tokens: int = 16,
    precision: Precision = "bf16",
) -> Files:
    """One adapter's files by name, different for every state of `random`.

    Raises: BenchError when the family needs to know the base's layout and it is not known.
    """
    return _MAKERS[family](Recipe(dimensions, random, rank, virtual_tokens, precision))


def _files(config: Mapping[str, object], tensors: dict[str, Array], weights: str = "adapter_model.safetensors") -> Files:
    arrays: dict[str, NDArray[Any]] = dict(tensors)
    return {"adapter_config.json": json.dumps(config).encode(), weights: save(arrays, metadata={"format": "pt"})}


def _suffixes(names: list[str]) -> list[str]:
    """Module names as PEFT's target_modules: what follows the layer's number."""
    return sorted({_within_layer(name) for name in names})


def _within_layer(name: str) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)


def _lora(recipe: Recipe) -> Files:
    linears = recipe.dimensions.linears
    tensors: dict[str, Array] = {}
    for linear in linears:
        tensors[f"{_PREFIX}{linear.name}.lora_A.weight"] = recipe.noise(recipe.rank, linear.in_features)
        tensors[f"{_PREFIX}{linear.name}.lora_B.weight"] = recipe.noise(linear.out_features, recipe.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": recipe.rank,
        "lora_alpha": 2 * recipe.rank,
        "target_modules": _suffixes([linear.name for linear in linears]),
        "bias": "none",
        "inference_mode": True,
    }
    return _files(config, tensors)


def _ia3(recipe: Recipe) -> Files:
    """Keys and values scaled at their output, the feed-forward at the input of its last module."""
    exits = {exit_.module for exit_ in recipe.dimensions.exits if exit_.kind == "feed_forward"}
    scaled = [linear for linear in recipe.dimensions.linears if linear.name in exits or _makes_keys(linear.name)]
    if not scaled:
        raise BenchError(f"`families`: where ia3 goes in a {recipe.dimensions.model_type} is not known")
    tensors: dict[str, Array] = {}
    for linear in scaled:
        shape = (1, linear.in_features) if linear.name in exits else (linear.out_features, 1)
        tensors[f"{_PREFIX}{linear.name}.ia3_l"] = 1 + recipe.noise(*shape)
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "target_modules": _suffixes([linear.name for linear in scaled]),
        "feedforward_modules": _suffixes([linear.name for linear in scaled if linear.name in exits]),
        "inference_mode": True,
    }
    return _files(config, tensors)


def _makes_keys(name: str) -> bool:
    """k and v projections, or the fused one of older architectures."""
    return name.rpartition(".")[2] in ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")


def _bitfit(recipe: Recipe) -> Files:
    tensors = {f"{_PREFIX}{linear.name}.bias": recipe.noise(linear.out_features) for linear in recipe.dimensions.linears}
    return _files({"peft_type": "BITFIT"}, tensors)


def _bottleneck(recipe: Recipe) -> Files:
    """AdapterHub's double_seq_bn: Houlsby's adapters behind attention and feed-forward."""
    dimensions = recipe.dimensions
    if not dimensions.exits:
        raise BenchError(f"`families`: where a bottleneck goes in a {dimensions.model_type} is not known")
    hidden, width = dimensions.hidden_size, max(1, dimensions.hidden_size // _REDUCTION)
    tensors: dict[str, Array] = {}
    for exit_ in dimensions.exits:
        layer = exit_.module.removesuffix(f".{_within_layer(exit_.module)}")
        place = "attention_adapters" if exit_.kind == "attention" else "output_adapters"
        tensors |= _bottleneck_site(f"{layer}.{place}.adapters.bench", recipe, hidden, width)
    config = {
        "config": _DOUBLE_SEQ_BN,
        "hidden_size": hidden,
        "model_class": "",
        "model_name": "",
        "model_type": dimensions.model_type,
        "name": "bench",
        "version": "adapters.1.3.0",
    }
    return _files(config, tensors, "adapter.safetensors")


def _bottleneck_site(path: str, recipe: Recipe, hidden: int, width: int) -> dict[str, Array]:
    return {
        f"{path}.adapter_down.0.weight": recipe.noise(width, hidden),
        f"{path}.adapter_down.0.bias": recipe.noise(width),
        f"{path}.adapter_up.weight": recipe.noise(hidden, width),
        f"{path}.adapter_up.bias": recipe.noise(hidden),
    }


_DOUBLE_SEQ_BN: Final[Mapping[str, object]] = {
    "architecture": None,
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": _REDUCTION,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
}


def _prefix_tuning(recipe: Recipe) -> Files:
    dimensions = recipe.dimensions
    tensors = {"prompt_embeddings": recipe.noise(recipe.virtual_tokens, dimensions.num_layers * 2 * dimensions.kv_width)}
    return _files(_prompt_config("PREFIX_TUNING", recipe, dimensions.kv_width, dimensions.num_kv_heads), tensors)


def _prompt_tuning(recipe: Recipe) -> Files:
    return _soft_prompt("PROMPT_TUNING", recipe)


def _p_tuning(recipe: Recipe) -> Files:
    return _soft_prompt("P_TUNING", recipe)


def _soft_prompt(peft_type: str, recipe: Recipe) -> Files:
    hidden = recipe.dimensions.hidden_size
    config = _prompt_config(peft_type, recipe, hidden, recipe.dimensions.num_heads)
    return _files(config, {"prompt_embeddings": recipe.noise(recipe.virtual_tokens, hidden)})


def _prompt_config(peft_type: str, recipe: Recipe, token_dim: int, heads: int) -> dict[str, object]:
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": recipe.virtual_tokens,
        "num_layers": recipe.dimensions.num_layers,
        "num_attention_heads": heads,
        "token_dim": token_dim,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }


def _trainable_tokens(recipe: Recipe) -> Files:
    """As many rows of the input embedding as other prompts have positions."""
    dimensions = recipe.dimensions
    if not dimensions.embedding:
        raise BenchError(f"`families`: which module of a {dimensions.model_type} is its input embedding is not known")
    count = min(recipe.virtual_tokens, dimensions.vocab_size)
    ids = sorted(recipe.random.choice(dimensions.vocab_size, count, replace=False).tolist())
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": "CAUSAL_LM",
        "target_modules": [dimensions.embedding.rpartition(".")[2]],
        "token_indices": ids,
        "inference_mode": True,
    }
    return _files(
        config, {f"{_PREFIX}{dimensions.embedding}.trainable_tokens_delta": recipe.noise(count, dimensions.hidden_size)}
    )


_MAKERS: Final[Mapping[Family, Callable[[Recipe], Files]]] = {
    "lora": _lora,
    "ia3": _ia3,
    "bitfit": _bitfit,
    "bottleneck": _bottleneck,
    "prefix_tuning": _prefix_tuning,
    "prompt_tuning": _prompt_tuning,
    "p_tuning": _p_tuning,
    "trainable_tokens": _trainable_tokens,
}
