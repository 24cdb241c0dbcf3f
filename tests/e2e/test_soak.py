"""Soak: a real server under everything that tenants do, well and badly, for two minutes; by hand for as long as one likes.

ADAPTERD_TEST_SOAK_SECONDS=25200 pytest -m slow -n 0 tests/e2e/test_soak.py
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters_store.store import Store
from tests.conftest import Serve
from tests.process import DEADLINE, ServerProcess, until
from tests.security.contents import CONTENTS

SECONDS = float(os.environ.get("ADAPTERD_TEST_SOAK_SECONDS", "120"))
TENANTS = ("acme", "zeta", "omni")
NAMES = ("support", "sales", "org/legal")
GROWTH = 48 << 20  # bytes of resident memory that a whole run may add once it is warm


@dataclass
class Client(threading.Thread):
    """One tenant's client, doing one thing after another at random until told to stop."""

    url: str
    key: str
    seed: int
    stop: threading.Event
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.chance = random.Random(self.seed)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"}
        doings = (
            [self.generate] * 6 + [self.leave] * 2 + [self.upload] * 2 + [self.delete, self.embed, self.misbehave, self.look]
        )
        try:
            with httpx.Client(base_url=self.url, timeout=DEADLINE, headers=headers) as http:
                while not self.stop.is_set():
                    self.chance.choice(doings)(http)
        except BaseException as error:
            self.failure = error

    def generate(self, http: httpx.Client) -> None:
        self.note("generate", http.post("/generate", json=self.body(self.chance.randint(1, 24))))

    def leave(self, http: httpx.Client) -> None:
        """A stream that is left after a few of its tokens."""
        with http.stream("POST", "/generate_stream", json=self.body(200)) as response:
            self.note("stream", response)
            for _, _ in zip(response.iter_lines(), range(self.chance.randint(0, 12)), strict=False):
                pass

    def upload(self, http: httpx.Client) -> None:
        files = CONTENTS[self.chance.choice(sorted(CONTENTS))]
        parts = [("files", (file, data, "application/octet-stream")) for file, data in files.items()]
        self.note("upload", http.post("/adapters", data={"adapter_id": self.chance.choice(NAMES)}, files=parts))

    def delete(self, http: httpx.Client) -> None:
        self.note("delete", http.delete(f"/adapters/{self.chance.choice(NAMES)}"))

    def embed(self, http: httpx.Client) -> None:
        body = {"inputs": ["the cat sat", "on the mat"], "adapter_id": self.chance.choice(("", *NAMES))}
        self.note("embed", http.post("/embed", json=body))

    def misbehave(self, http: httpx.Client) -> None:
        body: dict[str, Any] = {"inputs": "x" * self.chance.choice((0, 10_000)), "parameters": {"temperature": -1}}
        self.note("misbehave", http.post("/generate", json=body))
        self.note(
            "misbehave", http.post("/adapters", content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"})
        )

    def look(self, http: httpx.Client) -> None:
        for path in ("/adapters", "/info", "/v1/models", f"/adapters/{self.chance.choice(NAMES)}/versions"):
            self.note("look", http.get(path))

    def body(self, tokens: int) -> dict[str, Any]:
        words = " ".join(self.chance.choices(("hello", "world", "the", "cat", "sat", "mat"), k=self.chance.randint(1, 60)))
        adapter = self.chance.choice(("", *NAMES))
        parameters = {"adapter_id": adapter, "max_new_tokens": tokens, "do_sample": self.chance.random() < 0.5}
        return {"inputs": words, "parameters": {**parameters, "ignore_eos_token": True}}

    def note(self, what: str, response: httpx.Response) -> None:
        self.statuses[what, response.status_code] += 1


@pytest.fixture
def server(serve: Serve, tiny_base: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    flags = ("--require-keys", "--adapter-slots", "4", "--kv-cache-gb", "0.002", "--max-running", "8")
    with serve("--model", str(tiny_base), "--store", str(tmp_path / "store"), *flags) as server:
        yield server


def resident_bytes(server: ServerProcess, seconds: float) -> list[int]:
    """What the process holds, sampled through the run."""
    process, samples, end = psutil.Process(server.process.pid), [], time.monotonic() + seconds
    while time.monotonic() < end:
        samples.append(process.memory_info().rss)
        time.sleep(0.5)
    return samples


@pytest.mark.slow
def test_under_everything_that_tenants_do_nothing_fails_and_nothing_grows(server: ServerProcess, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        keys = {tenant: store.add_key(tenant, ["infer", "adapters"]).text for tenant in TENANTS}
    stop = threading.Event()
    clients = [Client(server.url, keys[tenant], seed, stop) for seed, tenant in enumerate(TENANTS * 2)]
    for client in clients:
        client.start()
    samples = resident_bytes(server, SECONDS)
    stop.set()
    for client in clients:
        client.join(DEADLINE)
    assert [client.failure for client in clients if client.failure] == []
    statuses = sum((client.statuses for client in clients), Counter[tuple[str, int]]())
    assert {key: count for key, count in statuses.items() if key[1] >= 500} == {}
    assert {what for what, status in statuses if status in (200, 201, 204)} >= {
        "generate",
        "stream",
        "upload",
        "delete",
        "embed",
    }
    warm = samples[len(samples) // 3 :]
    half = len(warm) // 2
    assert statistics.median(warm[half:]) - statistics.median(warm[:half]) < GROWTH, "resident memory is flat once warm"
    check_all_is_free(server, keys)


def check_all_is_free(server: ServerProcess, keys: dict[str, str]) -> None:
    """Nothing runs, and once every adapter is deleted nothing holds a slot. Pages: `tests/promises/test_14_disconnects.py`."""
    headers = {tenant: {"authorization": f"Bearer {key}"} for tenant, key in keys.items()}

    def engine() -> Any:
        return server.http.get("/info", headers=headers["acme"]).json()["engine"]

    until(lambda: engine()["running"] == engine()["waiting"] == 0)
    for tenant in TENANTS:
        for name in NAMES:
            assert server.http.delete(f"/adapters/{name}", headers=headers[tenant]).status_code in (204, 404)
    until(lambda: engine()["adapter_slots_used"] == 0)
    assert '"level": "error"' not in server.log
