"""A tenant's limits on one request: 403 before any engine work, on every route, in every dialect's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.auth import caller_of
from server.api.keyring import Principal
from server.errors import OverloadedError
from server.tenancy.policy import TenantPolicy
from server.tenancy.scopes import SCOPES

from .conftest import MODEL, Make, World, events_of

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def under(make: Make) -> Callable[..., World]:
    """A world whose caller has a policy."""

    def build(**policy: Any) -> World:
        world = make()
        principal = Principal("default", frozenset(SCOPES), policy=TenantPolicy(**policy))
        world.app.dependency_overrides[caller_of] = lambda: principal
        return world

    return build


async def post(world: World, path: str, body: dict[str, Any]) -> httpx.Response:
    return await world.post(path, {"model": MODEL, **body} if path.startswith("/v1") else body)


def refusals(world: World) -> dict[str, float]:
    metrics = world.app.state.services.metrics
    (family,) = [family for family in metrics.registry.collect() if family.name == "adapterd_refusals"]
    return {s.labels["limit"]: s.value for s in family.samples if s.name.endswith("_total")}


async def test_the_engine_gets_the_policy(under: Callable[..., World]) -> None:
    world = under(weight=3, max_queued=7)
    await world.generate(max_new_tokens=5)
    assert world.last.policy == TenantPolicy(weight=3, max_queued=7)
    await world.post("/embed", {"inputs": "hello"})
    assert world.last.policy == TenantPolicy(weight=3, max_queued=7)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 11}}),
        ("/generate_stream", {"inputs": "hello", "parameters": {"max_new_tokens": 11}}),
        ("/", {"inputs": "hello", "parameters": {"max_new_tokens": 11}}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 11}),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 11, "stream": True}),
    ],
)
async def test_max_new_tokens(under: Callable[..., World], path: str, body: dict[str, Any]) -> None:
    world = under(max_new_tokens=10)
    response = await post(world, path, body)
    assert response.status_code == 403
    message = "max_new_tokens of this tenant is 10. Given: 11 `max_new_tokens`"
    if path.startswith("/v1"):
        assert response.json() == {"error": {"message": message, "type": "permission_error", "param": None, "code": "quota"}}
    else:
        assert response.json() == {"error": message, "error_type": "quota"}
    assert world.engine.submitted == []
    assert refusals(world) == {"max_new_tokens": 1}


@pytest.mark.parametrize(("policy", "granted"), [({"max_new_tokens": 10}, 10), ({"tokens_per_minute": 20}, 19), ({}, 99)])
async def test_who_names_no_number_gets_what_the_policy_allows(
    under: Callable[..., World], policy: dict[str, int], granted: int
) -> None:
    world = under(**policy)
    assert (await world.generate("hello")).status_code == 200
    assert len(world.last.prompt) == 1
    assert world.last.sampling.max_new_tokens == granted


async def test_openais_default_is_as_much_as_the_policy_allows(under: Callable[..., World]) -> None:
    world = under(max_new_tokens=10)
    assert (await post(world, "/v1/completions", {"prompt": "hello"})).status_code == 200
    assert world.last.sampling.max_new_tokens == 10


@pytest.mark.parametrize(
    ("path", "body", "given"),
    [
        ("/v1/completions", {"prompt": "hello", "n": 3}, "3 `n`"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, "4 `n`"),
        ("/v1/chat/completions", {"messages": CHAT, "n": 3}, "3 `n`"),
        ("/embed", {"inputs": ["a", "b", "c"]}, "3 `inputs`"),
        ("/classify", {"inputs": ["a", "b", "c"]}, "3 `inputs`"),
    ],
)
async def test_max_n(under: Callable[..., World], path: str, body: dict[str, Any], given: str) -> None:
    world = under(max_n=2)
    response = await post(world, path, body)
    assert response.status_code == 403
    assert f"max_n of this tenant is 2. Given: {given}" in response.text
    assert world.engine.submitted == []
    assert refusals(world) == {"max_n": 1}


@pytest.mark.parametrize(
    ("path", "body", "given"),
    [
        ("/v1/completions", {"prompt": "hello", "n": 3, "max_tokens": 4}, 15),
        ("/v1/chat/completions", {"messages": CHAT, "n": 2, "max_tokens": 10}, None),
        ("/embed", {"inputs": ["hello world"] * 8}, 16),
        ("/classify", {"inputs": ["hello world"] * 8}, 16),
    ],
)
async def test_what_one_call_asks_for_must_fit_into_a_minute(
    under: Callable[..., World], path: str, body: dict[str, Any], given: int | None
) -> None:
    world = under(tokens_per_minute=14)
    response = await post(world, path, body)
    assert response.status_code == 403
    assert f"tokens_per_minute of this tenant is 14. Given: {given or ''}" in response.text
    assert world.engine.submitted == []
    assert refusals(world) == {"tokens_per_minute": 1}


async def test_a_count_of_nothing_allows_nothing(under: Callable[..., World]) -> None:
    for policy in ({"max_n": 0}, {"max_new_tokens": 0}):
        world = under(**policy)
        for answer in (await world.generate(), await post(world, "/v1/completions", {"prompt": "hello"})):
            assert answer.status_code == 403
        assert world.engine.submitted == []


async def test_max_stop_sequences(under: Callable[..., World]) -> None:
    world = under(max_stop_sequences=1)
    response = await world.generate(stop=["a", "b"])
    assert (response.status_code, response.json()["error_type"]) == (403, "quota")
    assert response.json()["error"] == "max_stop_sequences of this tenant is 1. Given: 2 `stop` sequences"
    assert (await post(world, "/v1/completions", {"prompt": "x", "stop": ["a", "b"]})).status_code == 403
    assert world.engine.submitted == []
    assert (await world.generate(stop=["a"])).status_code == 200


async def test_the_servers_own_limits_stay_what_they_were(under: Callable[..., World]) -> None:
    world = under(max_stop_sequences=1, max_n=1, max_new_tokens=1)
    assert (await world.generate(stop=list("abcde"))).status_code == 422
    assert (await world.generate(max_new_tokens=1000)).status_code == 422
    assert (await post(world, "/v1/completions", {"prompt": "x", "n": 17})).status_code == 422


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "hello"}),
        ("/generate_stream", {"inputs": "hello"}),
        ("/embed", {"inputs": "hello"}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": CHAT, "stream": True}),
    ],
)
async def test_429_says_when_to_come_back_in_every_dialect(world: World, path: str, body: dict[str, Any]) -> None:
    world.engine.refusal = OverloadedError("tokens_per_minute is 60: 2 tokens are left", 17.0, "tokens_per_minute")
    response = await post(world, path, body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "17")
    assert "tokens_per_minute is 60: 2 tokens are left" in response.text


async def test_waited_too_long_before_the_first_byte_is_a_status(world: World) -> None:
    world.engine.failure = OverloadedError("not begun within queue_timeout of 5 seconds", 9.0, "queue_timeout")
    for path in ("/generate", "/generate_stream"):
        response = await world.post(path, {"inputs": "hello"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "9")


async def test_waited_too_long_behind_an_answer_that_streams_is_an_event(world: World) -> None:
    """The second choice of a request is ended in the queue while the first one streams."""
    world.engine.failure = OverloadedError("not begun within queue_timeout of 5 seconds", 9.0, "queue_timeout")
    world.engine.failure_after = 2
    response = await post(world, "/v1/completions", {"prompt": "hello", "n": 2, "stream": True})
    assert response.status_code == 200
    assert events_of(response)[-1]["error"]["type"] == "rate_limit_error"


async def upload(world: World, name: str, weights: bytes = b"weights", **headers: str) -> httpx.Response:
    files = [("files", ("adapter_config.json", b"{}")), ("files", ("adapter_model.safetensors", weights))]
    return await world.http.post("/adapters", data={"adapter_id": name}, files=files, headers=headers)


async def test_max_adapters(under: Callable[..., World]) -> None:
    world = under(max_adapters=1)
    assert (await upload(world, "a")).status_code == 201
    refused = await upload(world, "b")
    assert (refused.status_code, refused.json()["error_type"]) == (403, "quota")
    assert refused.json()["error"] == "max_adapters is 1: with this upload it would be 2"
    assert (await upload(world, "a", b"other")).status_code == 201
    assert refusals(world) == {"max_adapters": 1}
    assert [record.name for record in world.store.list("default")[0]] == ["a"]


async def test_max_adapter_bytes(under: Callable[..., World]) -> None:
    world = under(max_adapter_bytes=20)
    assert (await upload(world, "a")).status_code == 201
    refused = await upload(world, "a", b"more weights")
    assert refused.status_code == 403
    assert refused.json()["error"] == "max_adapter_bytes is 20: with this upload it would be 23"
    assert (await upload(world, "a")).status_code == 200
    assert (await world.http.delete("/adapters/a")).status_code == 204
    assert (await upload(world, "a", b"more weights")).status_code == 201


async def test_what_cannot_fit_is_refused_before_it_is_received(under: Callable[..., World]) -> None:
    """The form ends in its middle: who had read it would say so."""
    world = under(max_adapter_bytes=20)
    headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str((64 << 10) + 21)}
    refused = await world.http.post("/adapters", content=b"--x\r\n", headers=headers)
    assert (refused.status_code, refused.json()["error_type"]) == (403, "quota")
    assert refused.json()["error"] == "max_adapter_bytes is 20: with this upload it would be 21"
    fits = await world.http.post("/adapters", content=b"--x\r\n", headers={**headers, "content-length": str((64 << 10) + 20)})
    assert fits.status_code == 400


async def test_what_is_shared_counts_against_nobody(under: Callable[..., World]) -> None:
    world = under(max_adapters=0, max_adapter_bytes=0)
    files = [("files", ("adapter_config.json", b"{}"))]
    shared = await world.http.post("/adapters", params={"shared": True}, data={"adapter_id": "a"}, files=files)
    assert shared.status_code == 201
    assert (await upload(world, "a")).status_code == 403
