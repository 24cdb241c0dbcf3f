"""AdapterHub's prefix tuning into a neutral checkpoint: keys and values in front, the text's positions from 0 on.

Owns the file's copies of one tensor (the pool is saved with the model and again with every layer, all equal) and what a
prefix needs of the base. The network behind a prefix that is not flat is evaluated by `methods/prefix_mlp.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.activations import activation_of
from ..methods.base import BaseShape, Checkpoint
from .adapterhub_fields import PrefixFields
from .adapterhub_places import Places
from .adapterhub_sites import Site

_LOCATION: Final = "self_prefix."


def read_prefixes(
    members: list[tuple[str, PrefixFields]], sites: list[Site], base: BaseShape, places: Places
) -> Iterable[Checkpoint]:
    """Raises: AdapterError naming the field or tensor at fault."""
    if sites and not members:
        raise AdapterError(sites[0].prefix[:-1], "is a prefix, but the config has none")
    if len(members) > 1:
        raise AdapterError("config.configs", "holds more than one prefix tuning config")
    for where, fields in members:
        _check_base(where, base, places)
        yield _read(where, fields, _single(where, sites), base)


def _check_base(where: str, base: BaseShape, places: Places) -> None:
    if places.hooked:
        why = f"the library has prefix tuning only for models it has a class for, which {base.model_type} is not"
        raise AdapterError(f"{where}architecture", f"'prefix_tuning' is not served: {why}")
    if base.window:
        why = f"it stays visible outside the base's sliding window of {base.window} positions"
        raise AdapterError(f"{where}architecture", f"'prefix_tuning' is not served: {why}")


def _single(where: str, sites: list[Site]) -> Site:
    """The tensors of one copy. Raises: AdapterError naming a tensor that differs between copies or lies elsewhere."""
    if not sites:
        raise AdapterError(f"{where}architecture", "the upload holds no prefix_tunings tensors")
    merged = Site(sites[0].prefix + _LOCATION, sites[0].path)
    for site in sites:
        for name, tensor in site.tensors.items():
            if not name.startswith(_LOCATION):
                raise AdapterError(site.prefix + name, "is not a prefix of the self-attention; a decoder has no other")
            known = merged.tensors.setdefault(name.removeprefix(_LOCATION), tensor)
            if not torch.equal(known, tensor):
                raise AdapterError(site.prefix + name, f"differs from its copy under {sites[0].path or 'the model'}")
    return merged


def _read(where: str, fields: PrefixFields, site: Site, base: BaseShape) -> Checkpoint:
    length = fields.prefix_length
    width = base.num_layers * 2 * base.num_kv_heads * base.head_dim
    if fields.flat:
        table = site.take("control_trans", (length * width,)).view(length, width)
        site.check_only(("control_trans",))
        return Checkpoint("prefix_tuning", {"positions": 0}, loose={"table": table})
    activation = activation_of(f"{where}non_linearity", fields.non_linearity)
    return Checkpoint("prefix_tuning", {"positions": 0, "activation": activation}, loose=_network(fields, site, base, width))


def _network(fields: PrefixFields, site: Site, base: BaseShape, width: int) -> Mapping[str, Tensor]:
    size = fields.bottleneck_size
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "table": ("wte.weight", (fields.prefix_length, base.hidden_size)),
        "down": ("control_trans.0.weight", (size, base.hidden_size)),
        "down_bias": ("control_trans.0.bias", (size,)),
        "up": ("control_trans.2.weight", (width, size)),
        "up_bias": ("control_trans.2.bias", (width,)),
    }
    site.check_only([name for name, _ in shapes.values()])
    return {neutral: site.take(name, shape) for neutral, (name, shape) in shapes.items()}
