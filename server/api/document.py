"""The OpenAPI document: FastAPI's, and in it what FastAPI cannot know. Serves nothing.

Bodies that the routes read themselves, and what every route answers to a key that is missing or not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from .auth import level_of

_SCHEME = "key"


def api_routes(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    """FastAPI's own among `routes`; newer releases of it keep an included router as one route, older ones copy its routes."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from api_routes(included.routes)


def document_of(app: FastAPI, bodies: Sequence[type[BaseModel]], *, keys: bool) -> dict[str, Any]:
    """`keys`: whether this server asks for them."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema([(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}")
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])
    if keys:
        components["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
    for route in api_routes(app.routes):
        if route.include_in_schema and not level_of(route.endpoint).public:
            for method in route.methods or ():
                _guard(document["paths"][route.path_format][method.lower()], route.path_format, keys=keys)
    return document


def _guard(operation: dict[str, Any], path: str, *, keys: bool) -> None:
    responses = operation.setdefault("responses", {})
    responses.setdefault("403", _refusal("What the key's scopes or the tenant's quotas do not allow", path))
    if keys:
        responses.setdefault("401", _refusal("No key, or one that is not valid", path))
        operation["security"] = [{_SCHEME: []}]


def _refusal(description: str, path: str) -> Mapping[str, Any]:
    name = "OpenAIErrorResponse" if path.startswith("/v1/") else "ErrorResponse"
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}
