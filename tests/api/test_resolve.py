"""Which adapters a request goes through: by parameter, by name of the base model, by user, both; and its newest version."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import PREFIX, World


async def test_adapter_by_parameter_or_at_top_level(world: World) -> None:
    record = world.add("org/support")
    for body in (
        {"inputs": "a", "parameters": {"adapter_id": "org/support"}},
        {"inputs": "a", "adapter_id": "org/support"},
        {"inputs": "a", "adapter_id": "org/support", "parameters": {"adapter_id": "org/support"}},
    ):
        assert (await world.post("/generate", body)).status_code == 200
        assert world.last.adapters == (record.digest,)
        assert world.last.tenant == "default"


async def test_adapter_named_twice_must_agree(world: World) -> None:
    response = await world.post("/generate", {"inputs": "a", "adapter_id": "x", "parameters": {"adapter_id": "y"}})
    assert response.json()["error"] == PREFIX + "`adapter_id` is given twice, with different values"


@pytest.mark.parametrize("adapter_id", ["", "__base_model__", None])
async def test_base_model_by_its_names(world: World, adapter_id: str | None) -> None:
    assert (await world.generate(adapter_id=adapter_id)).status_code == 200
    assert world.last.adapters == ()


@pytest.mark.parametrize("adapter_id", ["nope", "../../etc/passwd", "a b", "x" * 5000, "a\x00b"])
async def test_unknown_adapter_is_404(world: World, adapter_id: str) -> None:
    for path in ("/generate", "/generate_stream"):
        response = await world.post(path, {"inputs": "a", "adapter_id": adapter_id})
        assert response.status_code == 404
        assert response.json()["error_type"] == "not_found"
        assert "does not exist" in response.json()["error"]


async def test_user_goes_through_the_bound_adapter(world: World) -> None:
    mine, other = world.add("mine"), world.add("other")
    world.store.bind_user("default", "alice", "mine")
    await world.post("/generate", {"inputs": "a", "user_id": "alice"})
    assert world.last.adapters == (mine.digest,)
    await world.post("/generate", {"inputs": "a"}, **{"X-User-Id": "alice"})
    assert world.last.adapters == (mine.digest,)
    await world.post("/generate", {"inputs": "a", "user_id": "alice", "adapter_id": "other"})
    assert world.last.adapters == (other.digest,)
    await world.post("/generate", {"inputs": "a", "user_id": "alice", "adapter_id": ""})
    assert world.last.adapters == ()
    await world.post("/generate", {"inputs": "a", "user_id": "nobody we know"})
    assert world.last.adapters == ()


async def test_compose_applies_both(world: World) -> None:
    mine, other = world.add("mine", part="ia3"), world.add("other")
    world.store.bind_user("default", "alice", "mine")
    body: dict[str, Any] = {"inputs": "a", "user_id": "alice", "parameters": {"adapter_id": "other", "compose": True}}
    response = await world.post("/generate", body)
    assert world.last.adapters == (other.digest, mine.digest)
    assert response.headers["x-adapter-id"] == "other,mine"
    body["parameters"]["adapter_id"] = "mine"
    await world.post("/generate", body)
    assert world.last.adapters == (mine.digest,)


async def test_user_of_a_deleted_adapter_gets_404(world: World) -> None:
    world.add("mine")
    world.store.bind_user("default", "alice", "mine")
    world.store.delete("default", "mine")
    assert (await world.post("/generate", {"inputs": "a", "user_id": "alice"})).status_code == 404


async def test_new_version_is_used_by_the_next_request(world: World) -> None:
    first = world.add("support")
    await world.generate(adapter_id="support")
    assert world.last.adapters == (first.digest,)
    with world.store.stage() as staged:
        staged.write("adapter_config.json", [b"another"])
        second, _ = world.store.publish(staged, tenant="default", name="support", method="lora", parts=("lora",), details={})
    await world.generate(adapter_id="support")
    assert world.last.adapters == (second.digest,)
