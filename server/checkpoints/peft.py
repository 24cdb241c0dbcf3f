"""PEFT's dialect: adapter_config.json with a `peft_type` and adapter_model.safetensors, into neutral checkpoints.

Owns the names PEFT gives tensors. Never constructs a PEFT object: its configs import modules and open files by name.
Knows nothing of the base model: shapes are the methods' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .pattern import Pattern
from .peft_fields import IA3Fields, LoraFields, Modules, PromptFields, parse_fields, refuse_unserved, shown_value

WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."


def read_peft(config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """The checkpoints of one upload: several when it trained biases beside its LoRA.

    Raises: AdapterError naming the config field or the tensor at fault.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise AdapterError("peft_type", f"{shown_value(kind)} is not served; served: {', '.join(_READERS)}")
    refuse_unserved(kind, config)
    method, read = _READERS[kind]
    return read(method, config, tensors)


# --- LoRA -----------------------------------------------------------------------------------------------------------

_LORA_SUFFIXES: Final = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
_BIAS_SUFFIXES: Final = {".base_layer.bias": "bias", ".bias": "bias"}
_NOT_SERVED: Final = {
    "lora_magnitude_vector": "DoRA is not served",
    "lora_embedding_A": "LoRA on embeddings is not served",
    "lora_embedding_B": "LoRA on embeddings is not served",
    "base_layer.weight": "stored base weights are not served; save with save_embedding_layers=False",
    "trainable_tokens_delta": "trainable tokens are not served",
}


def _read_lora(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(LoraFields, config)
    suffixes = _LORA_SUFFIXES | ({} if fields.bias == "none" else _BIAS_SUFFIXES)
    sites, biases = _split_biases(_by_module(tensors, suffixes))
    for module, stored in sites.items():
        _check_lora_site(module, stored, fields)
    alphas = Pattern("alpha_pattern", fields.alpha_pattern or {})
    if alphas.regular:
        key = shown_value(alphas.regular[0])
        raise AdapterError("alpha_pattern", f"key {key} is a regular expression; name modules instead")
    ranks = Pattern("rank_pattern", fields.rank_pattern or {})
    scales = {module: _scale(module, stored, fields, alphas, ranks) for module, stored in sites.items()}
    lora = Checkpoint(method, {"scale": scales}, sites)
    return (lora, Checkpoint("bitfit", {}, biases)) if biases else (lora,)


def _split_biases(found: Iterable[tuple[str, str, str, Tensor]]) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """LoRA's own tensors, and the trained biases of base modules, each by module."""
    sites: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, dict[str, Tensor]] = {}
    for module, suffix, name, tensor in found:
        into = biases if suffix in _BIAS_SUFFIXES else sites
        into.setdefault(module, {})[name] = tensor
    return dict(sites), dict(biases)


def _check_lora_site(module: str, stored: Tensors, fields: LoraFields) -> None:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in stored:
            raise AdapterError(f"{PREFIX}{module}.lora_{side}.weight", f"is missing although lora_{other} is there")
    if ("bias" in stored) is not bool(fields.lora_bias):
        state = "stored" if "bias" in stored else "missing"
        raise AdapterError(f"{PREFIX}{module}.lora_B.bias", f"is {state}, but lora_bias is {bool(fields.lora_bias)}")
    _check_targeted(module, fields.target_modules, fields.exclude_modules)
    _check_layer(module, fields.layers_to_transform)


def _check_targeted(module: str, target: Modules, exclude: Modules) -> None:
    """Lists are held against the tensors (PEFT drops what they do not cover); a regular expression is not run."""
    if isinstance(target, frozenset) and not _listed(module, target):
        raise AdapterError("target_modules", f"does not name {module}, for which the upload holds tensors")
    if isinstance(exclude, frozenset) and _listed(module, exclude):
        raise AdapterError("exclude_modules", f"names {module}, for which the upload holds tensors")


