"""One app per test over a fake engine and a real store in a temporary directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.records import AdapterRecord
from adapters_store.store import Store
from server.api.app import create_app
from server.api.readiness import Readiness
from server.engine.mailbox import Mailbox
from server.metrics import Metrics
from server.model.text import Text
from server.requests import Request
from server.settings import Settings

from .fakes import FakeEngine, tiny_tokenizer, validate

MODEL = "tiny"
PREFIX = "Input validation error: "


@pytest.fixture(scope="session")
def text() -> Text:
    return Text(tiny_tokenizer())


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made once and copied per test: making one waits for the disk several times."""
    root = tmp_path_factory.mktemp("empty") / "store"
    Store.open(root).close()
    return root


@dataclass
class World:
    """Everything a test may want to look at or turn."""

    app: FastAPI
    engine: FakeEngine
    store: Store
    text: Text
    readiness: Readiness
    http: httpx.AsyncClient

    def says(self, answer: str) -> None:
        """What every generation from now on answers."""
        self.engine.script = lambda request: self.text.encode(answer)

    def add(self, name: str, *, virtual: int = 0, part: str = "lora", tenant: str = "default", **told: Any) -> AdapterRecord:
        """Put an adapter into the store directly; `told` is what else its record says."""
        with self.store.stage() as staged:
            staged.write("adapter_config.json", [name.encode()])
            details = {"virtual_tokens": virtual, **told}
            return self.store.publish(staged, tenant=tenant, name=name, method=part, parts=(part,), details=details)[0]

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def generate(self, inputs: str = "hello", **parameters: Any) -> httpx.Response:
        return await self.post("/generate", {"inputs": inputs, "parameters": parameters})

    @property
    def last(self) -> Request:
        """The request the engine got last."""
        return self.engine.submitted[-1]


def build(root: Path, text: Text, *, max_total_tokens: int = 100, **settings: Any) -> World:
    """An app over the store at `root`; keyword arguments are settings. Stop its engine and close its store."""
    mailbox, readiness, store = Mailbox(), Readiness(), Store.open(root)
    engine = FakeEngine(mailbox.publish, lambda request: text.encode(" world, how are you"), eos=1)
    app = create_app(
        engine=engine,
        mailbox=mailbox,
        text=text,
        store=store,
        metrics=Metrics(MODEL, top_k=2),
        settings=Settings(**settings),
        validate=validate,
        model_name=MODEL,
        max_total_tokens=max_total_tokens,
        readiness=readiness,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return World(app, engine, store, text, readiness, httpx.AsyncClient(transport=transport, base_url="http://test"))


Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path, text: Text, empty_store: Path) -> Iterator[Make]:
    """`build` in a fresh store, cleaned up after the test."""
    made: list[World] = []

    def fresh(**settings: Any) -> World:
        root = shutil.copytree(empty_store, tmp_path / f"store{len(made)}")
        made.append(build(root, text, **settings))
        return made[-1]

    yield fresh
    for world in made:
        world.engine.stop()
        world.store.close()


@pytest.fixture
async def world(make: Make) -> AsyncIterator[World]:
    built = make()
    yield built
    await built.http.aclose()


def events_of(response: httpx.Response) -> list[Any]:
    """The payloads of a server-sent event stream, `[DONE]` as the string."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
