"""`merged_adapters` and `compose`: what becomes a recipe, over which tenant's adapters, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from server.recipes import Join, Merge

from .conftest import World, events_of

PREFIX = "Input validation error: "


# -- merged_adapters -------------------------------------------------------------------------------------------------


async def test_a_merge_reaches_the_engine_as_one_adapter(world: World) -> None:
    one, two = world.add("one"), world.add("two")
    merged = {"ids": ["one", "two"], "weights": [2, 0.3], "merge_strategy": "ties", "density": 0.2}
    response = await world.generate(merged_adapters=merged)
    assert response.status_code == 200
    recipe = Merge((one.digest, two.digest), (2.0, 0.3), "ties", 0.2, "total")
    assert (world.last.adapters, world.last.recipes) == ((recipe.digest,), (recipe,))
    assert response.headers["x-adapter-id"] == "one,two"


async def test_defaults_are_loraxs(world: World) -> None:
    one, two = world.add("one"), world.add("two")
    given: list[dict[str, Any]] = [
        {"ids": ["one", "two"]},
        {"ids": ["one", "two"], "weights": None, "merge_strategy": None, "majority_sign_method": None},
        {"ids": ["one", "two"], "weights": [1, 1], "merge_strategy": "LINEAR", "density": 0.5},
    ]
    for merged in given:
        await world.generate(merged_adapters=merged)
    digests = {request.adapters for request in world.engine.submitted}
    assert digests == {(Merge((one.digest, two.digest), (1.0, 1.0)).digest,)}


async def test_a_stream_may_be_merged(world: World) -> None:
    world.add("one")
    body = {"inputs": "a", "parameters": {"merged_adapters": {"ids": ["one"]}}}
    events = events_of(await world.post("/generate_stream", body))
    assert events[-1]["generated_text"]
    assert len(world.last.recipes) == 1


async def test_a_request_without_a_merge_carries_no_recipe(world: World) -> None:
    world.add("one")
    await world.generate(adapter_id="one")
    assert world.last.recipes == ()
    await world.generate(merged_adapters=None)
    assert (world.last.adapters, world.last.recipes) == ((), ())


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        ({"ids": []}, "at least one adapter ID must be provided when setting `adapters`"),
        ({"ids": ["one"], "weights": [1, 2]}, "number of adapter IDs must match number of adapter weights"),
        (
            {"ids": ["one"], "merge_strategy": "svd"},
            '`merge_strategy` must be one of linear, ties, dare_linear, dare_ties. Given: "svd"',
        ),
        (
            {"ids": ["one"], "majority_sign_method": "loudest"},
            '`majority_sign_method` must be one of total, frequency. Given: "loudest"',
        ),
        ({"ids": ["one"], "merge_strategy": "ties"}, "`density` must be > 0.0 and <= 1.0. Given: 0.0"),
        ({"ids": ["one"], "merge_strategy": "dare_linear", "density": 1.5}, "`density` must be > 0.0 and <= 1.0. Given: 1.5"),
        ({"ids": ["one"], "density": -0.1}, "`density` must be > 0.0 and <= 1.0. Given: -0.1"),
        ({"ids": ["one"] * 17}, "`merged_adapters` supports up to 16 adapters. Given: 17"),
        ({"ids": ["one", "gain"]}, "`merged_adapters`: 'gain' holds ia3; only LoRA can be merged"),
        ({}, "`merged_adapters.ids` is required"),
        ({"ids": "one"}, '`merged_adapters.ids` must be a list. Given: "one"'),
        ({"ids": [1]}, "`merged_adapters.ids[0]` must be a string. Given: 1"),
        ({"ids": ["one"], "weights": ["1"]}, '`merged_adapters.weights[0]` must be a number. Given: "1"'),
        (["one"], '`merged_adapters` must be an object. Given: ["one"]'),
    ],
)
async def test_what_is_wrong_with_a_merge_is_named(world: World, merged: Any, message: str) -> None:
    world.add("one")
    world.add("gain", part="ia3")
    response = await world.generate(merged_adapters=merged)
    assert response.json() == {"error": PREFIX + message, "error_type": "validation"}
    assert response.status_code == 422
    assert world.engine.submitted == []


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e999"])
async def test_weights_are_finite(world: World, weight: str) -> None:
    world.add("one")
    body = '{"inputs": "a", "parameters": {"merged_adapters": {"ids": ["one"], "weights": [WEIGHT]}}}'.replace("WEIGHT", weight)
    response = await world.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert world.engine.submitted == []


@pytest.mark.parametrize("adapter_id", ["one", ""])
async def test_a_merge_and_an_adapter_exclude_each_other(world: World, adapter_id: str) -> None:
    world.add("one")
    message = PREFIX + "at most one of `adapter_id` or `adapters` may be provided"
    merged: dict[str, Any] = {"merged_adapters": {"ids": ["one"]}}
    inner = await world.generate(adapter_id=adapter_id, **merged)
    outer = await world.post("/generate", {"inputs": "a", "adapter_id": adapter_id, "parameters": merged})
    assert inner.json()["error"] == outer.json()["error"] == message


async def test_a_merge_names_a_tenants_own_adapters_only(world: World) -> None:
    world.add("one")
    world.add("theirs", tenant="another")
    answers = [await world.generate(merged_adapters={"ids": ["one", name]}) for name in ("theirs", "nobody", "", "..")]
    assert {answer.status_code for answer in answers} == {404}
    assert answers[0].json()["error"] == "adapter 'theirs' does not exist"
    assert world.engine.submitted == []


async def test_a_merge_of_a_deleted_adapter_is_404(world: World) -> None:
    world.add("one")
    world.add("two")
    merged = {"ids": ["one", "two"]}
    assert (await world.generate(merged_adapters=merged)).status_code == 200
    world.store.delete("default", "two")
    assert (await world.generate(merged_adapters=merged)).status_code == 404


# -- compose ---------------------------------------------------------------------------------------------------------


async def composed(world: World, **parameters: Any) -> Any:
    body = {"inputs": "a", "user_id": "alice", "parameters": {"compose": True, **parameters}}
    response = await world.post("/generate", body)
    assert response.status_code == 200, response.text
    return response


async def test_two_adapters_of_one_family_are_joined(world: World) -> None:
    ours, mine = world.add("ours"), world.add("mine")
    world.store.bind_user("default", "alice", "mine")
    response = await composed(world, adapter_id="ours")
    recipe = Join((ours.digest, mine.digest))
    assert (world.last.adapters, world.last.recipes) == ((recipe.digest,), (recipe,))
    assert response.headers["x-adapter-id"] == "ours,mine"


async def test_adapters_of_two_families_stay_two(world: World) -> None:
    ours, mine = world.add("ours"), world.add("mine", part="ia3")
    world.store.bind_user("default", "alice", "mine")
    await composed(world, adapter_id="ours")
    assert (world.last.adapters, world.last.recipes) == ((ours.digest, mine.digest), ())


async def test_two_prefixes_are_joined_the_tenants_first(world: World) -> None:
    ours = world.add("ours", virtual=3, part="prefix_tuning")
    mine = world.add("mine", virtual=4, part="prompt_tuning")
    world.store.bind_user("default", "alice", "mine")
    await composed(world, adapter_id="ours", max_new_tokens=92)
    assert world.last.recipes == (Join((ours.digest, mine.digest)),)
    body = {"inputs": "a", "user_id": "alice", "parameters": {"compose": True, "adapter_id": "ours", "max_new_tokens": 93}}
    response = await world.post("/generate", body)
    assert response.status_code == 422
    assert "Given: 8 `inputs` tokens (7 of them are its adapter's) and 93" in response.json()["error"]


async def test_a_merge_is_joined_with_the_users_adapter(world: World) -> None:
    one, two, mine = world.add("one"), world.add("two"), world.add("mine")
    gain = world.add("gain", part="ia3")
    world.store.bind_user("default", "alice", "mine")
    merge = Merge((one.digest, two.digest), (1.0, 1.0))
    await composed(world, merged_adapters={"ids": ["one", "two"]})
    assert world.last.recipes == (Join((merge, mine.digest)),)
    world.store.bind_user("default", "alice", "gain")
    await composed(world, merged_adapters={"ids": ["one", "two"]})
    assert world.last.adapters == (merge.digest, gain.digest)
    assert world.engine.submitted[-1].recipes == (merge,)


async def test_a_merge_wins_over_the_users_adapter(world: World) -> None:
    one = world.add("one")
    world.add("mine")
    world.store.bind_user("default", "alice", "mine")
    await world.post("/generate", {"inputs": "a", "user_id": "alice", "parameters": {"merged_adapters": {"ids": ["one"]}}})
    assert world.last.recipes == (Merge((one.digest,), (1.0,)),)


async def test_an_adapter_is_not_joined_with_itself(world: World) -> None:
    mine = world.add("mine")
    world.store.bind_user("default", "alice", "mine")
    await composed(world, adapter_id="mine")
    assert (world.last.adapters, world.last.recipes) == ((mine.digest,), ())
