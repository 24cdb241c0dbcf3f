"""PEFT's LoRA files into neutral checkpoints: factors, scales, DoRA's magnitudes, embeddings and trained biases.

Owns what the fields of a LoraConfig mean for the stored tensors. Knows nothing of the base model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .pattern import first_keys
from .peft_fields import LoraFields, parse_fields
from .peft_names import PREFIX, by_module, check_layer, check_targeted

_SUFFIXES: Final = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.weight": "base",  # PEFT keeps a copy of an embedding or output head that was adapted
}
BIAS_SUFFIXES: Final = {".base_layer.bias": "bias", ".bias": "bias"}
_COPIED_BIAS: Final = {".base_layer.bias": "base_bias"}  # stored with that copy although no bias was trained


def read_lora(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """LoRA or, where the config says so, DoRA; with a second checkpoint for biases that were trained beside it.

    Raises: AdapterError naming the config field or the tensor at fault.
    """
    fields = parse_fields(LoraFields, config)
    suffixes = _SUFFIXES | (_COPIED_BIAS if fields.bias == "none" else BIAS_SUFFIXES)
    sites, biases = split_biases(by_module(tensors, suffixes))
    if fields.use_dora and fields.lora_bias:
        raise AdapterError("lora_bias", "is not defined together with use_dora")
    for module, stored in sites.items():
        _check_site(module, stored, fields)
    lora = Checkpoint("dora" if fields.use_dora else method, {"scale": _scales(sites, fields)}, sites)
    return (lora, Checkpoint("bitfit", {}, biases)) if biases else (lora,)


def split_biases(found: Iterable[tuple[str, str, str, Tensor]]) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """LoRA's own tensors, and the trained biases of base modules, each by module."""
    sites: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, dict[str, Tensor]] = {}
    for module, suffix, name, tensor in found:
        into = biases if name == BIAS_SUFFIXES.get(suffix) else sites
        if name in into.setdefault(module, {}):
            raise AdapterError(f"{PREFIX}{module}{suffix}", "is stored twice, once as an embedding's and once as a Linear's")
        into[module][name] = tensor
    return dict(sites), dict(biases)


def _check_site(module: str, stored: Tensors, fields: LoraFields) -> None:
    if "base_bias" in stored and "base" not in stored:
        raise AdapterError(f"{PREFIX}{module}.base_layer.bias", "matches nothing that is served where bias is 'none'")
    for side, other in (("A", "B"), ("B", "A")):
        if side not in stored:
            there = f"lora_{other}" if other in stored else "another tensor of the module"
            raise AdapterError(f"{PREFIX}{module}.lora_{side}.weight", f"is missing although {there} is there")
    _check_optional(module, "bias", "lora_B.bias", stored, "lora_bias", fields.lora_bias)
    _check_optional(module, "magnitude", "lora_magnitude_vector", stored, "use_dora", fields.use_dora)
    if not (fields.ensure_weight_tying and "." not in module):  # the head follows the embedding, and is not named
        check_targeted(module, fields.target_modules, fields.exclude_modules)
    check_layer(module, fields.target_modules, fields.layers_to_transform, fields.layers_pattern)


def _check_optional(module: str, name: str, key: str, stored: Tensors, field: str, wanted: bool | None) -> None:
    if (name in stored) is not bool(wanted):
        state = "stored" if name in stored else "missing"
        raise AdapterError(f"{PREFIX}{module}.{key}", f"is {state}, but {field} is {bool(wanted)}")


def _scales(sites: Mapping[str, Tensors], fields: LoraFields) -> dict[str, float]:
    """alpha / r of every module. PEFT loads a file only where its tensors have the configured rank."""
    ranks = _numbers("rank_pattern", fields.rank_pattern or {}, fields.r, sites)
    alphas = _numbers("alpha_pattern", fields.alpha_pattern or {}, fields.lora_alpha, sites)
    return {module: _scale(module, stored, ranks[module], alphas[module], fields) for module, stored in sites.items()}


def _numbers(field: str, pattern: Mapping[str, float], default: float, modules: Collection[str]) -> dict[str, float]:
    first = first_keys(field, tuple(pattern), modules)
    return {module: pattern[first[module]] if module in first else default for module in modules}


def _scale(module: str, stored: Tensors, wanted: float, alpha: float, fields: LoraFields) -> float:
    rank = stored["A"].shape[0]
    if rank != wanted:
        raise AdapterError(f"{PREFIX}{module}.lora_A.weight", f"has rank {rank}, the config says {wanted:g}")
    return alpha / math.sqrt(rank) if fields.use_rslora else alpha / rank
