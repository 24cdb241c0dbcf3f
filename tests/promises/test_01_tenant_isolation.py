"""Promise 1: an adapter is usable, visible and deletable only by its tenant, or usable by all if an operator shared it.
A foreign id and a missing id get the same answer.

In any order of events: `tests/security/test_isolation.py`. In the store: `tests/adapters_store/test_isolation.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller

#: (method, path, body) of everything that can name an adapter; NAME stands for it.
WAYS: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/adapters/NAME", None),
    ("GET", "/adapters/NAME?version=1", None),
    ("GET", "/adapters/NAME/versions", None),
    ("POST", "/adapters/NAME/load", None),
    ("POST", "/adapters/NAME/unload", None),
    ("DELETE", "/adapters/NAME", None),
    ("DELETE", "/adapters/NAME?version=1", None),
    ("GET", "/v1/models/NAME", None),
    ("PUT", "/users/ann", {"adapter_id": "NAME"}),
    ("POST", "/generate", {"inputs": "hello", "parameters": {"adapter_id": "NAME"}}),
    ("POST", "/generate_stream", {"inputs": "hello", "adapter_id": "NAME"}),
    ("POST", "/", {"inputs": "hello", "parameters": {"merged_adapters": {"ids": ["NAME", "NAME"], "weights": [1, 1]}}}),
    ("POST", "/classify", {"inputs": "hello", "adapter_id": "NAME"}),
    ("POST", "/embed", {"inputs": "hello", "adapter_id": "NAME"}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "hello"}),
    ("POST", "/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "hello"}]}),
)


def named(value: Any, name: str) -> Any:
    """`value` with NAME replaced, all the way down."""
    if isinstance(value, dict):
        return {key: named(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item, name) for item in value]
    return value.replace("NAME", name) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def _uploaded(acme: Caller) -> None:
    assert acme.upload("acmes-own", lora(1)).status_code == 201
    assert acme.put("/users/acmes-ann", {"adapter_id": "acmes-own"}).status_code == 200


@pytest.mark.usefixtures("_uploaded")
@pytest.mark.parametrize(("method", "path", "body"), WAYS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_foreign_adapter_is_answered_exactly_like_one_that_was_never_there(
    acme: Caller, zeta: Caller, method: str, path: str, body: Any
) -> None:
    """Status, headers but for the request's own id, and body; nothing happens to the adapter."""
    foreign = zeta.ask(method, named(path, "acmes-own"), json=named(body, "acmes-own"))
    missing = zeta.ask(method, named(path, "never-here"), json=named(body, "never-here"))
    assert foreign.status_code == missing.status_code == 404
    assert foreign.text.replace("acmes-own", "never-here") == missing.text
    varying = {"x-request-id", "content-length"}
    assert {k: v for k, v in foreign.headers.items() if k not in varying} == {
        k: v for k, v in missing.headers.items() if k not in varying
    }
    assert acme.get("/adapters/acmes-own").status_code == 200


@pytest.mark.usefixtures("_uploaded")
def test_listings_show_a_tenant_its_own_adapters_and_users_only(acme: Caller, zeta: Caller) -> None:
    assert "acmes-own" in acme.get("/adapters").text
    for path in ("/adapters", "/v1/models", "/users", "/adapters?limit=1000"):
        assert "acmes-" not in zeta.get(path).text
    assert zeta.get("/users/acmes-ann").status_code == 404


@pytest.mark.usefixtures("_uploaded")
def test_equal_names_of_two_tenants_are_two_adapters(acme: Caller, zeta: Caller) -> None:
    before = acme.tokens("acmes-own")
    assert zeta.upload("acmes-own", lora(2)).status_code == 201
    assert acme.tokens("acmes-own") == before != zeta.tokens("acmes-own")
    assert zeta.delete("/adapters/acmes-own").status_code == 204
    assert acme.tokens("acmes-own") == before


def test_a_shared_adapter_is_usable_by_all_and_changed_by_the_operator_alone(
    acme: Caller, zeta: Caller, operator: Caller
) -> None:
    files = lora(7)
    assert acme.upload("common", files, params={"shared": "true"}).status_code == 403
    assert operator.upload("common", files, params={"shared": "true"}).status_code == 201
    assert acme.tokens("common") == zeta.tokens("common") != acme.tokens()
    assert acme.delete("/adapters/common").status_code == 403
    assert acme.delete("/adapters/common", params={"shared": "true"}).status_code == 403
    assert zeta.upload("common", lora(8)).status_code == 201
    assert zeta.tokens("common") != acme.tokens("common")
    assert zeta.delete("/adapters/common").status_code == 204
    assert zeta.tokens("common") == acme.tokens("common")
    assert operator.delete("/adapters/common", params={"shared": "true"}).status_code == 204
    assert acme.generate(adapter="common").status_code == 404
