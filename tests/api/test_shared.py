"""Adapters that an operator shares: everybody's to use, nobody's to change but an operator's."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from adapters_store.names import SHARED
from tests.api.conftest import Make, World
from tests.api.keys import bearer


@pytest.fixture
async def guarded(make: Make) -> AsyncIterator[World]:
    world = make(require_keys=True)
    yield world
    await world.http.aclose()


async def upload(world: World, name: str, headers: dict[str, str], *, shared: str | None) -> httpx.Response:
    files = [("files", ("adapter_config.json", name.encode(), "application/json"))]
    params = {} if shared is None else {"shared": shared}
    return await world.http.post("/adapters", params=params, data={"adapter_id": name}, files=files, headers=headers)


async def test_an_operator_shares_and_everybody_uses(guarded: World) -> None:
    operator, acme = bearer(guarded, "ops", "admin"), bearer(guarded, "acme", "infer", "adapters")
    made = await upload(guarded, "polite", operator, shared="true")
    assert (made.status_code, made.json()["shared"]) == (201, True)
    own = await upload(guarded, "mine", acme, shared=None)
    assert own.json()["shared"] is False
    listed = (await guarded.http.get("/adapters", headers=acme)).json()["adapters"]
    assert [(adapter["adapter_id"], adapter["shared"]) for adapter in listed] == [("mine", False), ("polite", True)]
    models = (await guarded.http.get("/v1/models", headers=acme)).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "mine", "polite"]
    for path in ("/adapters/polite", "/v1/models/polite", "/adapters/polite/versions"):
        assert (await guarded.http.get(path, headers=acme)).status_code == 200, path
    answer = await guarded.http.post("/generate", json={"inputs": "hello", "adapter_id": "polite"}, headers=acme)
    assert answer.status_code == 200
    assert (guarded.last.tenant, guarded.last.adapters) == ("acme", (made.json()["digest"],))


@pytest.mark.parametrize("shared", ["true", "1", "on", "yes", "True", "TRUE"])
async def test_sharing_takes_scope_admin_however_it_is_spelled(guarded: World, shared: str) -> None:
    refused = await upload(guarded, "polite", bearer(guarded, "acme", "infer", "adapters"), shared=shared)
    assert refused.status_code == 403
    assert guarded.store.count() == 0


async def test_an_operators_key_alone_uploads_nothing_of_its_tenants_own(guarded: World) -> None:
    assert (await upload(guarded, "polite", bearer(guarded, "ops", "admin"), shared=None)).status_code == 403
    assert guarded.store.count() == 0


async def test_an_own_adapter_comes_first(guarded: World) -> None:
    guarded.add("polite", tenant=SHARED)
    own = guarded.add("polite", tenant="acme", rank=3)
    acme = bearer(guarded, "acme", "infer")
    await guarded.http.post("/generate", json={"inputs": "hello", "adapter_id": "polite"}, headers=acme)
    assert guarded.last.adapters == (own.digest,)


async def test_a_user_bound_to_a_shared_adapter(guarded: World) -> None:
    shared = guarded.add("polite", tenant=SHARED)
    acme = bearer(guarded, "acme", "infer", "adapters")
    assert (await guarded.http.put("/users/ann", json={"adapter_id": "polite"}, headers=acme)).status_code == 200
    await guarded.http.post("/generate", json={"inputs": "hello", "user_id": "ann"}, headers=acme)
    assert guarded.last.adapters == (shared.digest,)


async def test_only_an_operator_changes_a_shared_adapter(guarded: World) -> None:
    shared = guarded.add("polite", tenant=SHARED)
    acme, operator = bearer(guarded, "acme", "infer", "adapters"), bearer(guarded, "ops", "admin")
    assert (await guarded.http.post("/adapters/polite/load", headers=acme)).status_code == 200, "as a request would"
    for method, path in (
        ("DELETE", "/adapters/polite"),
        ("POST", "/adapters/polite/unload"),
        ("DELETE", "/adapters/polite?version=1"),
    ):
        refused = await guarded.http.request(method, path, headers=acme)
        assert refused.status_code == 403, path
        assert "shared=true" in refused.json()["error"]
    assert guarded.engine.resident[shared.digest] == ("resident", None)
    assert (await guarded.http.post("/adapters/polite/unload?shared=true", headers=operator)).status_code == 200
    assert (await guarded.http.delete("/adapters/polite?shared=true", headers=operator)).status_code == 204
    assert (await guarded.http.get("/adapters/polite", headers=acme)).status_code == 404


async def test_a_tenants_own_adapter_is_not_an_operators_to_delete_as_shared(guarded: World) -> None:
    guarded.add("mine", tenant="acme")
    operator = bearer(guarded, "ops", "admin", "adapters")
    assert (await guarded.http.delete("/adapters/mine?shared=true", headers=operator)).status_code == 404
    assert guarded.store.count("acme") == 1


async def test_a_shared_adapter_counts_against_nobodys_quota(guarded: World) -> None:
    guarded.store.put_tenant("ops", {"max_adapters": 0})
    operator = bearer(guarded, "ops", "admin", "adapters")
    assert (await upload(guarded, "polite", operator, shared="true")).status_code == 201
    assert (await upload(guarded, "mine", operator, shared=None)).status_code == 403
