"""Uploads in other libraries' dialects, read into neutral `Checkpoint`s. Executes nothing that an upload says.

Owns the choice of dialect. Never touches the store, a model or a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint
from . import files
from .adapterhub import WEIGHTS as ADAPTERHUB_WEIGHTS
from .adapterhub import is_adapterhub, read_adapterhub
from .adapterhub_heads import HEAD, HEAD_WEIGHTS, read_adapterhub_head
from .adapterhub_places import INTERFACE
from .parts import parts_of, within
from .peft import TENSORLESS, read_peft
from .peft import WEIGHTS as PEFT_WEIGHTS
from .peft_folded import VERA, fold_vera
from .peft_saved import sort_saved


def read_checkpoints(paths: Mapping[str, Path], base: BaseShape) -> tuple[Checkpoint, ...]:
    """Every checkpoint of one upload, `paths` being file name in the upload -> file. Raises: as `read_upload`."""
    return tuple(found for _, found in read_upload(paths, base))


def read_upload(paths: Mapping[str, Path], base: BaseShape) -> Iterator[tuple[str, Checkpoint]]:
    """(part, checkpoint) for every checkpoint of one upload, part by part; "" is the part with no directory.

    Raises: AdapterError naming the file, config field or tensor at fault, and the part it is in.
    """
    for part, found in parts_of(paths).items():
        with within(part):
            checkpoints = _read_part(found, base)
        for checkpoint in checkpoints:
            yield part, checkpoint


def _read_part(paths: Mapping[str, Path], base: BaseShape) -> tuple[Checkpoint, ...]:
    config = files.load_json(paths[files.CONFIG], files.CONFIG)
    if "peft_type" in config:
        found = read_peft(config, _tensors(paths, PEFT_WEIGHTS, optional=config["peft_type"] in TENSORLESS))
        return sort_saved([fold_vera(one, base) if one.method == VERA else one for one in found], base)
    if not is_adapterhub(config):
        raise AdapterError("peft_type", f"is missing from {files.CONFIG}")
    interface = files.load_json(paths[INTERFACE], INTERFACE) if INTERFACE in paths else None
    tensors = _tensors(paths, ADAPTERHUB_WEIGHTS, INTERFACE, HEAD, HEAD_WEIGHTS)
    return (*read_adapterhub(config, tensors, base, interface), *_adapterhub_head(paths, base))


def _adapterhub_head(paths: Mapping[str, Path], base: BaseShape) -> tuple[Checkpoint, ...]:
    """Of the head that the library saves beside an adapter, where the upload has one."""
    missing = sorted({HEAD, HEAD_WEIGHTS} - paths.keys())
    if len(missing) == 2:
        return ()
    if missing:
        raise AdapterError(missing[0], "is missing from the upload, which holds the other file of its head")
    head, weights = paths[HEAD], paths[HEAD_WEIGHTS]
    return read_adapterhub_head(files.load_json(head, HEAD), files.load_tensors(weights, HEAD_WEIGHTS), base)


def _tensors(paths: Mapping[str, Path], weights: str, *also: str, optional: bool = False) -> Mapping[str, Tensor]:
    unread = set(paths) & files.READ - {files.CONFIG, weights, *also}
    if unread:
        raise AdapterError(min(unread), "is not read in an upload of this format; leave it out")
    if optional and weights not in paths:
        return {}
    if weights not in paths:
        raise AdapterError(weights, "is missing from the upload")
    return files.load_tensors(paths[weights], weights)
