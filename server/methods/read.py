"""From an upload's files to the adapter the engine serves: checkpoints are read, then folded against the base.

Owns nothing but that joint. Pure and host side; run it in a worker, never in a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adapters_store.digest import Digest
from adapters_store.records import JSON

from ..checkpoints import read_upload
from ..checkpoints.parts import within
from ..errors import AdapterError
from . import METHODS
from .base import Adapter, BaseShape, Limits, Method, Part, Prefix


def read_adapter(
    paths: Mapping[str, Path],
    base: BaseShape,
    limits: Limits,
    digest: Digest,
    methods: Mapping[str, Method] = METHODS,
) -> Adapter:
    """The adapter stored in `paths` (file name in the upload -> file), checked against `base` in every tensor.

    Raises: AdapterError naming the file, config field or tensor at fault.
    """
    return Adapter(digest, read_parts(paths, base, limits, methods))


def read_parts(
    paths: Mapping[str, Path], base: BaseShape, limits: Limits, methods: Mapping[str, Method] = METHODS
) -> tuple[Part, ...]:
    """The parts of one upload, at most one per pool and one prefix. Raises: AdapterError, as `read_adapter`."""
    parts: dict[str, Part] = {}
    for name, found in read_upload(paths, base):
        with within(name):
            part = methods[found.method].read(found, base, limits)
            kind = part.pool or "prefix"
            parts[kind] = _joined(parts[kind], part) if kind in parts else part
    return tuple(parts.values())


def _joined(one: Part, other: Part) -> Part:
    """A slot of a pool holds one set of tensors per module, so parts of one pool become one."""
    if one.pool is None:
        raise AdapterError(other.method, f"the upload already has a prefix ({one.method}); it can have one")
    if one.head is not None or other.head is not None:
        raise AdapterError(other.method, "the upload already has a head; it can have one")
    twice = one.sites.keys() & other.sites.keys()
    if twice:
        raise AdapterError(min(twice), f"is adapted twice by {other.method} in one upload")
    return replace(one, sites={**one.sites, **other.sites}, scale={**one.scale, **other.scale})


def describe(parts: Sequence[Part]) -> dict[str, JSON]:
    """What an upload turned out to be, ready for JSON."""
    told = {name: value for part in parts for name, value in part.told.items()}
    return {
        **told,
        "methods": [part.method for part in parts],
        "parameters": sum(_parameters(part) for part in parts),
        "bytes": sum(part.nbytes for part in parts),
        "virtual_tokens": sum(part.prefix.length for part in parts if part.prefix),
        "parts": [_describe(part) for part in parts],
    }


def _describe(part: Part) -> dict[str, JSON]:
    return {
        "method": part.method,
        "pool": part.pool,
        "sites": len(part.sites),
        "modules": _modules(part),
        "parameters": _parameters(part),
        "bytes": part.nbytes,
        "virtual_tokens": part.prefix.length if part.prefix else 0,
    }


def _modules(part: Part) -> dict[str, JSON]:
    """The sites with layers counted together: {"model.layers.*.self_attn.q_proj": 30}."""
    alike = Counter(".".join("*" if word.isdecimal() else word for word in module.split(".")) for module in part.sites)
    return dict(sorted(alike.items()))


def _parameters(part: Part) -> int:
    held = [*part.sites.values(), part.head.tensors if part.head else {}]
    own = sum(tensor.numel() for tensors in held for tensor in tensors.values())
    return own + (_prefix_parameters(part.prefix) if part.prefix else 0)


def _prefix_parameters(prefix: Prefix) -> int:
    return sum(tensor.numel() for tensor in prefix.tensors if tensor.is_floating_point())
