"""Fuzzes the checkpoint reader: safetensors files, made wholly of bytes or with tensors of odd names, dtypes and shapes.

python -m tests.fuzz.checkpoint -max_total_time=60
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import atheris

with atheris.instrument_imports(include=["server.checkpoints", "server.methods"]):
    from server.methods.read import describe, read_parts

from server.errors import AdapterError
from tests.fuzz.harness import fuzz, pick
from tests.fuzz.uploads import CONFIGS, LIMITS, SEEDS, SHAPE, TENSORS, WEIGHTS, paths_of

DTYPES = ["F32", "F16", "BF16", "F64", "I8"]
SIZES = [0, 1, 2, 3, 4, 8, 16, 32, 64, 97, 128]
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1}


def target(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    config = CONFIGS[source.ConsumeIntInRange(0, len(CONFIGS) - 1)]
    body = built(source) if source.ConsumeBool() else source.ConsumeBytes(len(data))
    with contextlib.suppress(AdapterError):
        describe(read_parts(paths_of({"adapter_config.json": config, WEIGHTS: body}), SHAPE, LIMITS))


def built(source: atheris.FuzzedDataProvider) -> bytes:
    """A file that is a safetensors file, of tensors that may or may not be an adapter's."""
    header: dict[str, object] = {}
    at = 0
    for _ in range(source.ConsumeIntInRange(0, 6)):
        name = pick(source, TENSORS) + (source.ConsumeUnicodeNoSurrogates(6) if source.ConsumeIntInRange(0, 7) == 0 else "")
        dtype = pick(source, DTYPES)
        shape = [SIZES[source.ConsumeIntInRange(0, len(SIZES) - 1)] for _ in range(source.ConsumeIntInRange(0, 3))]
        size = BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    fill = source.ConsumeBytes(64) or b"\0"
    return len(raw).to_bytes(8, "little") + raw + (fill * (at // len(fill) + 1))[:at]


def seeds() -> Iterator[bytes]:
    for files in SEEDS:
        yield files[WEIGHTS][:4000] + b"\0" + bytes([CONFIGS.index(files["adapter_config.json"])])
    yield bytes(range(256)) * 4


if __name__ == "__main__":
    fuzz(target, seeds())
