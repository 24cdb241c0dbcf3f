"""AdapterHub's dialect (the `adapters` library, 0.x and 1.x): its adapter_config.json and adapter.safetensors, into neutral
checkpoints.

Owns the upload as a whole: its own fields, and which reader each of its method configs goes to. Never imports the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint, Tensors
from .adapterhub_bottleneck import read_bottlenecks
from .adapterhub_fields import BottleneckFields, Fields, LoraFields, PrefixFields, UploadFields, members_of, parse, shown
from .adapterhub_lora import read_loras
from .adapterhub_places import places_of
from .adapterhub_prefix import read_prefixes
from .adapterhub_sites import sites_of

WEIGHTS: Final = "adapter.safetensors"


def is_adapterhub(config: Mapping[str, object]) -> bool:
    """Whether an adapter_config.json is of this dialect: PEFT's has a peft_type and no nested config."""
    return "peft_type" not in config and "config" in config and "version" in config


def read_adapterhub(
    config: Mapping[str, object], tensors: Tensors, base: BaseShape, interface: Mapping[str, object] | None = None
) -> tuple[Checkpoint, ...]:
    """The checkpoints of one upload: several for a union, or where places of one adapter compute differently.

    `interface` is adapter_interface.json, where the upload has one.
    Raises: AdapterError naming the config field or the tensor at fault.
    """
    upload = parse(UploadFields, config, "")
    check_base(upload.model_type, upload.hidden_size, base)
    members = members_of(_repaired(upload))
    places, sites = places_of(base, interface), sites_of(tensors, upload.name)
    return (
        *read_bottlenecks(_of(BottleneckFields, members), sites, base, places),
        *read_loras(_of(LoraFields, members), sites, base, places),
        *read_prefixes(_of(PrefixFields, members), sites["prefix"], base, places),
    )


def check_base(model_type: str, hidden_size: int, base: BaseShape, where: str = "") -> None:
    """Raises: AdapterError naming the field when the file was made for another base."""
    if model_type != base.model_type:
        raise AdapterError(f"{where}model_type", f"{shown(model_type)} is not the base model's, {base.model_type!r}")
    if hidden_size != base.hidden_size:
        raise AdapterError(f"{where}hidden_size", f"{hidden_size} is not the base model's, {base.hidden_size}")


F = TypeVar("F", bound=Fields)


def _of(kind: type[F], members: list[tuple[str, Fields]]) -> list[tuple[str, F]]:
    return [(where, fields) for where, fields in members if isinstance(fields, kind)]


def _repaired(upload: UploadFields) -> Mapping[str, object]:
    """Before 1.1.0 the library ignored alpha when it applied a LoRA; since then it loads such files with alpha = r."""
    config = upload.config
    _, major, minor, *_ = upload.version.split(".")
    if config.get("architecture") == "lora" and (int(major), int(minor)) < (1, 1):
        return {**config, "alpha": config.get("r", LoraFields.model_fields["r"].default)}
    return config
