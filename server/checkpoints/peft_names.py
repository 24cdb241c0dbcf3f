"""The names PEFT gives modules and tensors: keys sorted by module, and held against the config's lists of modules.

Shared by every reader of PEFT's dialect. Knows no family's arithmetic and nothing of the base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Tensors
from .pattern import compiled, whole_match
from .peft_fields import Modules

PREFIX: Final = "base_model.model."
ALL_LINEAR: Final = "all-linear"
_NOT_SERVED: Final = {
    "base_layer.weight": "stored base weights are not served; save with save_embedding_layers=False",
    "trainable_tokens_delta": "no method of this file trains single tokens",
}


def by_module(tensors: Tensors, suffixes: Mapping[str, str]) -> Iterable[tuple[str, str, str, Tensor]]:
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


def check_targeted(module: str, target: Modules, exclude: Modules) -> None:
    """A tensor for a module that the config does not target is an error: PEFT would leave it out without a word.

    Raises: AdapterError naming the field.
    """
    if target is not None and not _named("target_modules", module, target):
        raise AdapterError("target_modules", f"does not name {module}, for which the upload holds tensors")
    if exclude and _named("exclude_modules", module, exclude):
        raise AdapterError("exclude_modules", f"names {module}, for which the upload holds tensors")


def is_targeted(module: str, target: Modules) -> bool:
    """Whether target_modules, where it is given, names the module."""
    return target is not None and _named("target_modules", module, target)


def _named(field: str, module: str, names: frozenset[str] | str) -> bool:
    """As PEFT matches: a list by suffix, a string as a regular expression for the whole name."""
    if not isinstance(names, str):
        parts = module.split(".")
        return any(".".join(parts[i:]) in names for i in range(len(parts)))
    if field == "target_modules" and names.lower() == ALL_LINEAR:
        return "." in module  # all but the output head, the one module that is in no other
    return whole_match(field, names)(module)


def check_layer(module: str, target: Modules, layers: list[int] | int | None, pattern: list[str] | str | None) -> None:
    """layers_to_transform, which holds for modules that target_modules does not spell out in full.

    Raises: AdapterError naming the field.
    """
    if layers is None or layers == []:
        return
    if isinstance(target, str):
        raise AdapterError("layers_to_transform", "is not defined where target_modules is a regular expression")
    if target is not None and module in target:
        return
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if _layer_of(module, [pattern] if isinstance(pattern, str) and pattern else pattern or ()) not in wanted:
        raise AdapterError("layers_to_transform", f"leaves out {module}, for which the upload holds tensors")


def _layer_of(module: str, patterns: Sequence[str]) -> int | None:
    """The first number in the name after two segments, or that after the first layers pattern that has one."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    for shown, expression in zip(patterns or [""], expressions, strict=True):
        found = compiled("layers_pattern", shown, expression).match(module)
        if found is not None:
            number = found.group("idx")
            return None if number is None else int(number)
    return None
