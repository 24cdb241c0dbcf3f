"""PEFT's AdaLoRA and VeRA: files whose factors fold into a plain LoRA.

    AdaLoRA   y + s / (init_r + 1e-5) * B (E * A) x                     E [r, 1] the singular values, s = lora_alpha
    VeRA      y + b * (B[:out] (d * (A[:, :in] x)))                     A, B shared by all modules, d [r], b [out] of each

Owns their tensor names and the folding. Knows nothing of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint, Tensors, check_shape, module_shape
from .peft_fields import AdaLoraFields, VeraFields, parse_fields
from .peft_lora import BIAS_SUFFIXES, split_biases
from .peft_names import PREFIX, by_module, check_layer, check_targeted

_ADALORA: Final = {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"}
_VERA: Final = {".vera_lambda_b": "b", ".vera_lambda_d": "d"}
_PROJECTIONS: Final = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
#: The neutral checkpoint of VeRA, which needs the base's sizes to be folded: see `fold_vera`.
VERA: Final = "vera"
#: A file of a few megabytes may hold a large shared projection and hundreds of modules.
MAX_FOLDED_BYTES: Final = 1 << 30


# -- AdaLoRA ---------------------------------------------------------------------------------------------------------


def read_adalora(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(AdaLoraFields, config)
    suffixes = _ADALORA | ({} if fields.bias == "none" else BIAS_SUFFIXES)
    sites, biases = split_biases(by_module(tensors, suffixes))
    ranks = _ranks(fields)
    scales = {}
    for module, stored in sites.items():
        rank = _check_adalora(module, stored, ranks.get(module), fields)
        alpha = fields.lora_alpha if fields.lora_alpha > 0 else float(rank)
        scales[module] = alpha / float(torch.tensor(float(fields.init_r)) + 1e-5)
    folded = {module: {"A": site["A"].float() * site["E"].float(), "B": site["B"]} for module, site in sites.items()}
    lora = Checkpoint(method, {"scale": scales}, folded)
    return (lora, Checkpoint("bitfit", {}, biases)) if biases else (lora,)


def _ranks(fields: AdaLoraFields) -> dict[str, int]:
    """Module -> the rank the allocation left it, from PEFT's masks {"model.layers.0.self_attn.q_proj.lora_E": [bool]}."""
    ranks = {}
    for key, mask in (fields.rank_pattern or {}).items():
        module = key.partition(".lora_")[0]
        if len(mask) != fields.init_r:
            raise AdapterError("rank_pattern", f"masks {len(mask)} ranks of {module}, init_r is {fields.init_r}")
        ranks[module] = sum(mask)
    return ranks


def _check_adalora(module: str, stored: Tensors, allocated: int | None, fields: AdaLoraFields) -> int:
    """The module's rank. Raises: AdapterError naming the tensor or field."""
    for name in _ADALORA.values():
        if name not in stored:
            raise AdapterError(f"{PREFIX}{module}.lora_{name}", "is missing although the module's other factors are there")
        if stored[name].ndim != 2:
            raise AdapterError(f"{PREFIX}{module}.lora_{name}", f"has {stored[name].ndim} dimensions, AdaLoRA needs 2")
    check_targeted(module, fields.target_modules, fields.exclude_modules)
    check_layer(module, fields.target_modules, fields.layers_to_transform, fields.layers_pattern)
    rank = fields.init_r if allocated is None else allocated
    found = stored["A"].shape[0]
    if found != rank:
        raise AdapterError(f"{PREFIX}{module}.lora_A", f"has rank {found}, the config says {rank}")
    check_shape(f"{PREFIX}{module}.lora_E", stored["E"], (rank, 1))
    return rank


# -- VeRA ------------------------------------------------------------------------------------------------------------


def read_vera(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(VeraFields, config)
    shared = {name: _projection(key, tensors, fields) for name, key in _PROJECTIONS.items()}
    own = {key: tensor for key, tensor in tensors.items() if key not in _PROJECTIONS.values()}
    suffixes = _VERA | ({} if fields.bias == "none" else BIAS_SUFFIXES)
    sites, biases = split_biases(by_module(own, suffixes))
    for module, stored in sites.items():
        for name in ("b", "d"):
            if name not in stored:
                raise AdapterError(f"{PREFIX}{module}.vera_lambda_{name}", "is missing although the other lambda is there")
        check_shape(f"{PREFIX}{module}.vera_lambda_d", stored["d"], (fields.r,))
        check_targeted(module, fields.target_modules, None)
        check_layer(module, fields.target_modules, fields.layers_to_transform, fields.layers_pattern)
    vera = Checkpoint(VERA, {"method": method}, sites, shared)
    return (vera, Checkpoint("bitfit", {}, biases)) if biases else (vera,)


def _projection(key: str, tensors: Tensors, fields: VeraFields) -> Tensor:
    if not fields.save_projection:
        stored = "although the file holds them" if key in tensors else "which depend on the machine"
        raise AdapterError("save_projection", f"False draws the projections from a seed, {stored}; save with True")
    if key not in tensors:
        raise AdapterError(key, "is missing; save with save_projection=True")
    tensor = tensors[key]
    side = tensor.ndim - 2 if key.endswith("A") else tensor.ndim - 1
    if tensor.ndim != 2 or tensor.shape[side] != fields.r:
        raise AdapterError(key, f"has shape {list(tensor.shape)}, r is {fields.r}")
    return tensor


def fold_vera(found: Checkpoint, base: BaseShape) -> Checkpoint:
    """Each module's part of the shared projections, with its lambdas folded in. Raises: AdapterError naming the tensor."""
    a, b = (found.loose[name].float() for name in ("A", "B"))
    sites: dict[str, Tensors] = {}
    _check_folded(found, a.shape[0], base)
    for module, stored in found.sites.items():
        name = f"{module}.vera_lambda_b"
        shape = module_shape(base, module, name)
        check_shape(name, stored["b"], (shape.out_features,))
        if shape.in_features > a.shape[1] or shape.out_features > b.shape[0]:
            sizes = f"[{shape.out_features}, {shape.in_features}]"
            raise AdapterError(_PROJECTIONS["A"], f"and vera_B span [{b.shape[0]}, {a.shape[1]}], {module} is {sizes}")
        down = stored["d"].float()[:, None] * a[:, : shape.in_features]
        up = stored["b"].float()[:, None] * b[: shape.out_features]
        sites[module] = {"A": down, "B": up}
    return Checkpoint(str(found.config["method"]), {"scale": dict.fromkeys(sites, 1.0)}, sites)


def _check_folded(found: Checkpoint, rank: int, base: BaseShape) -> None:
    shapes = [module_shape(base, module, f"{module}.vera_lambda_b") for module in found.sites]
    nbytes = sum(4 * rank * (shape.in_features + shape.out_features) for shape in shapes)
    if nbytes > MAX_FOLDED_BYTES:
        raise AdapterError("r", f"{rank} over {len(shapes)} modules takes {nbytes} bytes, over the limit of {MAX_FOLDED_BYTES}")
