"""What a PEFT file may hold beside any adapter: whole modules (`modules_to_save`) and single trained rows of embeddings.

Owns which keys these are, and what they mean for the base: a norm, a whole matrix, or one that shares its weight.

    base_model.model.model.norm.weight                                       modules_to_save
    base_model.lm_head.weight                                                the same, in prompt learning
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta trainable_token_indices
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint, ModuleShape, Tensors, module_shape
from .peft_fields import SavedFields, TokenIds, parse_fields
from .peft_head import CLASSIFIERS
from .peft_names import PREFIX

#: The neutral checkpoint of modules stored whole, before the base says which of them are norms: see `sort_saved`.
WHOLE: Final = "whole"
#: PEFT wraps the base of these in nothing of its own.
_UNWRAPPED: Final = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"
#: The base's own weights, saved with an embedding or output head that is adapted or was resized. LoRA's reader wants them.
_TOKENS_BASE: Final = ".token_adapter.base_layer.weight"
_BASE: Final = ".base_layer.weight"
#: Parts of the names of tensors that belong to an adapter, not to a module of the base.
_ADAPTERS: Final = ("base_layer", "beft_", "ia3_", "ln_tuning_", "lora_", "token_adapter", "trainable_tokens_", "vera_")
#: Copies of biases that `bias="all"` saves of a module that is stored whole; PEFT reads neither back into use.
_COPIES: Final = (".original_module.bias", ".modules_to_save.bias")
#: What PEFT itself takes for embeddings when it ties the modules stored whole.
_TIED_NAMES: Final = ("embed_tokens", "lm_head")


class _Saved(SavedFields):
    ensure_weight_tying: bool | None = None
    trainable_token_indices: TokenIds = None


def split_saved(config: Mapping[str, object], tensors: Tensors) -> tuple[Tensors, tuple[Checkpoint, ...]]:
    """(the adapter's own tensors, checkpoints of what is stored beside them). Raises: AdapterError naming the field."""
    if config.get("peft_type") == "BITFIT":  # the own format, which stores biases of modules and nothing else
        return tensors, ()
    fields = parse_fields(_Saved, config)
    prefix = "base_model." if config.get("peft_type") in _UNWRAPPED else PREFIX
    bases = (_TOKENS_BASE,) if config.get("peft_type") == "LORA" else (_TOKENS_BASE, _BASE)
    own: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        if token_module := _module(key, prefix, _TOKENS):
            rows[token_module] = {"rows": tensor}
        elif found := _wrapped(key, prefix, bases, tensors) or _whole(key, prefix, tensors):
            _put_once(whole.setdefault(found[0], {}), key, found[1], tensor)
        elif not _is_copy(key, tensors):
            own[key] = tensor
    return own, (*_wholes(fields, whole), *_rows(fields, rows))


def _put_once(stored: dict[str, Tensor], key: str, name: str, tensor: Tensor) -> None:
    if name in stored:
        raise AdapterError(key, "is stored twice, with and without base_layer")
    stored[name] = tensor


def _wholes(fields: _Saved, whole: Mapping[str, Tensors]) -> Iterator[Checkpoint]:
    names = fields.modules_to_save or []
    if whole or names:
        tie = bool(fields.ensure_weight_tying) and any(name.rpartition(".")[2] in _TIED_NAMES for name in names)
        yield Checkpoint(WHOLE, {"names": names, "tie": tie}, whole)


def _rows(fields: _Saved, rows: Mapping[str, Tensors]) -> Iterator[Checkpoint]:
    if rows or fields.trainable_token_indices:
        config = {"field": "trainable_token_indices", "indices": fields.trainable_token_indices}
        yield Checkpoint("trainable_tokens", config, rows)


def _module(key: str, prefix: str, suffix: str) -> str:
    """What is between; empty for another key."""
    if not key.startswith(prefix) or not key.endswith(suffix):
        return ""
    return key[len(prefix) : -len(suffix)]


def _wrapped(key: str, prefix: str, bases: tuple[str, ...], tensors: Tensors) -> tuple[str, str] | None:
    """(module, "weight" or "bias") of the base's own, stored beneath an adapter."""
    weight = f"{key.removesuffix('.bias')}.weight" if key.endswith(".bias") else key
    module = next(filter(None, (_module(weight, prefix, ending) for ending in bases)), "")
    return (module, key.rpartition(".")[2]) if module and weight in tensors else None


def _whole(key: str, prefix: str, tensors: Tensors) -> tuple[str, str] | None:
    """(module, "weight" or "bias") of a module that is stored whole: a lone bias is a trained bias."""
    for name in ("weight", "bias"):
        parts = _module(key, prefix, f".{name}").split(".")
        if not parts[0] or parts[0] in CLASSIFIERS or any(part.startswith(_ADAPTERS) for part in parts):
            continue
        if name == "weight" or f"{key.removesuffix('.bias')}.weight" in tensors:
            return ".".join(parts), name
    return None


def _is_copy(key: str, tensors: Tensors) -> bool:
    ending = next((ending for ending in _COPIES if key.endswith(ending)), None)
    return ending is not None and f"{key.removesuffix(ending)}.weight" in tensors


# -- with the base at hand -------------------------------------------------------------------------------------------


def sort_saved(found: Collection[Checkpoint], base: BaseShape) -> tuple[Checkpoint, ...]:
    """`found` with modules stored whole told apart: norms, and matrices. Raises: AdapterError naming field or tensor."""
    return tuple(sorted_one for one in found for sorted_one in (_sorted(one, base) if one.method == WHOLE else (one,)))


def _sorted(found: Checkpoint, base: BaseShape) -> Iterator[Checkpoint]:
    names, sites = found.config.get("names"), dict(found.sites)
    kinds: dict[str, str] = {module: module_shape(base, module, f"{module}.weight").kind for module in sites}
    if isinstance(names, list):
        _check_complete(names, sites, base)
        sites = {m: site if _names(names, m) else _with_bias(site, base.modules[m]) for m, site in sites.items()}
        if base.tied_embeddings:
            kinds |= _tie(names, bool(found.config["tie"]), sites, base)
    for method, norms in (("ln_tuning", True), ("full", False)):
        if of_kind := {module: site for module, site in sites.items() if (kinds[module] == "norm") is norms}:
            yield Checkpoint(method, {}, of_kind)


def _names(names: Collection[str], module: str) -> bool:
    """Whether PEFT's `modules_to_save` names a module or one it is part of: by the endings of their names."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]).endswith(tuple(names)) for i in range(len(parts)))


def _check_complete(names: Collection[str], sites: Mapping[str, Tensors], base: BaseShape) -> None:
    missing = next((module for module in base.modules if module not in sites and _names(names, module)), None)
    if missing is not None:
        raise AdapterError("modules_to_save", f"names {missing}, for which the upload holds no tensors")


def _tie(names: Collection[str], asked: bool, sites: dict[str, Tensors], base: BaseShape) -> dict[str, str]:
    """Embedding and head share one weight: a stored weight that `modules_to_save` does not name is the base's own, so both
    get it; `ensure_weight_tying` keeps two that are named equal. Returns the kinds of what was added."""
    pair = (base.embedding, base.head)
    stored = [module for module in pair if module in sites]
    if len(stored) == 2 and (asked or not any(_names(names, module) for module in pair)):
        one, other = (sites[module].get("weight") for module in pair)
        if one is None or other is None or one.shape != other.shape or not torch.equal(one.float(), other.float()):
            raise AdapterError(f"{base.head}.weight", f"differs from {base.embedding}.weight, with which it shares one weight")
    if len(stored) != 1:
        return {}
    (here,) = stored
    there = pair[1 - pair.index(here)]
    if asked:
        raise AdapterError(f"{there}.weight", "is missing although ensure_weight_tying ties it to a module that is stored")
    if _names(names, here) or "weight" not in sites[here]:
        return {}
    sites[there] = _with_bias({"weight": sites[here]["weight"]}, base.modules[there])
    return {there: base.modules[there].kind}


def _with_bias(stored: Tensors, shape: ModuleShape) -> Tensors:
    """A module of which only the weight is stored keeps the base's bias."""
    return {**stored, "bias": shape.bias} if "bias" not in stored and shape.bias is not None else stored
