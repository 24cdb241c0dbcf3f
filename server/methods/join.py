"""Adapters that apply together to one request, made one adapter: a slot of a pool holds one set of tensors per module.

Owns what two adapters of one family mean together. What has no exact meaning is refused by name.

    LoRA            y + B1 A1 x + B2 A2 x = y + [B1 B2] [A1; A2] x      ranks add up
    IA3             l1 * l2                                             biases: d1 + d2
    prefixes        positions of the first, then of the second; K/V with K/V, embeddings with embeddings
    anything else   only where they adapt different modules
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from ..errors import ValidationError
from .base import Adapter, Part, Prefix, Tensors
from .lora import pooled


def join(adapters: Sequence[Adapter]) -> tuple[Part, ...]:
    """The parts of one adapter that does what `adapters` do together. Raises: ValidationError naming what does not fit."""
    prefixes = [(part.method, part.prefix) for adapter in adapters for part in adapter.parts if part.prefix is not None]
    _check_sites(adapters)
    parts: dict[str, Part] = {}
    for part in (part for adapter in adapters for part in adapter.parts if part.pool is not None):
        _add(parts, replace(part, prefix=None))
    return (*parts.values(), *_joined_prefix(prefixes))


def _add(parts: dict[str, Part], part: Part) -> None:
    """File a part under its pool, together with the one that is there; longer ranks may move it to another pool."""
    while part.pool in parts:
        part = _of_one_pool(parts.pop(part.pool), part)
    parts[str(part.pool)] = part


def _of_one_pool(one: Part, other: Part) -> Part:
    together = _TOGETHER.get(one.method, _never)
    sites = {**one.sites, **other.sites}
    for module in one.sites.keys() & other.sites.keys():
        sites[module] = together(one.sites[module], other.sites[module])
    return pooled(sites) if one.method == "lora" else replace(one, sites=sites, scale={})


# -- two adapters at one module --------------------------------------------------------------------------------------


def _check_sites(adapters: Sequence[Adapter]) -> None:
    """Raises: ValidationError where two adapters of a family that does not add up act on one module, in whatever pools."""
    seen: set[tuple[str, str]] = set()
    for adapter in adapters:
        here = set(_taken(adapter.parts))
        for family, module in sorted(seen & here):
            raise ValidationError(f"`compose` cannot apply two {family} adapters to {module or 'one request'}")
        seen |= here


def _taken(parts: Iterable[Part]) -> Iterable[tuple[str, str]]:
    """(family, module) where no other adapter of the family may act; a head has no module and is one per request."""
    for part in parts:
        if part.method not in _TOGETHER:
            yield from ((part.method, module) for module in part.sites)
        if part.head is not None:
            yield part.method, ""


def _stacked_ranks(one: Tensors, other: Tensors) -> dict[str, Tensor]:
    site = {"A": torch.cat((one["A"], other["A"])), "B": torch.cat((one["B"], other["B"]), dim=1)}
    biases = [tensors["bias"] for tensors in (one, other) if "bias" in tensors]
    return site | ({"bias": torch.stack([bias.float() for bias in biases]).sum(0)} if biases else {})


def _products(one: Tensors, other: Tensors) -> dict[str, Tensor]:
    return {**one, **other, **{side: one[side].float() * other[side].float() for side in one.keys() & other.keys()}}


def _sums(one: Tensors, other: Tensors) -> dict[str, Tensor]:
    return {name: one[name].float() + other[name].float() for name in one}


def _never(one: Tensors, other: Tensors) -> dict[str, Tensor]:
    raise RuntimeError("two adapters at one module of a family that does not add up")


_TOGETHER: Final[Mapping[str, Callable[[Tensors, Tensors], dict[str, Tensor]]]] = MappingProxyType(
    {"lora": _stacked_ranks, "ia3": _products, "bitfit": _sums}
)


# -- two prefixes ----------------------------------------------------------------------------------------------------


def _joined_prefix(found: Sequence[tuple[str, Prefix]]) -> tuple[Part, ...]:
    if not found:
        return ()
    method, prefix = found[0]
    for name, other in found[1:]:
        prefix = _one_after_the_other(prefix, other, f"{method} and {name}")
    return (Part(method, prefix=prefix),)


def _one_after_the_other(first: Prefix, second: Prefix, names: str) -> Prefix:
    """K/V of a prefix know nothing of what is in front of them, so a pair is exact; embeddings are run as one prompt."""
    length = first.length + second.length
    moved = None if first.positions is second.positions is None else length - first.shift - second.shift
    if first.keys is not None and second.keys is not None and first.values is not None and second.values is not None:
        keys, values = torch.cat((first.keys, second.keys), 1), torch.cat((first.values, second.values), 1)
        return Prefix(length, keys, values, positions=moved)
    if first.embeddings is not None and second.embeddings is not None and not first.tasks and not second.tasks:
        return Prefix(length, embeddings=torch.cat((first.embeddings, second.embeddings)), positions=moved)
    if first.ids is not None and second.ids is not None:
        return Prefix(length, ids=torch.cat((first.ids, second.ids)), positions=moved)
    raise ValidationError(f"`compose` cannot put {names} in front of one text: {_form(first)} and {_form(second)}")


def _form(prefix: Prefix) -> str:
    if prefix.tasks:
        return "a prompt of several tasks"
    return "keys and values" if prefix.keys is not None else "tokens" if prefix.ids is not None else "embeddings"
