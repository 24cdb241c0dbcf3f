"""Fuzzes the request parser: JSON bodies of every route through the models and rules, and multipart forms.

python -m tests.fuzz.request -max_total_time=60
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import atheris
import pydantic

with atheris.instrument_imports(include=["server.api", "python_multipart"]):
    from server.api import body, rules, schemas
    from server.api.context import Limits
    from server.api.merged import check_merged
    from server.api.upload import Upload

from adapters_store.errors import StoreError
from adapters_store.store import Store
from server.errors import AdapterdError
from tests.fuzz.harness import fuzz, json_value, pick

MODELS: list[type[pydantic.BaseModel]] = [
    schemas.GenerateRequest,
    schemas.ClassifyRequest,
    schemas.EmbedRequest,
    schemas.TokenizeRequest,
    schemas.CompletionRequest,
    schemas.ChatRequest,
    schemas.UserRequest,
]
FIELDS = sorted(
    {name for model in (*MODELS, schemas.GenerateParameters, schemas.MergedAdapters) for name in model.model_fields}
)
WORDS = ["a", "user", "text", "linear", "ties", "mean", "", "\x00", "😀", "role", "content", "ids", "weights", "type"]
LIMITS = Limits(max_total_tokens=100)

_directory = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
STORE = Store.open(Path(_directory.name) / "store")
LOOP = asyncio.new_event_loop()


def target(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    try:
        if source.ConsumeIntInRange(0, 19) == 0:
            form(source, len(data))
        else:
            parse(source, len(data))
    except (AdapterdError, StoreError):
        pass


def parse(source: atheris.FuzzedDataProvider, size: int) -> None:
    model = MODELS[source.ConsumeIntInRange(0, len(MODELS) - 1)]
    sent = source.ConsumeBytes(size) if source.ConsumeBool() else made(source)
    try:
        read = model.model_validate_json(sent)
    except pydantic.ValidationError as error:
        json.dumps(str(body._translate(error)))
        return
    if isinstance(read, schemas.GenerateRequest):
        rules.check_generate(read.parameters, LIMITS, streaming=False)
        rules.check_stop(read.parameters.stop, LIMITS)
        check_merged(read.parameters.merged_adapters, read.adapter_id)
        rules.sampling_of(rules.generate_wish(read.parameters, LIMITS), 5)
    elif isinstance(read, schemas.OpenAIRequest):
        rules.check_choices(read, 16)
        rules.sampling_of(rules.openai_wish(read, top_n=0), 5)


def made(source: atheris.FuzzedDataProvider) -> bytes:
    """A body with fields that some route has."""

    def fields() -> dict[str, object]:
        return {pick(source, FIELDS): json_value(source, WORDS) for _ in range(source.ConsumeIntInRange(0, 4))}

    return json.dumps({"inputs": "a", "model": "m", "prompt": "a", "messages": [], **fields(), "parameters": fields()}).encode()


def form(source: atheris.FuzzedDataProvider, size: int) -> None:
    boundary = source.ConsumeBytes(source.ConsumeIntInRange(0, 4)) if source.ConsumeBool() else b"x"
    sent = source.ConsumeBytes(size)
    pieces = [sent[: len(sent) // 2], sent[len(sent) // 2 :]]

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    content_type = b"multipart/form-data; boundary=" + boundary
    with STORE.stage(max_bytes=1 << 16) as staged:
        LOOP.run_until_complete(Upload(staged, 1 << 16).receive(content_type.decode("latin-1"), chunks()))


def seeds() -> Iterator[bytes]:
    yield b'{"inputs": "a", "parameters": {"max_new_tokens": 3, "stop": ["a"]}}\x00\x00\x01'
    yield b'{"model": "m", "prompt": [[1, 2]], "n": 2, "logit_bias": {}}\x00\x04\x01'
    head = b'--x\r\ncontent-disposition: form-data; name="'
    parts = b'adapter_id"\r\n\r\na\r\n' + head + b'files"; filename="adapter_config.json"\r\n\r\n{}\r\n--x--\r\n'
    yield head + parts + b"\x00\x00"
    yield bytes(range(256))


if __name__ == "__main__":
    fuzz(target, seeds())
