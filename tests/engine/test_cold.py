"""Adapters that are not in memory: in whose turn they are read, and what an upload or a new version changes for requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from adapters_store.errors import NotFound
from server.methods.base import Adapter, Part
from tests.e2e.uploads import lora
from tests.house import House
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 33, 60, 12]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with capture_logs():
        yield


def cold(n: int) -> Adapter:
    sites = {"model.layers.0.mlp.down_proj": {"delta": torch.full((32,), float(n))}}
    return Adapter(Digest(f"{n:064x}"), (Part("bitfit", "bitfit", sites),))


# ---- whose turn it is ----


def test_one_cold_adapter_is_not_stuck_behind_anothers_500(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacker was first, and its queue is endless; the victim's adapter is read with the next few."""
    adapters = {adapter.digest: adapter for adapter in map(cold, range(1, 502))}
    lab = Lab(tiny_model("llama"), adapters, slots=4, max_running=4)
    started: list[Digest] = []
    start = lab.engine._loading.start

    def noted(digest: Digest) -> None:
        started.append(digest)
        start(digest)

    monkeypatch.setattr(lab.engine._loading, "start", noted)
    victim = Digest(f"{501:064x}")
    for n in range(1, 501):
        lab.submit(f"a{n}", PROMPT, Digest(f"{n:064x}"), tenant="attacker", max_new_tokens=2)
    lab.turn()
    before = len(started)
    lab.submit("victim", PROMPT, victim, tenant="victim", max_new_tokens=2)
    for _ in range(200):
        lab.turn()
        if any(event.request_id == "victim" and event.finish for event in lab.events):
            break
    assert lab.finished("victim")
    assert started.index(victim) - before <= lab.scheduler.limits.prefetch
    assert len(started) < 60  # it did not wait for the queue to drain
    for n in range(1, 501):
        lab.engine.cancel(f"a{n}")
    lab.run()


# ---- against a store ----


@pytest.fixture
def house(tiny_base: Path, tmp_path: Path) -> Iterator[House]:
    with House(tiny_base, tmp_path, require_keys=False) as built:
        yield built


def reads(house: House, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """The digests whose files are asked for from now on."""
    asked, files = list[Digest](), house.server.store.files

    def noted(digest: Digest) -> Any:
        asked.append(digest)
        return files(digest)

    monkeypatch.setattr(house.server.store, "files", noted)
    return asked


def test_the_first_request_after_an_upload_reads_no_file(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, me = reads(house, monkeypatch), house.anyone
    digest = me.upload("fresh", lora(1)).json()["digest"]
    first = me.tokens("fresh")
    assert asked == []
    house.server.engine.unload(Digest(digest))  # leaves host memory too
    assert me.tokens("fresh") == first  # what was kept is what is stored
    assert asked == [digest]


def test_an_upload_that_is_refused_leaves_nothing_in_memory(house: House) -> None:
    torn = {**lora(1), "adapter_model.safetensors": b"torn"}
    assert house.anyone.upload("torn", torn).status_code == 422
    assert house.server.engine.stats().host_cache_bytes == 0


def test_replaced_while_serving_the_old_version_deleted_and_swept_with_grace(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held between steps, so that the request is in flight, loaded or not, when its version goes."""
    me, engine = house.anyone, house.server.engine
    old_digest = Digest(me.upload("news", lora(1)).json()["digest"])
    old = me.tokens("news", max_new_tokens=12)
    me.upload("news", lora(2))
    new = me.tokens("news", max_new_tokens=12)
    assert old != new
    me.delete("/adapters/news")
    me.upload("news", lora(1))
    assert me.tokens("news", max_new_tokens=12) == old
    engine.unload(old_digest)  # the request has to read the old version's files after they were deleted
    go, held, turn = threading.Event(), threading.Event(), engine._step

    def step() -> None:
        if engine.pending and not go.is_set():
            held.set()
            assert go.wait(60)
        turn()

    monkeypatch.setattr(engine, "_step", step)
    answers: list[list[int]] = []
    asking = threading.Thread(target=lambda: answers.append(me.tokens("news", max_new_tokens=12)))
    asking.start()
    assert held.wait(60)
    monkeypatch.setattr(engine, "unload", lambda digest, deleted: False)  # it waits for the step that is held here
    newest = me.upload("news", lora(2)).json()["version"]
    assert me.delete("/adapters/news", params={"version": newest - 1}).status_code == 204
    house.server.store.gc(grace_seconds=3600)
    go.set()
    asking.join(60)
    assert answers == [old]
    assert me.tokens("news", max_new_tokens=12) == new
    house.server.store.gc(grace_seconds=0)
    with pytest.raises(NotFound):
        house.server.store.files(old_digest)
