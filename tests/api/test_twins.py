"""Two tenants upload the very same files: neither can find out, or change what happens to the other's."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.digest import Digest
from adapters_store.store import Store
from server.api.app import create_app
from server.engine.loading import HostCache, Loading
from server.engine.mailbox import Mailbox
from server.errors import AdapterdError
from server.methods.base import Adapter
from server.metrics import Metrics
from server.model.text import Text
from server.settings import Settings

from .conftest import World
from .fakes import FakeEngine, validate

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights that both tenants have"}


@dataclass
class ReadingEngine(FakeEngine):
    """Loads through the real host cache, and keeps which digests had to be read from the store."""

    reads: list[Digest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loaded: queue.Queue[Digest] = queue.Queue()
        self.loading = Loading(self._load, HostCache(1 << 20), self._done, workers=1)
        super().__post_init__()

    def warm(self, digests: tuple[Digest, ...], tenant: str = "default") -> Future[None]:
        for digest in digests:
            self.loading.start(digest)
            assert self.loaded.get(timeout=10) == digest
        return super().warm(digests, tenant)

    def stop(self) -> None:
        self.loading.stop()
        super().stop()

    def _load(self, digest: Digest) -> Adapter:
        self.reads.append(digest)
        return Adapter(digest, ())

    def _done(self, digest: Digest, result: Adapter | AdapterdError, seconds: float) -> None:
        self.loaded.put(digest)


class Tenants:
    """The same store and engine as two tenants see them."""

    def __init__(self, world: World, engine: ReadingEngine) -> None:
        self.engine = engine
        self.store = world.store
        self.acme, self.zeta = (_client(tenant, engine, world.store, world.text) for tenant in ("acme", "zeta"))

    async def upload(self, http: httpx.AsyncClient, name: str = "support") -> dict[str, Any]:
        parts = [("files", pair) for pair in FILES.items()]
        response = await http.post("/adapters", data={"adapter_id": name}, files=parts)
        assert response.status_code == 201
        record: dict[str, Any] = response.json()
        return record


def _client(tenant: str, engine: FakeEngine, store: Store, text: Text) -> httpx.AsyncClient:
    app = create_app(
        engine=engine,
        mailbox=Mailbox(),
        text=text,
        store=store,
        metrics=Metrics("tiny", top_k=2),
        settings=Settings(),
        validate=validate,
        model_name="tiny",
        tenant=tenant,
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
async def tenants(world: World) -> AsyncIterator[Tenants]:
    engine = ReadingEngine(lambda events: None, lambda request: [1], eos=1)
    found = Tenants(world, engine)
    async with AsyncExitStack() as stack:
        for http in (found.acme, found.zeta):
            await stack.enter_async_context(http)
        yield found
    engine.stop()


def blobs(root: Path) -> int:
    return sum(path.is_file() for path in (root / "blobs").rglob("*"))


async def test_equal_files_have_a_digest_per_tenant_and_one_copy(tenants: Tenants, tmp_path: Path) -> None:
    first = await tenants.upload(tenants.acme)
    before = blobs(tmp_path / "store0")
    second = await tenants.upload(tenants.zeta)
    assert first["digest"] != second["digest"]
    assert blobs(tmp_path / "store0") == before + 1  # the manifest alone
    hidden = {"digest", "created_at"}
    assert {key: first[key] for key in first.keys() - hidden} == {key: second[key] for key in second.keys() - hidden}


async def test_no_state_of_the_twin_is_seen(tenants: Tenants) -> None:
    await tenants.upload(tenants.acme)
    assert (await tenants.acme.post("/adapters/support/load")).json()["state"] == "resident"
    assert (await tenants.upload(tenants.zeta))["state"] == "stored"
    assert (await tenants.zeta.get("/adapters/support")).json()["state"] == "stored"
    assert [item["state"] for item in (await tenants.zeta.get("/adapters")).json()["adapters"]] == ["stored"]
    assert [item["state"] for item in (await tenants.acme.get("/adapters")).json()["adapters"]] == ["resident"]


@pytest.mark.parametrize(("verb", "path"), [("POST", "/adapters/support/unload"), ("DELETE", "/adapters/support")])
async def test_unloading_or_deleting_leaves_the_twin_where_it_is(tenants: Tenants, verb: str, path: str) -> None:
    mine = Digest((await tenants.upload(tenants.acme))["digest"])
    await tenants.upload(tenants.zeta)
    for http in (tenants.acme, tenants.zeta):
        await http.post("/adapters/support/load")
    assert (await tenants.zeta.request(verb, path)).is_success
    tenants.store.gc(0)
    assert (await tenants.acme.get("/adapters/support")).json()["state"] == "resident"
    assert {name: file.read_bytes() for name, file in tenants.store.files(mine).items()} == FILES


async def test_deleting_one_of_two_names_of_the_same_content_leaves_it_where_it_is(tenants: Tenants) -> None:
    for name in ("support", "sales"):
        await tenants.upload(tenants.acme, name)
    await tenants.acme.post("/adapters/support/load")
    assert (await tenants.acme.delete("/adapters/sales")).is_success
    assert (await tenants.acme.get("/adapters/support")).json()["state"] == "resident"
    assert (await tenants.acme.delete("/adapters/support")).is_success
    assert tenants.engine.resident == {}


async def test_what_the_twin_has_in_memory_saves_no_read(tenants: Tenants) -> None:
    """Else the time of a load would tell that somebody uses these files."""
    mine = (await tenants.upload(tenants.acme))["digest"]
    for _ in range(2):
        await tenants.acme.post("/adapters/support/load")
    assert tenants.engine.reads == [mine]
    theirs = (await tenants.upload(tenants.zeta))["digest"]
    await tenants.zeta.post("/adapters/support/load")
    assert tenants.engine.reads == [mine, theirs]
