"""JSON bodies: read within a size limit, checked strictly, refused in LoRAX's words. Also their place in the OpenAPI
document, which FastAPI cannot know as it does not parse them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from contextlib import nullcontext
from email.message import Message
from typing import Any, TypeVar

import pydantic
from fastapi import Request
from pydantic import BaseModel

from ..errors import MalformedError, TooLargeError, ValidationError
from .context import services_of
from .failures import counting_refusals

Model = TypeVar("Model", bound=BaseModel)

_SHOWN = 80  # characters of an offending value that are repeated to the client
_EXPECTED = {
    "bool_type": "a boolean",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}


def json_body(model: type[Model], *, counted: bool = False) -> Callable[[Request], Coroutine[Any, Any, Model]]:
    """A dependency that gives the request's body as `model`. With `counted`, a refusal shows in the request metrics.

    Raises: TooLargeError, MalformedError for what is no JSON, ValidationError naming the field that is wrong.
    """

    async def read(request: Request) -> Model:
        with counting_refusals(services_of(request).metrics) if counted else nullcontext():
            return await parse(request)

    async def parse(request: Request) -> Model:
        _require_json(request)
        body = await _receive(request, services_of(request).limits.max_request_bytes)
        try:
            return model.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise _translate(error) from None

    return read


def documented(model: type[BaseModel], **examples: Mapping[str, object]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model`."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {name.replace("_", " "): {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _require_json(request: Request) -> None:
    """Demanding the header keeps web pages from posting here without asking the browser's permission (CORS)."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_type()
    if kind != "application/json" and not kind.endswith("+json"):
        raise MalformedError("Expected request with `Content-Type: application/json`")


async def _receive(request: Request, limit: int) -> bytes:
    """The body; refused as soon as it is known to be too long."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise TooLargeError(f"the request body may have {limit} bytes, it has {length[:20]}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLargeError(f"the request body may have {limit} bytes, it has more")
    return bytes(body)


def _translate(error: pydantic.ValidationError) -> MalformedError | ValidationError:
    """The first thing that is wrong, as serde would put it for LoRAX: one field, one rule, one value."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return MalformedError(f"the request body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    field = _field(first["loc"])
    if first["type"] == "missing":
        return ValidationError(f"{field} is required")
    expected = _EXPECTED.get(first["type"])
    rule = f"must be {expected}" if expected else first["msg"].removeprefix("Value error, ")
    return ValidationError(f"{field} {rule}. Given: {shown(first['input'])}")


def _field(location: tuple[int | str, ...]) -> str:
    """`messages[1].content`; the `parameters.` in front is left out, as LoRAX does."""
    parts = location[1:] if len(location) > 1 and location[0] == "parameters" else location
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    return f"`{path}`" if path else "the request body"


def shown(value: object) -> str:
    """`value` as JSON, short enough for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
