"""Uploads in other libraries' dialects, read into neutral `Checkpoint`s. Executes nothing that an upload says.

Owns the choice of dialect. Never touches the store, a model or a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import Checkpoint
from . import files, peft


def read_checkpoints(paths: Mapping[str, Path]) -> tuple[Checkpoint, ...]:
    """Every checkpoint of one upload, `paths` being file name in the upload -> file.

    Raises: AdapterError naming the file, config field or tensor at fault.
    """
    files.check_names(paths.keys())
    config = files.load_json(paths[files.CONFIG], files.CONFIG)
    if "peft_type" not in config:
        raise AdapterError("peft_type", f"is missing from {files.CONFIG}")
    return peft.read_peft(config, _tensors(paths, peft.WEIGHTS))


def _tensors(paths: Mapping[str, Path], name: str) -> Mapping[str, Tensor]:
    unread = set(paths) & files.READ - {files.CONFIG, name}
    if unread:
        raise AdapterError(min(unread), "is not read in an upload of this format; leave it out")
    if name not in paths:
        raise AdapterError(name, "is missing from the upload")
    return files.load_tensors(paths[name], name)
