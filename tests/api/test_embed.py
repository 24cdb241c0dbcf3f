"""/embed: shapes, pooling, length 1, through an adapter or the base, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.embed import normalized

from .conftest import World


async def embed(world: World, inputs: Any, **more: Any) -> Any:
    return await world.post("/embed", {"inputs": inputs, **more})


async def test_one_text_gives_one_vector_and_a_list_one_each(world: World) -> None:
    world.engine.scorer = lambda request: ((3.0, 4.0),)
    one = await embed(world, "hello")
    assert (one.status_code, one.json()) == (200, {"embeddings": [0.6, 0.8]})
    assert (world.last.task, world.last.pooling, world.last.adapters) == ("embed", "mean", ())
    assert (await embed(world, ["a", "b"], normalize=False)).json() == {"embeddings": [[3.0, 4.0], [3.0, 4.0]]}
    assert (await embed(world, "a", normalize=None)).json() == {"embeddings": [0.6, 0.8]}


async def test_pooling_and_adapter_reach_the_engine(world: World) -> None:
    record = world.add("support")
    assert (await embed(world, "hello", adapter_id="support", pooling="last")).status_code == 200
    assert (world.last.pooling, world.last.adapters) == ("last", (record.digest,))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": "a", "pooling": "cls"}, '`pooling` must be one of mean, last. Given: "cls"'),
        ({"inputs": "a", "pooling": 3}, "`pooling` must be a string. Given: 3"),
        ({"inputs": "a", "normalize": 1}, "`normalize` must be a boolean. Given: 1"),
        ({"inputs": []}, "`inputs` must have >= 1 and <= 32 texts. Given: 0"),
        ({"inputs": ""}, "`inputs` cannot be empty"),
    ],
)
async def test_bad_bodies_are_refused_by_name(world: World, body: dict[str, Any], message: str) -> None:
    response = await world.post("/embed", body)
    assert (response.status_code, response.json()["error"]) == (422, f"Input validation error: {message}")


async def test_an_unknown_adapter_is_not_found(world: World) -> None:
    assert (await embed(world, "hello", adapter_id="nope")).status_code == 404


def test_a_zero_vector_stays_zero() -> None:
    assert normalized((0.0, 0.0)) == [0.0, 0.0]
