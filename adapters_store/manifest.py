"""The manifest: the one file that says which files an adapter consists of, and whose it is. Its sha256 is the adapter's digest.

    {"files":{"adapter_config.json":["5f1d...",412],"adapter_model.safetensors":["c0a8...",3407872]},"tenant":"acme"}

Canonical JSON (sorted keys, no spaces, ASCII), so that equal files of one tenant always give the same digest, and equal files
of two tenants never do: what is kept by digest (slots, states, caches) is then kept by tenant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .blobs import Blobs
from .digest import Digest
from .errors import Corrupt, Invalid, disk_errors
from .names import check_file_name, check_name

MAX_BYTES = 1 << 20  # of a manifest; the longest that `Staged` can make has a fifth of it


class Entry(NamedTuple):
    """One file of an adapter."""

    blob: Digest
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """`tenant` is None in manifests of releases that did not name the owner: the bare table of files."""

    tenant: str | None
    files: Mapping[str, Entry]


def encode(tenant: str, files: Mapping[str, Entry]) -> bytes:
    return json.dumps({"files": files, "tenant": tenant}, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, digest: Digest) -> Manifest:
    """Raises: Corrupt when `data` is not the manifest that `digest` names."""
    if Digest.of(data) != digest:
        raise Corrupt(f"manifest {digest.short}: its sha256 is {Digest.of(data).short}")
    try:
        return _manifest(json.loads(data))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, Invalid) as error:
        raise Corrupt(f"manifest {digest.short}: not a manifest") from error


def read(blobs: Blobs, digest: Digest) -> Manifest:
    """Raises: Corrupt when the blob is missing, too large, or no manifest; Unavailable."""
    size = blobs.local_size(digest)
    if size is None or size > MAX_BYTES:
        found = "is missing" if size is None else f"has {size} bytes, at most {MAX_BYTES} are read"
        raise Corrupt(f"adapter {digest.short}: its manifest {found}")
    with disk_errors():
        return decode(blobs.path(digest).read_bytes(), digest)


def _manifest(stored: dict[str, object]) -> Manifest:
    """A file of a bare table may be called "tenant"; its value is a list then."""
    if not isinstance(stored.get("tenant"), str):
        return Manifest(None, _entries(stored))
    return Manifest(check_name("tenant", str(stored["tenant"])), _entries(stored["files"]))


def _entries(files: object) -> dict[str, Entry]:
    if not isinstance(files, dict):
        raise TypeError(f"a {type(files).__name__} is no table of files")
    return {check_file_name(name): Entry(Digest(blob), int(size)) for name, (blob, size) in files.items()}
