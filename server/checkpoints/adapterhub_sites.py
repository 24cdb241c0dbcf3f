"""The tensors of an AdapterHub file by what they belong to: a bottleneck, a LoRA, a prefix; each keyed by the adapter's name.

Owns the names under which the library hangs its modules. Decides nothing about what they compute.

    <layers>.{l}.attention_adapters.adapters.{name}.adapter_down.0.weight    bottleneck after attention
    <layers>.{l}.output_adapters.adapters.{name}.adapter_up.bias             bottleneck after the feed-forward
    <layers>.{l}.self_attn.q_proj.loras.{name}.lora_A                        LoRA, VeRA, and IA3 (lora_B alone)
    <model>.shared_parameters.{name}.lora_A                                  what all VeRA modules share
    <model>.prefix_tuning.prefix_tunings.{name}.self_prefix.wte.weight       prefix, and once more in every layer
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Tensors, check_shape
from .adapterhub_fields import shown


@dataclass
class Site:
    """The tensors stored under one path, by what follows the adapter's name in their keys."""

    prefix: str  # of every key here, for messages
    path: str  # the module the library hung it on
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises: AdapterError naming the key when it is missing or has another shape."""
        if name not in self.tensors:
            raise AdapterError(self.prefix + name, "is missing")
        check_shape(self.prefix + name, self.tensors[name], shape)
        return self.tensors[name]

    def check_only(self, names: Collection[str]) -> None:
        for name in self.tensors:
            if name not in names:
                raise AdapterError(self.prefix + name, "is not a tensor that the config gives this adapter")


_HOLDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attention_adapters.adapters": "attention",
        "output_adapters.adapters": "feed_forward",
        "loras": "lora",
        "shared_parameters": "shared",
        "prefix_tunings": "prefix",
    }
)


def sites_of(tensors: Tensors, name: str) -> dict[str, list[Site]]:
    """Sites by what they are, a value of _HOLDERS. Raises: AdapterError naming a tensor that is none of them."""
    found: dict[tuple[str, str], Site] = {}
    for key, tensor in tensors.items():
        for holder, what in _HOLDERS.items():
            path, middle, rest = f".{key}".rpartition(f".{holder}.{name}.")
            if middle:
                site = found.setdefault((what, path), Site(key[: len(key) - len(rest)], path[1:]))
                site.tensors[rest] = tensor
                break
        else:
            raise AdapterError(key, f"belongs to no bottleneck, LoRA or prefix of an adapter named {shown(name)}")
    by_kind: dict[str, list[Site]] = {what: [] for what in _HOLDERS.values()}
    for (kind, _), site in found.items():
        by_kind[kind].append(site)
    return by_kind
