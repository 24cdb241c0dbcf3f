"""Streams: one event per token, whole characters, where stop sequences end them, and failures before and after they began."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.schemas import StreamResponse
from server.errors import GenerationError

from .conftest import PREFIX, World, events_of


async def test_stream_has_one_event_per_token(world: World) -> None:
    response = await world.post("/generate_stream", {"inputs": "hello", "parameters": {"details": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    events = [StreamResponse.model_validate(event, strict=True) for event in events_of(response)]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    shown = "".join(event.token.text for event in events if not event.token.special)
    assert events[-1].generated_text == shown == " world, how are you"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "eos_token"
    assert events[-1].details.generated_tokens == len(events)


async def test_stream_without_details(world: World) -> None:
    last = events_of(await world.post("/generate_stream", {"inputs": "hello"}))[-1]
    assert last["details"] is None
    assert last["generated_text"]


@pytest.mark.parametrize("path", ["/", "/generate"])
async def test_stream_flag(world: World, path: str) -> None:
    response = await world.post(path, {"inputs": "hello", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events_of(response)[-1]["generated_text"] == " world, how are you"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
async def test_not_while_streaming(world: World, parameters: dict[str, Any], message: str) -> None:
    response = await world.post("/generate_stream", {"inputs": "a", "parameters": parameters})
    assert (response.status_code, response.json()["error"]) == (422, PREFIX + message)


async def test_stream_never_splits_a_character(world: World) -> None:
    world.says("a\N{GRINNING FACE}b\N{FAMILY}é")
    events = events_of(await world.post("/generate_stream", {"inputs": "hello"}))
    texts = [event["token"]["text"] for event in events]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert texts.count("") >= 6  # the bytes that finish no character
    assert events[-1]["generated_text"] == "a\N{GRINNING FACE}b\N{FAMILY}é"


async def test_half_a_character_at_the_end_is_dropped(world: World) -> None:
    world.says("a\N{GRINNING FACE}")
    response = await world.generate(max_new_tokens=3)
    assert response.json() == {"generated_text": "a"}


async def test_failure_before_the_first_token_has_its_status(world: World) -> None:
    world.engine.failure = GenerationError("the adapter cannot be loaded")
    response = await world.post("/generate_stream", {"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (424, "generation")


async def test_failure_later_is_an_event(world: World) -> None:
    world.engine.failure, world.engine.failure_after = GenerationError("out of luck"), 2
    response = await world.post("/generate_stream", {"inputs": "a"})
    assert response.status_code == 200
    events = events_of(response)
    assert len(events) == 3
    assert events[-1] == {"error": "out of luck", "error_type": "generation"}


# -- stop sequences --------------------------------------------------------------------------------------------------


async def test_stop_sequence_stays_in_the_text_and_nothing_follows_it(world: World) -> None:
    world.says(" world, how are you")
    response = await world.generate(stop=["how a"], details=True)
    answer = response.json()
    assert answer["generated_text"] == " world, how a"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert "".join(token["text"] for token in answer["details"]["tokens"]) == " world, how a"
    assert world.engine.cancelled == [world.last.id]


async def test_stop_sequence_ends_a_stream(world: World) -> None:
    events = events_of(await world.post("/generate_stream", {"inputs": "a", "parameters": {"stop": [", "]}}))
    assert events[-1]["generated_text"] == " world, "
    assert "".join(event["token"]["text"] for event in events) == " world, "
