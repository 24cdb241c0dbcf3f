"""Uploads that go wrong on the way: cut off by what they hold, or met by a full or failing disk. All else goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import httpx
import pytest
from anyio import create_task_group

from adapters_store import disk
from adapters_store.digest import Digest
from adapters_store.errors import Unavailable
from adapters_store.records import JSON
from server.api.app import create_app
from server.api.context import Validate
from server.checkpoints.incoming import inspector
from server.engine.mailbox import Mailbox
from server.metrics import Metrics
from server.settings import Settings

from .conftest import World
from .fakes import validate

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


async def upload(http: httpx.AsyncClient, name: str = "support", **more: bytes) -> httpx.Response:
    parts = [("files", pair) for pair in (FILES | more).items()]
    return await http.post("/adapters", data={"adapter_id": name}, files=parts)


def app_of(world: World, check: Validate = validate, tenant: str = "default") -> httpx.AsyncClient:
    """The world's store and engine behind an app that looks into files while they arrive, as the server's does."""
    app = create_app(
        engine=world.engine,
        mailbox=Mailbox(),
        text=world.text,
        store=world.store,
        metrics=Metrics("tiny", top_k=2),
        settings=Settings(),
        validate=check,
        inspect=inspector,
        model_name="tiny",
        tenant=tenant,
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def staged(tmp_path: Path) -> list[Path]:
    """Files of uploads in progress in the world's store."""
    return [path for path in (tmp_path / "store0" / "staging").rglob("*") if path.is_file()]


# Cut off by what they hold.


@pytest.mark.parametrize(
    ("name", "head", "reason"),
    [
        ("adapter_model.safetensors", b"PK\x03\x04" + bytes(60), "declares a header of"),
        ("adapter_model.safetensors", (2).to_bytes(8, "little") + b"{}", "holds 0 tensors"),
        ("lora/adapter_model.safetensors", b"\xff" * 8, "lora/adapter_model.safetensors: declares a header of"),
        ("adapter_model.bin", b"", "pickled files are not accepted"),
        ("tokenizer.json", b"", "is not a file of an adapter"),
        ("adapter_config.json", bytes(1 << 20), "over the limit of 1048576"),
    ],
)
async def test_a_file_that_can_be_none_of_an_adapter_is_not_received_to_its_end(
    world: World, tmp_path: Path, name: str, head: bytes, reason: str
) -> None:
    given = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal given
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % name.encode() + head
        for _ in range(100):
            given += 1
            yield bytes(10_000)

    async with app_of(world) as http:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = await http.post("/adapters", content=chunks(), headers=headers)
    assert (response.status_code, response.json()["error_type"]) == (422, "adapter")
    assert reason in response.json()["error"]
    assert given < 5
    assert staged(tmp_path) == []


async def test_one_upload_is_read_at_a_time(world: World) -> None:
    """What reading takes in memory it takes once, however many send at once."""
    inside, most, lock = 0, 0, threading.Lock()
    both = threading.Event()

    def check(paths: Mapping[str, Path], digest: Digest) -> Mapping[str, JSON]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            both.set() if inside > 1 else None
        both.wait(0.05)  # time enough for a second one to come in, if it can
        with lock:
            inside -= 1
        return validate(paths, digest)

    weights = inspected()
    async with app_of(world, check) as http, create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(lambda name: upload(http, name, **weights), f"adapter-{number}")
    assert (world.store.count(), most) == (4, 1)


def inspected() -> dict[str, bytes]:
    """Weights that pass the look at their header."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {"adapter_model.safetensors": len(header).to_bytes(8, "little") + header + bytes(4)}


# A disk that is full or fails.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["create", "write", "sync", "make_directory", "move", "sync_directory"])
async def test_an_upload_that_meets_a_full_disk_fails_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    world.add("kept")
    with monkeypatch.context() as patch:
        patch.setattr(disk, call, refusing(code))
        response = await upload(world.http)
        assert response.status_code == 503
        assert response.json() == {"error": f"the store's disk failed: {os.strerror(code)}", "error_type": "unavailable"}
        assert (await world.http.get("/adapters/support")).status_code == 404
        await everything_else_goes_on(world)
    assert staged(tmp_path) == []
    assert (await upload(world.http)).status_code == 201
    world.store.gc(0)
    assert world.store.verify() == ()


async def test_a_catalog_that_cannot_be_written_fails_what_would_write(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("kept")

    def full(**arguments: object) -> None:
        raise Unavailable("the store's catalog failed: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.store._catalog, "add", full)
        response = await upload(world.http)
        assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")
        await everything_else_goes_on(world)
    assert staged(tmp_path) == []
    assert world.store.gc(0).blobs == 3  # two files and a manifest that no version came to need
    assert (await upload(world.http)).json()["version"] == 1


def refusing(code: int) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        raise OSError(code, os.strerror(code), "/secret/path")

    return call


async def everything_else_goes_on(world: World) -> None:
    assert (await world.generate(adapter_id="kept")).status_code == 200
    assert (await world.generate()).status_code == 200
    assert [item["adapter_id"] for item in (await world.http.get("/adapters")).json()["adapters"]] == ["kept"]
    assert (await world.http.put("/users/ann", json={"adapter_id": "kept"})).status_code == 200
    assert (await world.http.post("/adapters/kept/load")).status_code == 200
    assert (await world.http.get("/health")).status_code == 200
