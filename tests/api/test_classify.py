"""/classify: shapes of both kinds of heads, which adapter, refusals by name, and what the metrics count."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.api.classify import entities, probabilities, ranked
from server.api.texts import MAX_INPUTS
from server.errors import GenerationError, OverloadedError
from server.model.text import Offset

from .conftest import Make, World
from .fakes import tiny_tokenizer

PREFIX = "Input validation error: "
SEQUENCE = {"task_type": "SEQ_CLS", "pooling": "last", "labels": ["no", "yes", "maybe"]}
TOKENS = {**SEQUENCE, "task_type": "TOKEN_CLS"}
SOFTMAX = [math.exp(x) / (math.exp(0.5) + math.exp(2.0) + math.exp(-1.0)) for x in (2.0, 0.5, -1.0)]
RANKED = [{"label": label, "score": pytest.approx(p)} for label, p in zip(("yes", "no", "maybe"), SOFTMAX, strict=True)]


async def classify(world: World, inputs: Any, **more: Any) -> Any:
    return await world.post("/classify", {"inputs": inputs, **more})


async def test_a_sequence_head_ranks_every_label(world: World) -> None:
    record = world.add("mood", head=SEQUENCE)
    response = await classify(world, "hello", adapter_id="mood")
    assert response.status_code == 200
    assert response.json() == RANKED
    assert response.headers["x-adapter-id"] == "mood"
    assert response.headers["x-prompt-tokens"] == str(len(world.text.encode("hello")))
    assert (world.last.task, world.last.adapters) == ("classify", (record.digest,))
    assert world.last.prompt == tuple(world.text.encode("hello"))
    assert world.last.sampling.max_new_tokens == 0


async def test_a_list_is_answered_by_a_list_in_its_order(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    world.engine.scorer = lambda request: ((float(len(request.prompt)), 0.0, 0.0),)
    texts = ["hello", "hello world, how are you", "hello world"]
    response = await classify(world, texts, adapter_id="mood", raw_scores=True)
    assert [answer[0]["score"] for answer in response.json()] == [len(world.text.encode(text)) for text in texts]
    assert (await classify(world, ["hello"], adapter_id="mood")).json()[0][0]["label"]


async def test_a_token_head_gives_each_token_its_label_and_characters(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    starting = tiny_tokenizer(bos=True).backend_tokenizer.post_processor
    monkeypatch.setattr(world.text._backend, "post_processor", starting)
    world.add("names", head=TOKENS)
    world.engine.scorer = lambda request: tuple((0.0, float(index), 0.0) for index in range(len(request.prompt)))
    text = "the cat \N{CAT FACE} sat"
    found = (await classify(world, text, adapter_id="names")).json()
    assert [entity["index"] for entity in found] == list(range(1, len(found) + 1))  # <s> is left out
    assert {entity["entity"] for entity in found} == {"yes"}
    assert found[0].keys() == {"entity", "score", "index", "word", "start", "end"}
    assert all(text[entity["start"] : entity["end"]] == entity["word"] for entity in found)
    assert found[-1]["end"] == len(text)


async def test_the_users_own_adapter_is_used(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    await world.http.put("/users/ann", json={"adapter_id": "mood"})
    assert (await classify(world, "hello", user_id="ann")).json() == RANKED
    assert (await world.post("/classify", {"inputs": "hello"}, **{"x-user-id": "ann"})).json() == RANKED


async def test_parameters_name_the_adapter_as_lorax_does_and_truncate(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    parameters = {"adapter_id": "mood", "truncate": 2, "max_new_tokens": 5}
    assert (await classify(world, "hello world", parameters=parameters)).status_code == 200
    assert world.last.prompt == tuple(world.text.encode("hello world")[-2:])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": ["a", ""]}, "`inputs` cannot be empty"),
        ({"inputs": []}, f"`inputs` must have >= 1 and <= {MAX_INPUTS} texts. Given: 0"),
        ({"inputs": ["a"] * 33}, f"`inputs` must have >= 1 and <= {MAX_INPUTS} texts. Given: 33"),
        ({}, "`inputs` is required"),
        ({"inputs": "a " * 200}, "`inputs` must have at most 100 tokens. Given: "),
        ({"inputs": ["a", "a " * 200]}, "`inputs` must have at most 100 tokens. Given: "),
        ({"inputs": "a", "parameters": {"truncate": 0}}, "`truncate` must be strictly positive and at most 100. Given: 0"),
        ({"inputs": "a", "raw_scores": "yes"}, "`raw_scores` must be a boolean"),
        ({"inputs": "a", "parameters": {"adapter_id": "x"}}, "`adapter_id` is given twice"),
    ],
)
async def test_bad_bodies_are_refused_by_name(world: World, body: dict[str, Any], message: str) -> None:
    world.add("mood", head=SEQUENCE)
    response = await world.post("/classify", {"adapter_id": "mood", **body})
    assert response.status_code == 422
    assert response.json()["error"].startswith(PREFIX + message)
    assert response.json()["error_type"] == "validation"
    assert not world.engine.submitted


@pytest.mark.parametrize("inputs", [3, None, {"a": 1}, [1], [["a", "b"]]])
async def test_inputs_of_another_type_are_refused(world: World, inputs: Any) -> None:
    response = await classify(world, inputs)
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"{PREFIX}`inputs` must be a string or a list of strings. Given: ")


async def test_a_prefix_counts_toward_the_limit(world: World) -> None:
    world.add("mood", virtual=99, head=SEQUENCE)
    response = await classify(world, "hello world, how are you", adapter_id="mood")
    assert response.json()["error"].endswith(" and 99 of its adapter")


async def test_an_adapter_without_a_head_is_refused_by_name(world: World) -> None:
    world.add("plain")
    response = await classify(world, "hello", adapter_id="plain")
    assert response.status_code == 422
    assert "a head" in response.json()["error"]
    assert response.json()["error"].endswith("adapter 'plain' has none")
    assert (await classify(world, "hello")).json()["error"].endswith("the base model has none")
    missing = await classify(world, "hello", adapter_id="nope")
    assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")


async def test_two_heads_do_not_compose(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    world.add("names", head=TOKENS)
    world.add("plain")
    await world.http.put("/users/ann", json={"adapter_id": "names"})
    body: dict[str, Any] = {"user_id": "ann", "parameters": {"adapter_id": "mood", "compose": True}}
    response = await classify(world, "hello", **body)
    assert response.status_code == 422
    assert "at most one adapter with a head" in response.json()["error"]
    body["parameters"]["adapter_id"] = "plain"
    assert (await classify(world, "hello", **body)).status_code == 200


async def test_a_failure_ends_the_whole_request_and_cancels_the_rest(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    world.engine.failure = GenerationError("the adapter produced values that are not finite")
    response = await classify(world, ["hello", "world"], adapter_id="mood")
    assert (response.status_code, response.json()["error_type"]) == (424, "generation")
    world.engine.failure, world.engine.refusal = None, OverloadedError()
    response = await classify(world, ["hello", "world"], adapter_id="mood")
    assert response.status_code == 429


async def test_a_slow_engine_is_given_up_on(make: Make) -> None:
    world = make(request_timeout=0.1)
    world.add("mood", head=SEQUENCE)
    world.engine.silent = True
    response = await classify(world, "hello", adapter_id="mood")
    assert (response.status_code, response.json()["error"]) == (424, "the request took longer than 0.1 seconds")
    assert world.last.id in world.engine.cancelled


async def test_metrics_count_texts_by_outcome_and_their_tokens(world: World) -> None:
    world.add("mood", head=SEQUENCE)
    await classify(world, ["hello", "hello world"], adapter_id="mood")
    await classify(world, "", adapter_id="mood")
    shown = (await world.http.get("/metrics")).text
    tokens = len(world.text.encode("hello")) + len(world.text.encode("hello world"))
    assert 'adapterd_requests_total{outcome="success"} 2.0' in shown
    assert 'adapterd_requests_total{outcome="validation"} 1.0' in shown
    assert f"adapterd_prompt_tokens_total {tokens}.0" in shown
    assert f'adapterd_adapter_tokens_total{{adapter="mood",kind="prompt",tenant="default"}} {tokens}.0' in shown


def test_probabilities_of_one_label_are_a_sigmoid() -> None:
    assert probabilities([0.0]) == [0.5]
    assert probabilities([-800.0])[0] == pytest.approx(0)
    assert probabilities([800.0]) == [1.0]
    assert probabilities([1000.0, 1000.0]) == [0.5, 0.5]


def test_equal_scores_keep_the_labels_order() -> None:
    assert [entry["label"] for entry in ranked(["a", "b", "c"], [0.2, 0.6, 0.2])] == ["b", "a", "c"]


def test_raw_entities_show_the_highest_logit() -> None:
    assert entities(["a", "b"], [Offset(5, "x", 0, 1)], ((-3.0, -2.0),), raw=True) == [
        {"entity": "b", "score": -2.0, "index": 0, "word": "x", "start": 0, "end": 1}
    ]
