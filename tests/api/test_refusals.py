"""What /generate refuses, in whose words, and how what fails is answered: parameters, bodies, limits, time, defects."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from server.errors import GenerationError, OverloadedError

from .conftest import PREFIX, Make, World

TOTAL = "`inputs` tokens + `max_new_tokens` must be <= 100. "


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -0.1}, "`temperature` must be non-negative"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"top_p": 1.1}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"max_new_tokens": 100}, TOTAL + "Given: 1 `inputs` tokens and 100 `max_new_tokens`"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` sequences cannot be empty"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 100. Given: 0"),
        ({"truncate": 100}, "`truncate` must be strictly positive and less than 100. Given: 100"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64. Given: -1"),
        ({"seed": 2**64}, f"`seed` must be >= 0 and < 2^64. Given: {2**64}"),
        ({"best_of": 2}, "`best_of` must be > 0 and <= 1. Given: 2"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 1. Given: 0"),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
        ({"return_k_alternatives": 21}, "`return_k_alternatives` must be >= 0 and <= 20. Given: 21"),
        ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 20. Given: -1"),
        ({"watermark": True}, "`watermark` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"grammar": {"type": "json", "value": "{}"}}, "`grammar` is not supported"),
        ({"adapter_source": "hub"}, "`adapter_source` is not supported"),
        ({"temperature": "0.5"}, '`temperature` must be a number. Given: "0.5"'),
        ({"temperature": True}, "`temperature` must be a number. Given: true"),
        ({"top_k": 1.5}, "`top_k` must be an integer. Given: 1.5"),
        ({"top_k": True}, "`top_k` must be an integer. Given: true"),
        ({"do_sample": 1}, "`do_sample` must be a boolean. Given: 1"),
        ({"stop": "a"}, '`stop` must be a list. Given: "a"'),
        ({"stop": [1]}, "`stop[0]` must be a string. Given: 1"),
        ({"adapter_id": 5}, "`adapter_id` must be a string. Given: 5"),
    ],
)
async def test_parameters_out_of_range(world: World, parameters: dict[str, Any], message: str) -> None:
    response = await world.generate("a", **parameters)
    assert response.status_code == 422
    assert response.json() == {"error": PREFIX + message, "error_type": "validation"}
    assert world.engine.submitted == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"inputs": ""}', 422, PREFIX + "`inputs` cannot be empty"),
        (b"{}", 422, PREFIX + "`inputs` is required"),
        (b'{"inputs": 5}', 422, PREFIX + "`inputs` must be a string. Given: 5"),
        (b'{"inputs": "a", "parameters": []}', 422, PREFIX + "`parameters` must be an object. Given: []"),
        (b'{"inputs": "a", "stream": "yes"}', 422, PREFIX + '`stream` must be a boolean. Given: "yes"'),
        (b"[]", 422, PREFIX + "the request body must be an object. Given: []"),
        (b'{"inputs": "a"', 400, "the request body is not JSON: EOF while parsing an object at line 1 column 14"),
        (b"", 400, "the request body is not JSON: EOF while parsing a value at line 1 column 0"),
        (b'{"inputs": "\xff"}', 400, "the request body is not JSON: "),
        (b"[" * 10_000, 400, "the request body is not JSON: recursion limit exceeded"),
        (b'{"inputs": "a\\ud800"}', 400, "the request body is not JSON: "),
        (
            b'{"inputs": "a", "parameters": {"temperature": 1e999}}',
            422,
            PREFIX + "`temperature` must be a finite number. Given: Infinity",
        ),
    ],
)
async def test_bodies_that_are_no_request(world: World, body: bytes, status: int, message: str) -> None:
    response = await world.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"].startswith(message)
    assert response.json()["error_type"] == "validation"


async def test_body_must_be_declared_as_json(world: World) -> None:
    response = await world.http.post("/generate", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]


@pytest.mark.parametrize("declared", [True, False])
async def test_body_over_the_limit(make: Make, declared: bool) -> None:
    world = make(max_request_mb=0.01)

    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 1000

    content = b"x" * 20_000 if declared else chunks()
    response = await world.http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error_type"]) == (413, "too_large")


async def test_prompt_longer_than_the_context(world: World) -> None:
    response = await world.post("/generate", {"inputs": "z" * 1_000_000})
    assert response.status_code == 422
    assert response.json()["error"] == PREFIX + "`inputs` must have less than 100 tokens. Given: 1000000"


async def test_virtual_tokens_take_room(world: World) -> None:
    world.add("soft", virtual=60)
    response = await world.generate("a", adapter_id="soft", max_new_tokens=40)
    expected = TOTAL + "Given: 61 `inputs` tokens (60 of them are its adapter's) and 40 `max_new_tokens`"
    assert response.json()["error"] == PREFIX + expected
    assert (await world.generate("a", adapter_id="soft", max_new_tokens=39)).status_code == 200
    await world.generate("a", adapter_id="soft")
    assert world.last.sampling.max_new_tokens == 39


async def test_overloaded_is_429_with_retry_after(world: World) -> None:
    world.engine.refusal = OverloadedError(retry_after=2.5)
    for path in ("/generate", "/generate_stream"):
        response = await world.post(path, {"inputs": "a"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


async def test_not_ready_is_503(world: World) -> None:
    for phase in (lambda: world.readiness.loading(40), world.readiness.draining):
        phase()
        response = await world.generate()
        assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")


async def test_failed_generation_is_424(world: World) -> None:
    world.engine.failure, world.engine.failure_after = GenerationError("the adapter cannot be loaded"), 2
    response = await world.generate()
    assert response.status_code == 424
    assert response.json() == {"error": "the adapter cannot be loaded", "error_type": "generation"}


async def test_request_that_takes_too_long_is_ended_and_cancelled(make: Make) -> None:
    world = make(request_timeout=0.05)
    world.engine.silent = True
    response = await world.generate()
    assert response.status_code == 424
    assert response.json()["error"] == "the request took longer than 0.05 seconds"
    assert world.engine.cancelled == [world.last.id]


async def test_bug_is_an_opaque_500(world: World) -> None:
    record = world.add("support")
    world.engine.crash = bug = RuntimeError("secret path /etc")
    with capture_logs() as logs:
        response = await world.http.get(f"/adapters/{record.name}", headers={"X-Request-Id": "r-1"})
    assert [(line["request_id"], line["exc_info"]) for line in logs] == [("r-1", bug)]
    assert response.status_code == 500
    assert response.json() == {
        "error": "internal error; the server's log has it under request id r-1",
        "error_type": "internal",
    }


async def test_unknown_routes_and_methods(world: World) -> None:
    missing = await world.http.get("/nowhere")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found", "error_type": "not_found"})
    wrong = await world.http.get("/generate")
    assert (wrong.status_code, wrong.json()["error_type"]) == (405, "method_not_allowed")
