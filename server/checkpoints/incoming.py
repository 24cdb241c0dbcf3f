"""Incoming: the files of an upload while they arrive, each refused at the byte that shows it cannot be one of an adapter.

Owns no limit and no rule: they are files.py's, which reads every file again once it is whole. Keeps one header in memory at
most, and no body: an upload whose header is wrong is not received to its end.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import AdapterError
from .files import LENGTH_BYTES, MAX_JSON_BYTES, check_name, header_length, parse_header
from .parts import within

Inspect = Callable[[bytes], None]


def inspector(name: str) -> Inspect:
    """For a file called "file" or "part/file": takes its bytes in order, in pieces of any size.

    Raises: AdapterError, at once for a name that no file of an adapter has, later from the result.
    """
    part, _, file = name.rpartition("/")
    with within(part):
        check_name(file)
    inspect: Inspect = _Tensors(file) if file.endswith(".safetensors") else _Small(file)

    def inspected(data: bytes) -> None:
        with within(part):
            inspect(data)

    return inspected


class _Small:
    """A config, a model card, a license."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size = 0

    def __call__(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_JSON_BYTES:
            raise AdapterError(self._name, f"has {self._size} bytes or more, over the limit of {MAX_JSON_BYTES}")


class _Tensors:
    """A safetensors file: its header is parsed the moment it is there, and says how much may follow."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size = 0
        self._head = bytearray()
        self._whole: int | None = None  # bytes of the whole file, once its header is known

    def __call__(self, data: bytes) -> None:
        self._size += len(data)
        if self._whole is None:
            self._read(data)
        if self._whole is not None and self._size > self._whole:
            raise AdapterError(self._name, f"has more bytes than the {self._whole} that its header declares")

    def _read(self, data: bytes) -> None:
        self._head += data[: LENGTH_BYTES + MAX_JSON_BYTES - len(self._head)]
        if len(self._head) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + header_length(bytes(self._head[:LENGTH_BYTES]), self._name)
        if len(self._head) >= end:
            _, declared = parse_header(bytes(self._head[LENGTH_BYTES:end]), self._name)
            self._whole = end + declared
            self._head.clear()
