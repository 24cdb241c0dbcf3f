"""House: a whole server inside the test's process (engine, store, API, tokenizer), asked over ASGI as any tenant.

For what needs every part and no socket: it starts in a fraction of a second once torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from starlette.testclient import TestClient

from server.assembly import Server, assemble
from server.settings import Settings

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Caller:
    """One tenant's client."""

    house: House
    headers: Mapping[str, str]

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The response of httpx's kind."""
        headers = {**self.headers, **more.pop("headers", {})}
        return self.house.http.request(method, path, headers=headers, **more)

    def get(self, path: str, **more: Any) -> Any:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> Any:
        return self.ask("POST", path, **more) if body is None else self.ask("POST", path, json=body, **more)

    def put(self, path: str, body: Any) -> Any:
        return self.ask("PUT", path, json=body)

    def delete(self, path: str, **more: Any) -> Any:
        return self.ask("DELETE", path, **more)

    def upload(self, name: str, files: Files, **more: Any) -> Any:
        parts = [("files", (file, data, "application/octet-stream")) for file, data in files.items()]
        return self.ask("POST", "/adapters", data={"adapter_id": name}, files=parts, **more)

    def generate(self, inputs: str = "hello world, how are you", adapter: str | None = None, **parameters: Any) -> Any:
        wanted = {"adapter_id": adapter, "max_new_tokens": 6, "details": True, "ignore_eos_token": True, **parameters}
        return self.post("/generate", {"inputs": inputs, "parameters": wanted})

    def tokens(self, adapter: str | None = None, **parameters: Any) -> list[int]:
        """Greedy ids."""
        response = self.generate(adapter=adapter, **parameters)
        assert response.status_code == 200, response.text
        return [token["id"] for token in response.json()["details"]["tokens"]]


class House:
    """Usage:

    with House(base, directory) as house:
        acme, zeta = house.tenant("acme"), house.tenant("zeta")
    """

    def __init__(self, base: Path, directory: Path, **settings: Any) -> None:
        """`directory` gets the store; keyword arguments are settings."""
        small = {"native": False, "threads": 1, "kv_cache_gb": 0.004, "block_size": 4, "adapter_slots": 3, "require_keys": True}
        self.store_root = directory / "store"
        self.server: Server = assemble(Settings(**{"model": str(base), "store": self.store_root, **small, **settings}))
        self.http = TestClient(self.server.app)

    def tenant(self, name: str, *scopes: str) -> Caller:
        """A caller with a new key of that tenant, for everything a tenant may do if no scopes are named."""
        key = self.server.store.add_key(name, scopes or ("infer", "adapters")).text
        return Caller(self, {"authorization": f"Bearer {key}"})

    @property
    def anyone(self) -> Caller:
        """A caller without a key."""
        return Caller(self, {})

    def state(self) -> Any:
        """What the engine holds: requests, pages and slots."""
        stats = self.server.engine.stats()
        return stats.running, stats.waiting, stats.kv_blocks_used, stats.slots_used

    def stored(self) -> set[str]:
        """Names of the files in the store, but for the database's own."""
        return {str(path) for path in self.store_root.rglob("*") if path.is_file() and "sqlite3" not in path.name}

    def idle(self) -> bool:
        """Nothing runs, waits, or holds pages or slots."""
        engine = self.server.engine
        return engine.pending == 0 and engine.stats().running == engine.stats().waiting == 0

    def __enter__(self) -> Self:
        self.http.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.http.__exit__(kind, error, traceback)
