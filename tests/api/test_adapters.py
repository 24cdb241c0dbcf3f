"""/adapters: uploads as they arrive, listing, versions, loading, deleting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.errors import GenerationError

from .conftest import Make, World

BOUNDARY = "frontier"


def part(disposition: str, content: bytes) -> bytes:
    return b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (BOUNDARY.encode(), disposition.encode(), content)


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--%s--\r\n" % BOUNDARY.encode()


async def send(world: World, body: bytes | AsyncIterator[bytes]) -> httpx.Response:
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await world.http.post("/adapters", content=body, headers=headers)


async def upload(world: World, name: str = "support", config: bytes = b"{}", **more: bytes) -> httpx.Response:
    files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", b"weights"))]
    files += [("files", (filename, content)) for filename, content in more.items()]
    return await world.http.post("/adapters", data={"adapter_id": name}, files=files)


def staged_files(world: World) -> list[str]:
    return [path.name for path in world.store._blobs.root.rglob("*") if path.is_file() and "upload" in str(path)]


async def test_upload_creates_a_version(world: World) -> None:
    response = await upload(world)
    assert response.status_code == 201
    body = response.json()
    assert (body["adapter_id"], body["version"], body["method"], body["parts"]) == ("support", 1, "lora", ["lora"])
    assert (body["size_bytes"], body["state"]) == (9, "stored")
    assert body["details"] == {"methods": ["lora"], "virtual_tokens": 0, "rank": 8}
    assert (await world.generate(adapter_id="support")).status_code == 200
    assert world.last.adapters == (body["digest"],)


async def test_upload_of_several_parts(world: World) -> None:
    body = (await upload(world, config=b"virtual 7")).json()
    assert (body["method"], body["parts"]) == ("lora+prefix_tuning", ["lora", "prefix_tuning"])
    await world.generate("a", adapter_id="support")
    assert world.last.sampling.max_new_tokens == 100 - 1 - 7


async def test_files_of_parts_are_kept_under_their_part(world: World) -> None:
    """curl and browsers send such names too; a model card in a part is left out like any other."""
    more = {"lora/adapter_config.json": b"one", "soft/adapter_config.json": b"two", "soft/README.md": b"three"}
    record = (await upload(world, **more)).json()
    stored = world.store.files(record["digest"])
    assert {name: path.read_bytes() for name, path in stored.items() if "/" in name} == {
        "lora/adapter_config.json": b"one",
        "soft/adapter_config.json": b"two",
    }


async def test_same_content_again_changes_nothing(world: World) -> None:
    first = await upload(world)
    again = await upload(world, **{"README.md": b"a model card that differs"})
    assert (again.status_code, again.json()) == (200, first.json())
    other = await upload(world, config=b"{} ")
    assert (other.status_code, other.json()["version"]) == (201, 2)
    assert 'adapterd_uploads_total{outcome="unchanged"} 1.0' in (await world.http.get("/metrics")).text


async def test_fields_may_come_in_any_order_and_in_any_pieces(world: World) -> None:
    body = form(
        part('name="files"; filename="adapter_config.json"', b"{}\r\n--front"),
        part('name="files"; filename="w.safetensors"', bytes(range(256)) * 10),
        part('name="adapter_id"', "org/süß".encode()),
    )

    async def bytewise() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    response = await send(world, bytewise())
    assert response.status_code == 422  # the name is refused by the store, so all else was fine
    assert "adapter_id" in response.json()["error"]
    response = await send(world, body.replace("süß".encode(), b"sweet"))
    assert response.status_code == 201
    files = world.store.files(response.json()["digest"])
    assert files["w.safetensors"].read_bytes() == bytes(range(256)) * 10
    assert files["adapter_config.json"].read_bytes() == b"{}\r\n--front"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (form(part('name="files"; filename="adapter_config.json"', b"{}")), 422, "`adapter_id` is required"),
        (form(part('name="adapter_id"', b"a")), 422, "`files` is required"),
        (form(part('name="adapter_id"', b"a"), part('name="files"', b"x")), 422, "`files` must be files with names"),
        (form(part('name="other"', b"a")), 422, "`other` is not a field of this form"),
        (form(part('name="files"; filename="../x"', b"a")), 422, "`files` a file name must be printable"),
        (form(part('name="files"; filename="lora/.."', b"a")), 422, "`files` a file name must be printable"),
        (form(part('name="files"; filename="/x"', b"a")), 422, "`files` a file name must have 1 to 128 characters"),
        (form(part('name="files"; filename="a/b/x"', b"a")), 422, "`files` a file name must have at most one '/'"),
        (
            form(*[part('name="files"; filename="adapter_config.json"', b"{}")] * 2),
            422,
            "`files` a file name may be used once",
        ),
        (form(*[part('name="adapter_id"', b"a")] * 65), 422, "the form may have 64 parts"),
        (form(part('name="adapter_id"', b"a" * 2000)), 422, "`adapter_id` may have 1024 bytes"),
        (form(part('nome="adapter_id"', b"a")), 400, "a part of the form has no name"),
        (part('name="adapter_id"', b"a"), 400, "the form ends too early"),
        (b"not a form at all", 400, "the body is not a multipart form"),
        (b"", 400, "the form ends too early"),
        (form(part('name="x' + "y" * 10_000 + '"', b"a")), 400, ""),
    ],
)
async def test_forms_that_are_wrong(world: World, body: bytes, status: int, message: str) -> None:
    response = await send(world, body)
    assert response.status_code == status
    assert message in response.json()["error"]
    assert world.store.count() == 0


async def test_body_that_is_no_form(world: World) -> None:
    response = await world.post("/adapters", {"adapter_id": "a"})
    assert response.status_code == 400
    assert "multipart/form-data" in response.json()["error"]


@pytest.mark.parametrize("name", ["tiny", "a/versions", "load", "x/unload", "a b", "../x", "", "x" * 129])
async def test_ids_that_cannot_be_used(world: World, name: str) -> None:
    response = await upload(world, name)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "`adapter_id`" in response.json()["error"]
    assert world.store.count() == 0


async def test_invalid_adapter_names_the_field(world: World) -> None:
    response = await upload(world, config=b"bad")
    assert response.status_code == 422
    assert response.json() == {"error": "r: must be between 1 and 256, got 0", "error_type": "adapter"}
    assert world.store.count() == 0
    assert 'adapterd_uploads_total{outcome="adapter"} 1.0' in (await world.http.get("/metrics")).text


@pytest.mark.parametrize("declared", [True, False])
async def test_upload_over_the_limit_is_cut_off(make: Make, declared: bool) -> None:
    world = make(max_upload_mb=0.01)
    body = form(part('name="adapter_id"', b"a"), part('name="files"; filename="w"', b"x" * 20_000))
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    given: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            given.append(piece)
            yield piece

    response = await send(world, body if declared else chunks())
    assert (response.status_code, response.json()["error_type"]) == (413, "too_large")
    assert len(given) < len(pieces)
    assert world.store.count() == 0


async def test_listing_in_pages(world: World) -> None:
    for name in ("a", "b", "org/c"):
        world.add(name)
    first = (await world.http.get("/adapters", params={"limit": 2})).json()
    second = (await world.http.get("/adapters", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert [item["adapter_id"] for item in first["adapters"] + second["adapters"]] == ["org/c", "b", "a"]
    assert second["next_cursor"] is None


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "cursor=zzz", "limit=99999999999999999999999"])
async def test_bad_pages(world: World, query: str) -> None:
    response = await world.http.get(f"/adapters?{query}")
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


async def test_versions_and_single_records(world: World) -> None:
    await upload(world, "org/a")
    await upload(world, "org/a", config=b"[]")
    listed = (await world.http.get("/adapters/org/a/versions")).json()["adapters"]
    assert [item["version"] for item in listed] == [2, 1]
    assert (await world.http.get("/adapters/org/a")).json() == listed[0]
    assert (await world.http.get("/adapters/org/a?version=1")).json() == listed[1]
    for version, status in (("3", 404), ("0", 422), ("x", 422), ("99999999999999999999", 422)):
        assert (await world.http.get(f"/adapters/org/a?version={version}")).status_code == status


async def test_load_and_unload(world: World) -> None:
    await upload(world, "org/a")
    for _ in range(2):
        loaded = await world.http.post("/adapters/org/a/load")
        assert (loaded.status_code, loaded.json()["state"]) == (200, "resident")
    for _ in range(2):
        dropped = await world.http.post("/adapters/org/a/unload")
        assert (dropped.status_code, dropped.json()["state"]) == (200, "stored")
    assert world.engine.unloads == [(dropped.json()["digest"], False)] * 2


async def test_load_that_fails(world: World) -> None:
    await upload(world, "a")
    world.engine.failure = GenerationError("no room for adapter")
    response = await world.http.post("/adapters/a/load")
    assert (response.status_code, response.json()["error"]) == (424, "no room for adapter")
    assert (await world.http.get("/adapters/a")).json()["state"] == "failed(no room for adapter)"


async def test_delete(world: World) -> None:
    await upload(world, "a")
    digest = (await upload(world, "a", config=b"[]")).json()["digest"]
    await world.http.post("/adapters/a/load")
    assert (await world.http.delete("/adapters/a?version=2")).status_code == 204
    assert digest not in world.engine.resident
    assert world.engine.unloads == [(digest, True)]
    assert (await world.http.get("/adapters/a")).json()["version"] == 1
    assert (await world.http.delete("/adapters/a")).status_code == 204
    assert (await world.http.get("/adapters/a")).status_code == 404
    assert (await world.generate(adapter_id="a")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/adapters/nope"),
        ("DELETE", "/adapters/nope"),
        ("GET", "/adapters/nope/versions"),
        ("POST", "/adapters/nope/load"),
        ("POST", "/adapters/nope/unload"),
    ],
)
async def test_missing_adapters(world: World, method: str, path: str) -> None:
    response = await world.http.request(method, path)
    assert response.status_code == 404
    assert response.json() == {"error": "adapter 'nope' does not exist", "error_type": "not_found"}


async def test_no_uploads_while_draining(world: World) -> None:
    world.readiness.draining()
    assert (await upload(world)).status_code == 503
    assert (await world.http.get("/adapters")).status_code == 200


async def test_users(world: World) -> None:
    await upload(world, "support")
    bound = await world.http.put("/users/org/alice@x", json={"adapter_id": "support"})
    assert bound.status_code == 200
    assert bound.json()["adapter_id"] == "support"
    assert (await world.http.get("/users/org/alice@x")).json() == bound.json()
    assert (await world.http.get("/users")).json() == {"users": [bound.json()], "next_cursor": None}
    assert (await world.http.delete("/users/org/alice@x")).status_code == 204
    missing = await world.http.get("/users/org/alice@x")
    assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")
    assert (await world.http.delete("/users/org/alice@x")).status_code == 404


@pytest.mark.parametrize(
    ("user", "body", "status"),
    [
        ("alice", {"adapter_id": "nope"}, 404),
        ("alice", {"adapter_id": 5}, 422),
        ("alice", {}, 422),
        ("a b", {"adapter_id": "support"}, 422),
    ],
)
async def test_bindings_that_are_refused(world: World, user: str, body: dict[str, Any], status: int) -> None:
    world.add("support")
    assert (await world.http.put(f"/users/{user}", json=body)).status_code == status
    assert (await world.http.get("/users")).json()["users"] == []
