"""The OpenAPI document: every operation says what it answers to a key that is missing or not enough."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.api import schemas
from server.api.document import api_routes
from tests.api.conftest import Make, World


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{verb} {path}": operation for path, verbs in document["paths"].items() for verb, operation in verbs.items()}


@pytest.mark.parametrize("keys", [True, False])
def test_refusals_are_documented_where_there_can_be_any(make: Make, keys: bool) -> None:
    found = operations(make(require_keys=keys).app.openapi())
    public = {"get /health", "get /livez", "get /readyz"}
    assert {name for name, operation in found.items() if "403" not in operation["responses"]} == public
    assert {name for name, operation in found.items() if "401" in operation["responses"]} == (
        set(found) - public if keys else set()
    )
    assert {name for name, operation in found.items() if "security" in operation} == (set(found) - public if keys else set())


def test_the_document_and_the_routes_are_the_same(world: World) -> None:
    """Else a route could be served that no test of the document, and none of the levels, ever sees."""
    served = {
        f"{method.lower()} {route.path_format}"
        for route in api_routes(world.app.routes)
        if route.include_in_schema
        for method in route.methods or ()
    }
    assert served == set(operations(world.app.openapi()))


def test_what_may_be_streamed_says_so(world: World) -> None:
    """Both what it is without `stream` and events; but for the route that only streams, whose events it describes."""
    answers = {name: operation["responses"].get("200", {}) for name, operation in operations(world.app.openapi()).items()}
    kinds = {name: set(answer.get("content", ())) for name, answer in answers.items()}
    streams = ("post /", "post /generate", "post /generate_stream", "post /v1/completions", "post /v1/chat/completions")
    found = {name: kind for name, kind in kinds.items() if "text/event-stream" in kind}
    assert found == {name: {"application/json", "text/event-stream"} for name in streams}


REQUESTS = [
    model
    for model in vars(schemas).values()
    if isinstance(model, type) and issubclass(model, schemas.Strict) and model.model_fields
]


@pytest.mark.parametrize("model", REQUESTS)
def test_where_null_is_taken_the_document_says_so(model: type[schemas.Strict]) -> None:
    document = model.model_json_schema()
    for name, field in model.model_fields.items():
        try:
            model.__pydantic_validator__.validate_assignment(model.model_construct(), field.alias or name, None)
            taken = True
        except ValidationError:
            taken = False
        assert taken == _may_be_null(document["properties"][field.alias or name]), f"{model.__name__}.{name}"


def _may_be_null(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "null" or any(map(_may_be_null, schema.get("anyOf", ())))
