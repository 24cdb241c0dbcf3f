"""Uploads in other libraries' dialects, read into neutral `Checkpoint`s. Executes nothing that an upload says.

Owns the choice of dialect. Never touches the store, a model or a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint
from . import files
from .adapterhub import INTERFACE, is_adapterhub, read_adapterhub
from .adapterhub import WEIGHTS as ADAPTERHUB_WEIGHTS
from .peft import WEIGHTS as PEFT_WEIGHTS
from .peft import read_peft


def read_checkpoints(paths: Mapping[str, Path], base: BaseShape) -> tuple[Checkpoint, ...]:
    """Every checkpoint of one upload, `paths` being file name in the upload -> file.

    Raises: AdapterError naming the file, config field or tensor at fault.
    """
    files.check_names(paths.keys())
    config = files.load_json(paths[files.CONFIG], files.CONFIG)
    if "peft_type" in config:
        return read_peft(config, _tensors(paths, PEFT_WEIGHTS))
    if not is_adapterhub(config):
        raise AdapterError("peft_type", f"is missing from {files.CONFIG}")
    interface = files.load_json(paths[INTERFACE], INTERFACE) if INTERFACE in paths else None
    return read_adapterhub(config, _tensors(paths, ADAPTERHUB_WEIGHTS, INTERFACE), base, interface)


def _tensors(paths: Mapping[str, Path], weights: str, *also: str) -> Mapping[str, Tensor]:
    unread = set(paths) & files.READ - {files.CONFIG, weights, *also}
    if unread:
        raise AdapterError(min(unread), "is not read in an upload of this format; leave it out")
    if weights not in paths:
        raise AdapterError(weights, "is missing from the upload")
    return files.load_tensors(paths[weights], weights)
