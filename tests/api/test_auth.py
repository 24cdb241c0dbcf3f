"""Who may ask for what: every route's level, refusals, and that a tenant comes from its key alone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from server.api.auth import declared, level_of
from server.api.document import api_routes
from server.tenancy.scopes import SCOPES, Scope
from tests.api.conftest import Make, World
from tests.api.keys import bearer

#: What nobody needs a key for. All but the last two are routes with a mark; these are Starlette's own and hold no data.
PUBLIC = {"/health", "/livez", "/readyz", "/docs", "/openapi.json", "/docs/static"}
UNMARKED = {"/openapi.json", "/docs/static"}

#: What a key of each scope alone may do; the document says "METHOD /path" for everything that is served.
INFER = {
    *("POST /generate", "POST /generate_stream", "POST /", "POST /tokenize", "POST /classify", "POST /embed"),
    *("POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{model}"),
    *("GET /adapters", "GET /adapters/{adapter_id}", "GET /adapters/{adapter_id}/versions"),
    *("GET /users", "GET /users/{user_id}", "GET /info"),
}
ADAPTERS = {
    *("POST /adapters", "DELETE /adapters/{adapter_id}"),
    *("POST /adapters/{adapter_id}/load", "POST /adapters/{adapter_id}/unload"),
    *("PUT /users/{user_id}", "DELETE /users/{user_id}"),
}


@pytest.fixture
async def guarded(make: Make) -> AsyncIterator[World]:
    world = make(require_keys=True)
    yield world
    await world.http.aclose()


def operations(app: FastAPI) -> Iterator[tuple[str, APIRoute]]:
    for route in api_routes(app.routes):
        yield from ((method, route) for method in sorted(route.methods or ()))


def plain(path: str) -> str:
    """ "/adapters/{adapter_id:id}" as the document shows it."""
    return path.replace(":id}", "}")


async def ask(world: World, method: str, route: APIRoute, headers: dict[str, str]) -> httpx.Response:
    path = re.sub(r"\{\w+(:id)?\}", "x", route.path)
    body = b"{" if method in ("POST", "PUT") else b""  # what is wrong with it is nobody's business without a key
    return await world.http.request(method, path, content=body, headers={"content-type": "application/json", **headers})


def test_every_route_declares_its_level(guarded: World) -> None:
    undeclared = [f"{method} {route.path}" for method, route in operations(guarded.app) if not declared(route.endpoint)]
    assert undeclared == []
    others = {
        route.path for route in guarded.app.routes if isinstance(route, Mount | Route) and not isinstance(route, APIRoute)
    }
    assert others == UNMARKED
    public = {route.path for _, route in operations(guarded.app) if level_of(route.endpoint).public}
    assert public | others == PUBLIC


def test_the_levels_are_these(guarded: World) -> None:
    found: dict[Scope, set[str]] = {scope: set() for scope in SCOPES}
    for method, route in operations(guarded.app):
        for scope in level_of(route.endpoint).scopes:
            found[scope].add(f"{method} {plain(route.path)}")
    assert found["infer"] == INFER
    assert found["adapters"] == ADAPTERS
    unnamed = found["admin"] - ADAPTERS  # of those, admin may do what is shared
    assert unnamed, "the rest is for operators"
    assert all(re.search(r" /(admin/|debug/|metrics|store)", operation) for operation in unnamed), unnamed


async def test_every_route_keeps_its_level(guarded: World) -> None:
    """No key, the key of every wrong scope, of all wrong scopes together, and of a right one, at every route."""
    checked = 0
    for method, route in operations(guarded.app):
        level, where = level_of(route.endpoint), f"{method} {route.path}"
        bare = await ask(guarded, method, route, {})
        if level.public:
            assert bare.status_code not in (401, 403), where
            continue
        assert bare.status_code == 401, where
        assert bare.headers["www-authenticate"] == "Bearer", where
        wrong = [scope for scope in SCOPES if scope not in level.scopes]
        for scopes in ([scope] for scope in wrong) if len(wrong) < 2 else ([wrong[0]], [wrong[1]], wrong):
            refused = await ask(guarded, method, route, bearer(guarded, "acme", *scopes))
            assert refused.status_code == 403, (where, scopes)
        right = "adapters" if "adapters" in level.scopes else level.scopes[0]
        allowed = await ask(guarded, method, route, bearer(guarded, "acme", right))
        assert allowed.status_code not in (401, 403), (where, allowed.text)
        checked += 1
    assert checked >= len(INFER) + len(ADAPTERS)
    assert guarded.engine.submitted == []


@pytest.mark.parametrize("path", sorted(PUBLIC))
async def test_what_is_public_answers_without_a_key(guarded: World, path: str) -> None:
    shown = await guarded.http.get(f"{path}/swagger-ui.css" if path == "/docs/static" else path)
    assert shown.status_code == 200


async def test_a_route_that_nobody_marked_is_for_operators(guarded: World) -> None:
    async def forgotten() -> str:
        return "secret"

    guarded.app.add_api_route("/forgotten", forgotten)
    assert (await guarded.http.get("/forgotten")).status_code == 401
    assert (await guarded.http.get("/forgotten", headers=bearer(guarded, "acme", "infer", "adapters"))).status_code == 403
    assert (await guarded.http.get("/forgotten", headers=bearer(guarded, "acme", "admin"))).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer x{key}", "Token {key}"]
)
async def test_what_is_no_bearer_key(guarded: World, header: str) -> None:
    key = guarded.store.add_key("acme", ("infer",)).text
    refused = await guarded.http.get("/adapters", headers={"authorization": header.format(key=key)})
    assert refused.status_code == 401
    assert refused.json()["error_type"] == "unauthorized"
    assert key not in refused.text


async def test_two_keys_are_none(guarded: World) -> None:
    """A proxy and a server that each took another one of them would disagree about the tenant."""
    keys = [("authorization", f"Bearer {guarded.store.add_key(tenant, ('infer',)).text}") for tenant in ("acme", "zeta")]
    assert (await guarded.http.get("/adapters", headers=keys)).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_is_spelled_as_one_likes(guarded: World, scheme: str) -> None:
    key = guarded.store.add_key("acme", ("infer",)).text
    assert (await guarded.http.get("/adapters", headers={"authorization": f"{scheme} {key}"})).status_code == 200


async def test_unknown_and_revoked_keys_read_the_same(guarded: World) -> None:
    unknown, revoked = (guarded.store.add_key("acme", ("infer",)) for _ in range(2))
    guarded.store.revoke_key(revoked.record.id)
    said = [
        await guarded.http.get("/adapters", headers={"authorization": f"Bearer {text}", "x-request-id": "r"})
        for text in (unknown.text[:-1] + ("0" if unknown.text[-1] != "0" else "1"), revoked.text, "nonsense")
    ]
    assert {(answer.status_code, answer.text) for answer in said} == {
        (401, '{"error":"the API key is not valid","error_type":"unauthorized"}')
    }


async def test_openai_clients_are_refused_in_their_own_words(guarded: World) -> None:
    bare = (await guarded.http.get("/v1/models")).json()["error"]
    assert (bare["type"], bare["code"], bare["param"]) == ("authentication_error", "invalid_api_key", None)
    wrong = (await guarded.http.get("/v1/models", headers=bearer(guarded, "acme", "adapters"))).json()["error"]
    assert (wrong["type"], wrong["code"]) == ("permission_error", "forbidden")
    assert "scope infer" in wrong["message"]


async def test_the_tenant_comes_from_the_key_alone(guarded: World) -> None:
    """Nothing else in a request, under no name a gateway might use, moves it to another tenant."""
    guarded.add("secret", tenant="zeta")
    acme = bearer(guarded, "acme", "infer", "adapters", "admin")
    claims = dict.fromkeys(
        ("x-tenant", "tenant", "x-tenant-id", "x-forwarded-user", "openai-organization", "x-user-id"), "zeta"
    )
    claims["cookie"] = "tenant=zeta"
    bodies = [
        {"inputs": "hello", "adapter_id": "secret", "tenant": "zeta", "parameters": {"tenant": "zeta"}},
        {"inputs": "hello", "adapter_id": "zeta/secret"},
        {"inputs": "hello", "adapter_id": "secret", "user_id": "zeta"},
    ]
    for body in bodies:
        refused = await guarded.http.post("/generate?tenant=zeta", json=body, headers={**acme, **claims})
        assert refused.status_code == 404, body
    assert (await guarded.http.get("/adapters?tenant=zeta", headers={**acme, **claims})).json()["adapters"] == []
    assert guarded.engine.submitted == []


async def test_a_foreign_and_a_missing_adapter_answer_alike_everywhere(guarded: World) -> None:
    guarded.add("secret", tenant="zeta")
    acme = {**bearer(guarded, "acme", "infer", "adapters"), "x-request-id": "r"}
    for method, path in (
        ("GET", "/adapters/{}"),
        ("GET", "/adapters/{}/versions"),
        ("GET", "/adapters/{}?version=1"),
        ("DELETE", "/adapters/{}"),
        ("POST", "/adapters/{}/load"),
        ("POST", "/adapters/{}/unload"),
        ("GET", "/v1/models/{}"),
    ):
        foreign, missing = [
            await guarded.http.request(method, path.format(name), headers=acme) for name in ("secret", "absent")
        ]
        assert foreign.status_code == missing.status_code == 404, path
        assert foreign.text.replace("secret", "absent") == missing.text
        ignored = {"date", "content-length"}
        assert {k: v for k, v in foreign.headers.items() if k not in ignored} == {
            k: v for k, v in missing.headers.items() if k not in ignored
        }
    bound = [await guarded.http.put("/users/ann", json={"adapter_id": name}, headers=acme) for name in ("secret", "absent")]
    assert [answer.status_code for answer in bound] == [404, 404]
    assert bound[0].text.replace("secret", "absent") == bound[1].text


async def test_a_request_carries_its_tenant_and_policy_into_the_engine(guarded: World) -> None:
    guarded.store.put_tenant("acme", {"weight": 2.5, "max_running": 3})
    acme = bearer(guarded, "acme", "infer")
    for path, body in (
        ("/generate", {"inputs": "hello"}),
        ("/v1/completions", {"model": "tiny", "prompt": "hello"}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}),
        ("/embed", {"inputs": "hello"}),
    ):
        assert (await guarded.http.post(path, json=body, headers=acme)).status_code == 200, path
        assert (guarded.last.tenant, guarded.last.policy.weight, guarded.last.policy.max_running) == ("acme", 2.5, 3), path


async def test_a_policy_of_another_release_is_not_guessed(guarded: World) -> None:
    guarded.store.put_tenant("acme", {"max_dreams": 1})
    refused = await guarded.http.get("/adapters", headers=bearer(guarded, "acme", "infer"))
    assert refused.status_code == 503


async def test_without_keys_everybody_is_the_default_tenant_with_every_scope(world: World) -> None:
    world.store.put_tenant("default", {"weight": 9})
    assert (await world.generate()).status_code == 200
    assert (world.last.tenant, world.last.policy.weight) == ("default", 1.0)
    assert (await world.http.get("/admin/tenants", headers={"authorization": "Bearer nonsense"})).status_code == 200


async def test_a_key_that_was_revoked_while_it_uploaded_publishes_nothing(
    guarded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarded.store.add_key("acme", ("adapters",))
    monkeypatch.setattr("server.api.keyring.TTL", 0.0)

    async def body() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="adapter_id"\r\n\r\nsupport\r\n'
        guarded.store.revoke_key(made.record.id)
        yield b'--b\r\ncontent-disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n{}\r\n--b--\r\n'

    headers = {"authorization": f"Bearer {made.text}", "content-type": "multipart/form-data; boundary=b"}
    assert (await guarded.http.post("/adapters", content=body(), headers=headers)).status_code == 401
    assert guarded.store.count("acme") == 0
