"""The parts of an upload: its own files and those of sub-directories one level deep, each part in whatever dialect.

Owns how files are told apart by part, and how an error says which part it is in. Reads no file.

    adapter_config.json              part ""        lora/adapter_config.json         part "lora"
    adapter_model.safetensors        part ""        lora/adapter_model.safetensors   part "lora"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ..errors import AdapterError
from .files import CONFIG, IGNORED, check_names

T = TypeVar("T")


def parts_of(paths: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Part -> file name in it -> what `paths` has under "part/file", every name checked. Parts come in name order.

    Raises: AdapterError naming a file that no adapter has, a part without a config, or an upload without parts.
    """
    found: dict[str, dict[str, T]] = {}
    for name in sorted(paths):
        part, _, file = name.rpartition("/")
        found.setdefault(part, {})[file] = paths[name]
    adapters = {part: files for part, files in sorted(found.items()) if not files.keys() <= IGNORED}
    if not adapters:
        raise AdapterError(CONFIG, "is missing from the upload")
    for part, files in adapters.items():
        with within(part):
            check_names(files.keys())
    return adapters


@contextmanager
def within(part: str) -> Iterator[None]:
    """Errors of the block name the part: `r` becomes `lora/r`."""
    try:
        yield
    except AdapterError as error:
        if not part:
            raise
        raise AdapterError(f"{part}/{error.field}", error.reason) from error
