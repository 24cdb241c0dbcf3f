"""/admin: tenants, policies and keys over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.api.conftest import Make, World
from tests.api.keys import bearer


@pytest.fixture
async def guarded(make: Make) -> AsyncIterator[World]:
    world = make(require_keys=True)
    world.http.headers.update(bearer(world, "operator", "admin"))
    yield world
    await world.http.aclose()


async def test_a_tenants_life(guarded: World) -> None:
    put = await guarded.http.put("/admin/tenants/acme", json={"weight": 2, "max_slots": 4})
    assert put.status_code == 200
    assert (put.json()["name"], put.json()["policy"]) == ("acme", {"weight": 2.0, "max_slots": 4})
    assert (await guarded.http.get("/admin/tenants/acme")).json() == put.json()
    again = await guarded.http.put("/admin/tenants/acme", json={"max_n": 1})
    assert again.json()["policy"] == {"max_n": 1}, "a PUT is the whole of it"
    listed = (await guarded.http.get("/admin/tenants")).json()["tenants"]
    assert [tenant["name"] for tenant in listed] == ["acme", "operator"]
    assert (await guarded.http.delete("/admin/tenants/acme")).status_code == 204
    assert (await guarded.http.get("/admin/tenants/acme")).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": "2"}, "weight"),
        ({"max_slots": -1}, "max_slots"),
        ({"max_slots": True}, "max_slots"),
        ({"max_slots": 1.5}, "max_slots"),
        ({"max_dreams": 1}, "max_dreams"),
        ([], "the request body"),
    ],
)
async def test_a_policy_that_is_refused_names_the_field(guarded: World, body: object, field: str) -> None:
    refused = await guarded.http.put("/admin/tenants/acme", json=body)
    assert refused.status_code == 422
    assert field in refused.json()["error"]
    assert (await guarded.http.get("/admin/tenants/acme")).status_code == 404


@pytest.mark.parametrize("name", ["shared", "a b", "x" * 129])
async def test_names_that_no_tenant_can_have(guarded: World, name: str) -> None:
    assert (await guarded.http.put(f"/admin/tenants/{name}", json={})).status_code == 422
    assert (await guarded.http.post("/admin/keys", json={"tenant": name, "scopes": ["infer"]})).status_code == 422


async def test_deleting_a_tenant_with_adapters_takes_a_word(guarded: World) -> None:
    record = guarded.add("support", tenant="acme")
    guarded.engine.resident[record.digest] = ("resident", None)
    acme = bearer(guarded, "acme", "infer")
    assert (await guarded.http.delete("/admin/tenants/acme")).status_code == 409
    assert (await guarded.http.get("/adapters/support", headers=acme)).status_code == 200
    assert (await guarded.http.delete("/admin/tenants/acme?adapters=true")).status_code == 204
    assert (await guarded.http.get("/adapters/support", headers=acme)).status_code == 401, "here at once"
    assert guarded.engine.resident == {}
    assert guarded.engine.unloads == [(record.digest, True)]


async def test_a_keys_life(guarded: World) -> None:
    made = await guarded.http.post("/admin/keys", json={"tenant": "acme", "scopes": ["infer"], "note": "ci"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    text = made.json()["key"]
    acme = {"authorization": f"Bearer {text}"}
    assert (await guarded.http.get("/adapters", headers=acme)).status_code == 200
    listed = await guarded.http.get("/admin/keys?tenant=acme")
    assert text not in listed.text
    assert [key["note"] for key in listed.json()["keys"]] == ["ci"]
    revoked = await guarded.http.delete(f"/admin/keys/{made.json()['id']}")
    assert revoked.json()["revoked_at"] is not None
    assert (await guarded.http.get("/adapters", headers=acme)).status_code == 401, "here at once"
    assert (await guarded.http.delete("/admin/keys/nonsense")).status_code == 404


@pytest.mark.parametrize("scopes", [["infer", "fly"], [], "infer", None, [1]])
async def test_scopes_that_there_are_not(guarded: World, scopes: object) -> None:
    refused = await guarded.http.post("/admin/keys", json={"tenant": "acme", "scopes": scopes})
    assert refused.status_code == 422
    assert "scopes" in refused.json()["error"]


async def test_a_new_policy_counts_from_the_next_request(guarded: World) -> None:
    acme = bearer(guarded, "acme", "infer")
    await guarded.http.post("/generate", json={"inputs": "hello"}, headers=acme)
    assert guarded.last.policy.weight == 1
    await guarded.http.put("/admin/tenants/acme", json={"weight": 7})
    await guarded.http.post("/generate", json={"inputs": "hello"}, headers=acme)
    assert guarded.last.policy.weight == 7
