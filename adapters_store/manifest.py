"""The manifest: the one file that says which files an adapter consists of. Its sha256 is the adapter's digest.

    {"adapter_config.json":["5f1d...",412],"adapter_model.safetensors":["c0a8...",3407872]}

Canonical JSON (sorted keys, no spaces, ASCII), so that equal files always give the same digest. Reads no disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from .digest import Digest
from .errors import Corrupt, Invalid
from .names import check_file_name


class Entry(NamedTuple):
    """One file of an adapter."""

    blob: Digest
    size: int  # bytes


def encode(files: Mapping[str, Entry]) -> bytes:
    return json.dumps(files, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, digest: Digest) -> dict[str, Entry]:
    """Raises: Corrupt when `data` is not the manifest that `digest` names."""
    if Digest.of(data) != digest:
        raise Corrupt(f"manifest {digest.short}: its sha256 is {Digest.of(data).short}")
    try:
        files = json.loads(data)
        return {check_file_name(name): Entry(Digest(blob), int(size)) for name, (blob, size) in files.items()}
    except (ValueError, TypeError, AttributeError, Invalid) as error:
        raise Corrupt(f"manifest {digest.short}: not a manifest") from error
