"""PEFT's small families: IA3, BEFT, LN-tuning, trainable tokens, and this server's own BitFit format.

Owns their tensor names and what their lists of modules promise. Knows nothing of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Checkpoint, Tensors
from .pattern import whole_match
from .peft_fields import BeftFields, IA3Fields, LnTuningFields, Modules, TrainableTokensFields, parse_fields
from .peft_names import PREFIX, by_module, check_targeted, is_targeted
from .peft_saved import WHOLE


def read_ia3(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(IA3Fields, config)
    sites = {}
    for module, _, _, tensor in by_module(tensors, {".ia3_l": "ia3_l"}):
        check_targeted(module, fields.target_modules, fields.exclude_modules)
        side = _ia3_side(module, tensor, fields.feedforward_modules)
        sites[module] = {side: tensor.flatten()}
    return (Checkpoint(method, {}, sites),)


def _ia3_side(module: str, tensor: Tensor, feedforward: Modules) -> str:
    """[out, 1] scales the output, [1, in] the input; the config says the same thing again."""
    if tensor.ndim != 2 or 1 not in tensor.shape:
        raise AdapterError(f"{PREFIX}{module}.ia3_l", f"has shape {list(tensor.shape)}, IA3 needs [out, 1] or [1, in]")
    side = "out" if tensor.shape[1] == 1 else "in"
    if feedforward is not None and _is_feedforward(module, feedforward) is not (side == "in"):
        verb = "leaves out" if side == "in" else "names"
        raise AdapterError("feedforward_modules", f"{verb} {module}, whose tensor scales its {side}put")
    return side


def _is_feedforward(module: str, names: frozenset[str] | str) -> bool:
    """A list by the names' endings, a string as a regular expression for the whole name."""
    if isinstance(names, str):
        return whole_match("feedforward_modules", names)(module)
    return module.endswith(tuple(names))


def read_bitfit(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    sites = {module: {"bias": tensor} for module, _, _, tensor in by_module(tensors, {".bias": "bias"})}
    return (Checkpoint(method, {}, sites),)


def read_beft(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """A bias [1, out] that is added to the base's own."""
    fields = parse_fields(BeftFields, config)
    sites = {}
    for module, _, _, tensor in by_module(tensors, {".beft_bias": "delta"}):
        check_targeted(module, fields.target_modules, None)
        if tensor.ndim != 2 or tensor.shape[0] != 1:
            raise AdapterError(f"{PREFIX}{module}.beft_bias", f"has shape {list(tensor.shape)}, BEFT needs [1, out]")
        sites[module] = {"delta": tensor[0]}
    return (Checkpoint(method, {}, sites),)


def read_ln_tuning(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    """PEFT trains a copy of any module the config names, a norm or not."""
    fields = parse_fields(LnTuningFields, config)
    suffixes = {f".ln_tuning_layers.{name}": name for name in ("weight", "bias")}
    sites: dict[str, dict[str, Tensor]] = {}
    for module, _, name, tensor in by_module(tensors, suffixes):
        check_targeted(module, fields.target_modules, fields.exclude_modules)
        sites.setdefault(module, {})[name] = tensor
    if not sites:
        raise AdapterError(method, "the upload holds no ln_tuning_layers")
    return (Checkpoint(WHOLE, {}, dict(sites)),)


def read_trainable_tokens(method: str, config: Mapping[str, object], tensors: Tensors) -> tuple[Checkpoint, ...]:
    fields = parse_fields(TrainableTokensFields, config)
    sites: dict[str, Tensors] = {}
    for module, _, name, tensor in by_module(tensors, {".trainable_tokens_delta": "rows"}):
        sites[module] = {name: tensor}
    targeted = None if fields.target_modules is None else [m for m in sites if is_targeted(m, fields.target_modules)]
    neutral = {"field": "token_indices", "indices": fields.token_indices, "targeted": targeted}
    return (Checkpoint(method, neutral, sites),)
