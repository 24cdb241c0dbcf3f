"""From an upload's files to the adapter the engine serves: checkpoints are read, then folded against the base.

Owns nothing but that joint. Pure and host side; run it in a worker, never in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adapters_store.digest import Digest
from adapters_store.records import JSON

from ..checkpoints import read_checkpoints
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
    for found in read_checkpoints(paths, base):
        part = methods[found.method].read(found, base, limits)
        kind = part.pool or "prefix"
        parts[kind] = _joined(parts[kind], part) if kind in parts else part
    return tuple(parts.values())


def _joined(one: Part, other: Part) -> Part:
    """A slot of a pool holds one set of tensors per module, so parts of one pool become one."""
    if one.pool is None:
        raise AdapterError(other.method, f"the upload already has a prefix ({one.method}); it can have one")
    twice = one.sites.keys() & other.sites.keys()
    if twice:
        raise AdapterError(min(twice), f"is adapted twice by {other.method} in one upload")
    return replace(one, sites={**one.sites, **other.sites})


def describe(parts: Sequence[Part]) -> dict[str, JSON]:
    """What an upload turned out to be, ready for JSON."""
    return {
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
        "parameters": _parameters(part),
        "bytes": part.nbytes,
        "virtual_tokens": part.prefix.length if part.prefix else 0,
    }


def _parameters(part: Part) -> int:
    own = sum(tensor.numel() for tensors in part.sites.values() for tensor in tensors.values())
    return own + (_prefix_parameters(part.prefix) if part.prefix else 0)


def _prefix_parameters(prefix: Prefix) -> int:
    stored = (prefix.keys, prefix.values, prefix.embeddings)
    return sum(tensor.numel() for tensor in stored if tensor is not None)
