"""One upload, as its library saved it, read again with other values in its config: what changes, if anything does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from server.errors import AdapterError
from server.methods.base import BaseShape, Limits, Part
from server.methods.read import read_parts

CONFIG = "adapter_config.json"
SAME, OTHER = "the same parts", "other parts"


class Saved:
    """Usage: Saved(paths, base, scratch).outcome(lora_alpha=7) == OTHER

    `file` is the one whose fields are changed, in the object at key `inside` of it where that is given.
    """

    def __init__(self, paths: Mapping[str, Path], base: BaseShape, scratch: Path, file: str = CONFIG, inside: str = "") -> None:
        self.base = base
        self.paths = dict(paths)
        self._file = file
        self._inside = inside
        self._whole: dict[str, Any] = json.loads(self.paths[file].read_text())
        self.config: dict[str, Any] = self._whole[inside] if inside else self._whole
        self._changed = scratch
        self.parts = self.read(self.config)

    def read(self, config: Mapping[str, Any]) -> tuple[Part, ...]:
        whole = {**self._whole, self._inside: config} if self._inside else config
        self._changed.write_text(json.dumps(whole))
        return read_parts({**self.paths, self._file: self._changed}, self.base, Limits())

    def outcome(self, **changes: Any) -> str:
        """`SAME`, `OTHER` or the refusal's text."""
        try:
            parts = self.read({**self.config, **changes})
        except AdapterError as error:
            return str(error)
        return SAME if _equal(parts, self.parts) else OTHER


#: One value of every kind that JSON knows: a field that is never looked at may have any of them.
ANYTHING: Final = (None, True, False, 0, 7, -1, 0.5, "other", ["x"], [1], {"a": 1}, [], {})


def _equal(one: object, other: object) -> bool:
    """Bit for bit, in every tensor of every part."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return one == other
