"""The files of one part of an upload: which names are accepted, JSON and safetensors parsed within limits, before
anything is believed.

Owns the checks that no dialect may skip. Never unpickles, imports, resolves a URL or follows a path named by an upload.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeGuard

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError
from ..methods.base import finite

CONFIG: Final = "adapter_config.json"
READ: Final = frozenset(
    {
        CONFIG,
        "adapter_interface.json",
        "adapter.safetensors",
        "adapter_model.safetensors",
        "head_config.json",
        "model_head.safetensors",
    }
)
IGNORED: Final = frozenset({"README.md", "LICENSE", ".gitattributes"})
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
CONVERSION: Final = "adapterd adapters convert DIR"

MAX_JSON_BYTES: Final = 1 << 20
MAX_JSON_DEPTH: Final = 16
LENGTH_BYTES: Final = 8  # in which a safetensors file begins with its header's length
MAX_TENSORS: Final = 20_000
MAX_TENSOR_NAME: Final = 512
MAX_DIMENSIONS: Final = 8
DTYPE_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a safetensors header declares it; begin and end are byte offsets after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_names(names: Collection[str]) -> None:
    """Refuse a part of an upload by its file names alone. Raises: AdapterError naming the file."""
    for name in sorted(names):
        check_name(name)
    if CONFIG not in names:
        raise AdapterError(CONFIG, "is missing from the upload")


def check_name(name: str) -> None:
    """Raises: AdapterError for a file that no part of an adapter has."""
    if name.lower().endswith(PICKLES):
        raise AdapterError(_shown(name), f"pickled files are not accepted; convert them where you trust them: {CONVERSION}")
    if name not in READ | IGNORED:
        accepted = ", ".join(sorted(READ | IGNORED))
        raise AdapterError(_shown(name), f"is not a file of an adapter, leave it out; accepted: {accepted}")


def load_json(path: Path, name: str) -> dict[str, object]:
    """An object without duplicate keys. Raises: AdapterError naming the file and the limit it breaks."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise AdapterError(name, f"has {size} bytes, over the limit of {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), name)


def parse_json(data: bytes, name: str) -> dict[str, object]:
    """Raises: AdapterError naming `name`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        _check_depth(value)
    except RecursionError:
        raise AdapterError(name, f"is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise AdapterError(name, _reason(error)) from None
    return value


def read_header(file: BinaryIO, size: int, name: str) -> dict[str, TensorEntry]:
    """The header of a safetensors file of `size` bytes, checked so that its tensors exactly tile the rest of the file.

    Reads the header only, so that an upload can be refused before its body has been accepted.
    Raises: AdapterError naming the file or the tensor.
    """
    if size < LENGTH_BYTES:
        raise AdapterError(name, f"has {size} bytes, a safetensors file has at least {LENGTH_BYTES}")
    length = header_length(file.read(LENGTH_BYTES), name)
    if LENGTH_BYTES + length > size:
        raise AdapterError(name, f"declares a header of {length} bytes, but the file has {size}: it is cut short")
    entries, declared = parse_header(file.read(length), name)
    if declared != size - LENGTH_BYTES - length:
        raise AdapterError(name, f"holds {size - LENGTH_BYTES - length} bytes of tensors, but its header declares {declared}")
    return entries


def header_length(first: bytes, name: str) -> int:
    """Bytes of the header behind the first LENGTH_BYTES of a file. Raises: AdapterError."""
    length = int.from_bytes(first, "little")
    if length > MAX_JSON_BYTES:
        raise AdapterError(name, f"declares a header of {length} bytes, over the limit of {MAX_JSON_BYTES}")
    return length


def parse_header(header: bytes, name: str) -> tuple[dict[str, TensorEntry], int]:
    """A header's tensors, which leave no gap, and how many bytes they have together. Raises: AdapterError."""
    declared = parse_json(header, name)
    _check_metadata(declared.pop("__metadata__", None), name)
    if not 0 < len(declared) <= MAX_TENSORS:
        raise AdapterError(name, f"holds {len(declared)} tensors; accepted: 1 to {MAX_TENSORS}")
    entries = {tensor: _entry(tensor, entry) for tensor, entry in declared.items()}
    return entries, _tiled(entries)


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU, finite. Raises: AdapterError naming the file or the tensor."""
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, name)
    try:
        with safe_open(path, framework="pt", device="cpu") as stored:
            tensors: dict[str, Tensor] = {tensor: stored.get_tensor(tensor) for tensor in header}
    except SafetensorError as error:
        raise AdapterError(name, f"is not a valid safetensors file: {_reason(error)}") from None
    for tensor, value in tensors.items():
        if not finite(value):
            raise AdapterError(tensor, "holds NaN or infinity")
    return tensors


def _shown(text: str) -> str:
    """Names in messages are short and printable, whatever an upload calls its parts."""
    return text if text.isprintable() and len(text) <= 80 else ascii(text[:80])


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "holds a lone surrogate, which is no character"
    text = str(error)
    return _shown(text) if len(text) <= 80 else f"{_shown(text[:80])}..."


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"has the key {_shown(twice)} twice")
    return value


def _no_constant(constant: str) -> object:
    raise ValueError(f"holds {constant}, which is not JSON")


def _check_depth(value: object) -> None:
    """Also refuses lone surrogates, which no answer that quotes them could be encoded with."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return
        for item in level:
            for text in [item] if isinstance(item, str) else list(item) if isinstance(item, dict) else []:
                text.encode("utf-8")
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH} levels")


def _children(value: object) -> Collection[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_metadata(metadata: object, name: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(name, "__metadata__ must map strings to strings")


def _entry(tensor: str, entry: object) -> TensorEntry:
    if len(tensor) > MAX_TENSOR_NAME or not tensor.isprintable():
        limit = f"accepted: printable, at most {MAX_TENSOR_NAME} characters"
        raise AdapterError(_shown(tensor), f"is not a usable tensor name; {limit}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(tensor, "must declare dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterError(tensor, f"has dtype {_shown(str(dtype))}; accepted: {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or not 0 < len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise AdapterError(tensor, f"has shape {_shown(str(shape))}; accepted: 1 to {MAX_DIMENSIONS} sizes above 0")
    if not _naturals(offsets) or len(offsets) != 2:
        raise AdapterError(tensor, f"has data_offsets {_shown(str(offsets))}; needed: [begin, end]")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise AdapterError(tensor, f"occupies {_shown(str(offsets))}, but {dtype} {_shown(str(shape))} does not")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tiled(entries: Mapping[str, TensorEntry]) -> int:
    """|0 a 16|16 b 40|40 c 64| = 64: no gap, no overlap. Raises: AdapterError."""
    expected = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != expected:
            raise AdapterError(tensor, f"begins at byte {entry.begin}, but the tensors before it end at {expected}")
        expected = entry.end
    return expected
