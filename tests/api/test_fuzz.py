"""Whatever JSON is sent, the answer is a 2xx or a 4xx in the route's own error shape, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.schemas import ChatRequest, CompletionRequest, GenerateParameters, GenerateRequest
from server.model.text import Text

from .conftest import World, build

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
LIKELY = st.sampled_from([None, True, 0, 1, 2, 0.5, 1.0, -1, "tiny", "support", "a", ["a"], [], {}, [[5]], [5]])


def bodies(*models: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = sorted({name for model in models for name in model.model_fields} - {"max_new_tokens", "max_tokens"})
    return st.dictionaries(st.sampled_from(fields), LIKELY | VALUES, max_size=4)


GENERATE = st.builds(
    lambda top, parameters: {"inputs": "a", **top, "parameters": {"max_new_tokens": 3, **parameters}},
    bodies(GenerateRequest),
    bodies(GenerateParameters),
)
COMPLETION = bodies(CompletionRequest).map(lambda body: {"model": "tiny", "prompt": "a", "max_tokens": 3, **body})
CHAT = bodies(ChatRequest).map(
    lambda body: {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, **body}
)
REQUESTS = st.one_of(
    st.tuples(st.sampled_from(["/generate", "/generate_stream", "/"]), GENERATE | VALUES),
    st.tuples(st.just("/v1/completions"), COMPLETION | VALUES),
    st.tuples(st.just("/v1/chat/completions"), CHAT | VALUES),
    st.tuples(st.just("/tokenize"), bodies(GenerateRequest) | VALUES),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, text: Text, empty_store: Path) -> Iterator[tuple[World, asyncio.Runner]]:
    world = build(shutil.copytree(empty_store, tmp_path_factory.mktemp("fuzz") / "store"), text)
    world.add("support")
    with asyncio.Runner() as runner:
        yield world, runner
        runner.run(world.http.aclose())
    world.engine.stop()
    world.store.close()


@given(request_=REQUESTS)
@settings(max_examples=200, deadline=None)
def test_no_body_breaks_the_server(served: tuple[World, asyncio.Runner], request_: tuple[str, Any]) -> None:
    world, runner = served
    path, body = request_
    content = json.dumps(body).encode()

    async def ask() -> httpx.Response:
        return await world.http.post(path, content=content, headers={"content-type": "application/json"})

    response = runner.run(ask())
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert isinstance(error, dict if path.startswith("/v1/") else str)
    assert world.engine.stats().running == 0
