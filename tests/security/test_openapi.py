"""Schemathesis over the OpenAPI document, with data that fits it and data that does not, against every route of a whole server.

No 5xx, no status and no content type that the document does not name, no body of another shape; and the engine lives on.
Ranges are not in the document (the server words them as LoRAX does), so that data which fits it may be refused is no fault.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks

from server.api.document import api_routes
from tests.e2e.uploads import lora
from tests.house import Caller, House
from tests.process import until

EXAMPLES = int(os.environ.get("ADAPTERD_TEST_EXAMPLES", "12"))  # per operation and kind, in the slow layer
CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]
KINDS = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def house(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """With a short context, as a request may leave its length open."""
    with House(tiny_base, tmp_path_factory.mktemp("openapi"), max_total_tokens=48) as opened:
        yield opened


@pytest.fixture(scope="module")
def caller(house: House) -> Caller:
    """May do everything; its tenant has an adapter and a user by likely names."""
    caller = house.tenant("fuzzed", "infer", "adapters", "admin")
    assert caller.upload("0", lora(1)).status_code == 201
    assert caller.put("/users/0", {"adapter_id": "0"}).status_code == 200
    return caller


@pytest.fixture(scope="module")
def api(house: House) -> BaseSchema:
    """Without its keys: `caller` sends one with every request, and promise 10 is about those that have none."""
    document = copy.deepcopy(house.server.app.openapi())
    del document["components"]["securitySchemes"]
    for operations in document["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return schemathesis.openapi.from_dict(document)


def send(caller: Caller, case: Case) -> None:
    """Ask, and hold the answer against the document."""
    prepared = requests.Request(**case.as_transport_kwargs(base_url="http://testserver")).prepare()
    headers = {
        name: value for name, value in prepared.headers.items() if name.lower() not in ("authorization", "content-length")
    }
    response = caller.ask(
        str(prepared.method), str(prepared.url), content=prepared.body or b"", headers=headers, follow_redirects=False
    )
    case.validate_response(response, checks=CHECKS)


def sender(caller: Caller, sent: Counter[GenerationMode], kind: GenerationMode) -> Callable[[Case], None]:
    """A function of one case, as hypothesis wants it, that counts what it sends."""

    def one(case: Case) -> None:
        sent[kind] += 1
        send(caller, case)

    return one


def attack(api: BaseSchema, caller: Caller, examples: int, *, fixed: bool) -> int:
    """Every operation, both kinds of data. How many cases were sent. Raises: AssertionError with every operation's failures."""
    sent: Counter[GenerationMode] = Counter()
    limits = settings(
        max_examples=examples, derandomize=fixed, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    failures = []
    for found in api.get_all_operations():
        operation: Any = found.ok()
        for kind in KINDS:
            try:
                limits(given(case=operation.as_strategy(generation_mode=kind))(sender(caller, sent, kind)))()
            except Unsatisfiable:  # any text is an id: there is no data that is wrong
                assert kind is GenerationMode.NEGATIVE, operation.label
                assert not operation.body, operation.label
            except (FailureGroup, BaseExceptionGroup) as error:
                failures.append(f"{kind.value} {operation.label}: {error} {getattr(error, 'exceptions', ())}")
    assert not failures, "\n\n".join(failures)
    return sent.total()


def test_a_few_fixed_cases_of_every_operation(api: BaseSchema, caller: Caller, house: House) -> None:
    assert attack(api, caller, 2, fixed=True) > 60
    until(house.idle)
    assert len(caller.tokens(max_new_tokens=4)) == 4


@pytest.mark.slow
def test_many_cases_of_every_operation_positive_and_negative(api: BaseSchema, caller: Caller, house: House) -> None:
    assert attack(api, caller, EXAMPLES, fixed=False) > 60 * EXAMPLES / 3
    until(house.idle)
    assert len(caller.tokens(max_new_tokens=4)) == 4


def test_every_route_is_in_the_document(house: House, api: BaseSchema) -> None:
    """Or nothing here would ever have met it."""
    documented = {found.ok().label for found in api.get_all_operations()}
    routes = [route for route in api_routes(house.server.app.routes) if route.include_in_schema]
    served = {f"{method} {route.path_format}" for route in routes for method in route.methods - {"HEAD"}}
    assert served <= documented
    assert len(served) > 25
