"""What the API writes into the audit trail: one line per change and per inference, whoever asked and however it ended."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog.testing

from server.errors import GenerationError, OverloadedError
from tests.api.conftest import Make, World
from tests.api.keys import bearer

SECRET = "hello the cat sat"  # a prompt that may stand in no log


@pytest.fixture
async def guarded(make: Make) -> AsyncIterator[World]:
    world = make(require_keys=True)
    yield world
    await world.http.aclose()


@contextmanager
def trail() -> Iterator[list[dict[str, Any]]]:
    """The audit lines that are written meanwhile; no line, of the trail or not, holds the prompt or a key."""
    found: list[dict[str, Any]] = []
    with structlog.testing.capture_logs() as lines:
        yield found
    found += [dict(line) for line in lines if line["event"] == "audit"]
    assert SECRET not in json.dumps(lines, default=str)
    assert "adk_" not in json.dumps(lines, default=str)


async def test_an_inference_leaves_one_line(guarded: World) -> None:
    record = guarded.add("support", tenant="acme")
    acme = guarded.store.add_key("acme", ("infer",))
    headers = {"authorization": f"Bearer {acme.text}", "x-request-id": "my-request"}
    body = {"inputs": SECRET, "adapter_id": "support", "parameters": {"max_new_tokens": 3}}
    with trail() as lines:
        answer = await guarded.http.post("/generate", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-request"
    (line,) = lines
    assert (line["action"], line["outcome"], line["status"], line["request_id"]) == ("generate", "success", 200, "my-request")
    assert (line["tenant"], line["key_id"]) == ("acme", acme.record.id)
    assert (line["adapters"], line["digests"]) == (["support"], [record.digest.short])
    assert (line["prompt_tokens"], line["generated_tokens"], line["runs"]) == (len(guarded.last.prompt), 3, 1)
    assert line["queue_seconds"] == 0.25
    assert guarded.last.id.startswith("my-request."), "the engine's own lines can be found by it"


@pytest.mark.parametrize(
    ("path", "body", "action", "runs"),
    [
        ("/generate_stream", {"inputs": SECRET}, "generate", 1),
        ("/", {"inputs": SECRET}, "generate", 1),
        ("/v1/completions", {"model": "tiny", "prompt": [SECRET, SECRET], "n": 2}, "completion", 4),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": SECRET}]}, "chat", 1),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "stream": True},
            "chat",
            1,
        ),
        ("/embed", {"inputs": [SECRET, SECRET]}, "embed", 2),
        ("/classify", {"inputs": SECRET, "adapter_id": "head"}, "classify", 1),
    ],
)
async def test_every_inference_route_leaves_one_line(world: World, path: str, body: Any, action: str, runs: int) -> None:
    world.add("head", head={"task_type": "SEQ_CLS", "labels": ["a", "b", "c"]})
    with trail() as lines:
        assert (await world.post(path, body)).status_code == 200
    (line,) = lines
    assert (line["action"], line["outcome"], line["runs"]) == (action, "success", runs)
    assert line["prompt_tokens"] > 0


async def test_failures_leave_one_line_too(world: World) -> None:
    with trail() as lines:
        await world.generate(SECRET, temperature=-1)
        await world.generate(SECRET, adapter_id="absent")
        world.engine.refusal = OverloadedError()
        await world.generate(SECRET)
        world.engine.refusal, world.engine.failure, world.engine.failure_after = None, GenerationError("broke"), 1
        await world.generate(SECRET)
        await world.post("/generate_stream", {"inputs": SECRET})
    assert [(line["outcome"], line["status"]) for line in lines] == [
        ("validation", 422),
        ("not_found", 404),
        ("overloaded", 429),
        ("generation", 424),
        ("generation", 200),
    ]


async def test_management_leaves_lines(guarded: World) -> None:
    acme = bearer(guarded, "acme", "infer", "adapters")
    files = [("files", ("adapter_config.json", b"{}", "application/json"))]
    with trail() as lines:
        made = await guarded.http.post("/adapters", data={"adapter_id": "support"}, files=files, headers=acme)
        await guarded.http.post("/adapters/support/load", headers=acme)
        await guarded.http.put("/users/ann", json={"adapter_id": "support"}, headers=acme)
        await guarded.http.get("/users/ann", headers=acme)
        await guarded.http.delete("/users/ann", headers=acme)
        await guarded.http.post("/adapters/support/unload", headers=acme)
        await guarded.http.delete("/adapters/support", headers=acme)
        await guarded.http.delete("/adapters/support", headers=acme)
    digest = [made.json()["digest"][:12]]
    assert [(line["action"], line["outcome"], line.get("adapters"), line.get("digests")) for line in lines] == [
        ("adapter.upload", "success", ["support"], digest),
        ("adapter.load", "success", ["support"], digest),
        ("user.bind", "success", ["support"], None),
        ("user.unbind", "success", None, None),
        ("adapter.unload", "success", ["support"], digest),
        ("adapter.delete", "success", ["support"], digest),
        ("adapter.delete", "not_found", ["support"], None),
    ]
    assert {line["tenant"] for line in lines} == {"acme"}
    assert [line["user"] for line in lines if line["action"].startswith("user.")] == ["ann", "ann"]


async def test_operators_leave_lines_and_no_key(guarded: World) -> None:
    operator = bearer(guarded, "ops", "admin")
    with trail() as lines:
        await guarded.http.put("/admin/tenants/acme", json={}, headers=operator)
        made = await guarded.http.post("/admin/keys", json={"tenant": "acme", "scopes": ["infer", "admin"]}, headers=operator)
        await guarded.http.delete(f"/admin/keys/{made.json()['id']}", headers=operator)
        await guarded.http.delete("/admin/tenants/acme", headers=operator)
    assert [line["action"] for line in lines] == ["tenant.put", "key.create", "key.revoke", "tenant.delete"]
    assert {(line["tenant"], line["subject"], line["outcome"]) for line in lines} == {("ops", "acme", "success")}
    assert lines[1]["scopes"] == "infer+admin"
    assert lines[1]["subject_key"] == lines[2]["subject_key"] == made.json()["id"]


async def test_those_who_were_turned_away_leave_lines(guarded: World) -> None:
    with trail() as lines:
        await guarded.http.delete("/adapters/support")
        await guarded.http.delete("/adapters/support", headers=bearer(guarded, "acme", "infer"))
        await guarded.http.get("/adapters/support")
    assert [(line["action"], line["outcome"], line["tenant"]) for line in lines] == [
        ("adapter.delete", "unauthorized", None),
        ("adapter.delete", "forbidden", "acme"),
    ]


async def test_a_defect_is_opaque_and_its_id_finds_the_log(world: World) -> None:
    world.add("support")
    world.engine.crash = KeyError("inside")
    with structlog.testing.capture_logs() as lines:
        answer = await world.http.post("/adapters/support/load", headers={"x-request-id": "lost"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "lost")
    assert answer.json() == {"error": "internal error; the server's log has it under request id lost", "error_type": "internal"}
    assert {line["event"]: line["request_id"] for line in lines} == {"request failed": "lost", "audit": "lost"}