def _listed(module: str, names: frozenset[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def _check_layer(module: str, layers: list[int] | int | None) -> None:
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    numbers = {int(part) for part in module.split(".") if part.isdecimal() and len(part) < 10}
    if wanted and wanted.isdisjoint(numbers):
        raise AdapterError("layers_to_transform", f"leaves out {module}, for which the upload holds tensors")


def _scale(module: str, stored: Tensors, fields: LoraFields, alphas: Pattern, ranks: Pattern) -> float:
    """alpha / r. PEFT loads a file only where its tensors have the configured rank, so the tensor's rank is the rank."""
    rank = stored["A"].shape[0]
    allowed = {fields.r, *ranks.values.values()} if ranks.regular else {int(ranks.get(module, fields.r))}
    if rank not in allowed:
        wanted = " or ".join(str(r) for r in sorted(allowed))
        raise AdapterError(f"{PREFIX}{module}.lora_A.weight", f"has rank {rank}, the config says {wanted}")
    alpha = alphas.get(module, fields.lora_alpha)
    return alpha / math.sqrt(rank) if fields.use_rslora else alpha / rank


# --- IA3, BitFit and prompts ----------------------------------------------------------------------------------------


def _read_ia3(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(IA3Fields, config)
    sites = {}
    for module, _, _, tensor in _by_module(tensors, {".ia3_l": "ia3_l"}):
        _check_targeted(module, fields.target_modules, fields.exclude_modules)
        side = _ia3_side(module, tensor, fields.feedforward_modules)
        sites[module] = {side: tensor.flatten()}
    return (Checkpoint(method, {}, sites),)


def _ia3_side(module: str, tensor: Tensor, feedforward: Modules) -> str:
    """[out, 1] scales the output, [1, in] the input; the config's list says the same thing again."""
    if tensor.ndim != 2 or 1 not in tensor.shape:
        raise AdapterError(f"{PREFIX}{module}.ia3_l", f"has shape {list(tensor.shape)}, IA3 needs [out, 1] or [1, in]")
    side = "out" if tensor.shape[1] == 1 else "in"
    if isinstance(feedforward, frozenset) and module.endswith(tuple(feedforward)) is not (side == "in"):
        verb = "leaves out" if side == "in" else "names"
        raise AdapterError("feedforward_modules", f"{verb} {module}, whose tensor scales its {side}put")
    return side


def _read_bitfit(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    sites = {module: {"bias": tensor} for module, _, _, tensor in _by_module(tensors, {".bias": "bias"})}
    return (Checkpoint(method, {}, sites),)


def _read_prompt(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    for name in tensors:
        if name != "prompt_embeddings":
            raise AdapterError(name, f"matches nothing that {method} stores; expected: prompt_embeddings")
    fields = parse_fields(PromptFields, config)
    return (Checkpoint(method, fields.model_dump(exclude={"peft_type"}), loose=tensors),)


def _by_module(tensors: Tensors, suffixes: Mapping[str, str]) -> Iterable[tuple[str, str, str, Tensor]]:
    """(module, suffix, neutral name, tensor). Raises: AdapterError naming the first tensor that matches no suffix."""
    seen: set[tuple[str, str]] = set()
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX) or len(key) <= len(PREFIX) + len(suffix):
            why = next((why for part, why in _NOT_SERVED.items() if part in key), "matches nothing that is served")
            raise AdapterError(key, f"{why}; expected: {PREFIX}<module>{{{','.join(suffixes)}}}")
        module, name = key[len(PREFIX) : -len(suffix)], suffixes[suffix]
        if (module, suffix.removeprefix(".base_layer")) in seen:
            raise AdapterError(key, "is stored twice, with and without base_layer")
        seen.add((module, suffix.removeprefix(".base_layer")))
        yield module, suffix, name, tensor


_Reader = Callable[[str, Mapping[str, object], Tensors], tuple[Checkpoint, ...]]
_READERS: Final[Mapping[str, tuple[str, _Reader]]] = MappingProxyType(
    {
        "LORA": ("lora", _read_lora),
        "IA3": ("ia3", _read_ia3),
        "BITFIT": ("bitfit", _read_bitfit),
        "PREFIX_TUNING": ("prefix_tuning", _read_prompt),
        "PROMPT_TUNING": ("prompt_tuning", _read_prompt),
        "P_TUNING": ("p_tuning", _read_prompt),
    }
)
