"""`task_id`, and templates around an input: what reaches the engine on every route, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.prompts import PLAIN, Frame, frame_of
from server.model.text import Text
from server.recipes import Join, Task

from .conftest import World
from .fakes import tiny_tokenizer

PREFIX = "Input validation error: "
TEMPLATE = {"headed": True, "tail": " sat"}
HEAD = {"task_type": "SEQ_CLS", "pooling": "last", "labels": ["a", "b", "c"]}


def body(route: str, adapter: str, **more: Any) -> dict[str, Any]:
    """The smallest body of each route that goes through an adapter."""
    match route:
        case "/v1/completions":
            return {"model": adapter, "prompt": "hello", **more}
        case "/v1/chat/completions":
            return {"model": adapter, "messages": [{"role": "user", "content": "hello"}], **more}
    return {"inputs": "hello", "adapter_id": adapter, **more}


def refusal(answer: dict[str, Any]) -> str:
    error = answer["error"]
    return str(error["message"] if isinstance(error, dict) else error)


ROUTES = ("/generate", "/", "/v1/completions", "/v1/chat/completions", "/classify", "/embed")


# -- task_id ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
async def test_a_task_reaches_the_engine_as_an_adapter_of_its_own(world: World, route: str) -> None:
    record = world.add("many", virtual=3, tasks=4, head=HEAD)
    response = await world.post(route, body(route, "many", task_id=2))
    assert response.status_code == 200
    recipe = Task(record.digest, 2)
    assert (world.last.adapters, world.last.recipes) == ((recipe.digest,), (recipe,))


@pytest.mark.parametrize("route", ["/generate", "/classify", "/embed"])
async def test_a_task_may_be_a_parameter(world: World, route: str) -> None:
    record = world.add("many", tasks=4, head=HEAD)
    for more in ({"parameters": {"task_id": 0}}, {"parameters": {"task_id": 0}, "task_id": 0}):
        assert (await world.post(route, body(route, "many", **more))).status_code == 200
        assert world.last.recipes == (Task(record.digest, 0),)
    response = await world.post(route, body(route, "many", parameters={"task_id": 0}, task_id=1))
    assert (response.status_code, refusal(response.json())) == (422, f"{PREFIX}`task_id` is given twice, with different values")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("adapter", "task", "message"),
    [
        ("many", None, "`task_id` is required: 'many' has 4 tasks, 0 to 3"),
        ("many", 4, "`task_id` must be >= 0 and < 4 for 'many'. Given: 4"),
        ("many", -1, "`task_id` must be >= 0 and < 4 for 'many'. Given: -1"),
        ("one", 0, "`task_id` needs an adapter with several tasks. Given: 0"),
        ("", 1, "`task_id` needs an adapter with several tasks. Given: 1"),
    ],
)
async def test_a_task_that_cannot_be_meant_is_refused(
    world: World, route: str, adapter: str, task: int | None, message: str
) -> None:
    world.add("many", tasks=4, head=HEAD)
    world.add("one", head=HEAD)
    response = await world.post(route, body(route, adapter, task_id=task))
    assert (response.status_code, refusal(response.json())) == (422, PREFIX + message)
    assert world.engine.submitted == []


@pytest.mark.parametrize("task", ["1", 1.5, True, [1]])
async def test_a_task_of_the_wrong_type_is_refused(world: World, task: Any) -> None:
    world.add("many", tasks=4)
    for given in ({"task_id": task}, {"parameters": {"task_id": task}}):
        response = await world.post("/generate", body("/generate", "many", **given))
        assert response.status_code == 422
        assert "task_id" in refusal(response.json())


async def test_the_task_of_a_users_own_adapter(world: World) -> None:
    record = world.add("many", virtual=3, tasks=4)
    world.store.bind_user("default", "alice", "many")
    assert (await world.post("/generate", {"inputs": "hello", "user_id": "alice", "task_id": 3})).status_code == 200
    assert world.last.recipes == (Task(record.digest, 3),)


async def test_a_task_composed_with_another_prefix(world: World) -> None:
    many, other = world.add("many", virtual=3, tasks=4), world.add("other", virtual=2)
    world.store.bind_user("default", "alice", "other")
    parameters = {"adapter_id": "many", "task_id": 1, "compose": True}
    assert (await world.post("/generate", {"inputs": "hello", "user_id": "alice", "parameters": parameters})).status_code == 200
    assert world.last.recipes == (Join((Task(many.digest, 1), other.digest)),)


# -- templates -------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A tokenizer that opens every text with <s>."""
    text = Text(tiny_tokenizer(bos=True))
    monkeypatch.setattr(world.text, "_backend", text._backend)
    monkeypatch.setattr(world.text, "_opening", text._opening)
    return world


def pieces(text: Text, *inner: str) -> tuple[int, ...]:
    return tuple(id for piece in inner for id in text.encode(piece, special=False))


@pytest.mark.parametrize("route", ["/generate", "/v1/completions", "/classify", "/embed"])
@pytest.mark.parametrize("headed", [True, False])
async def test_the_input_is_put_between_head_and_tail_piece_by_piece(opened: World, route: str, headed: bool) -> None:
    opened.add("framed", virtual=3 * headed, template={"headed": headed, "tail": " sat"}, head=HEAD)
    assert (await opened.post(route, body(route, "framed"))).status_code == 200
    opening = () if headed else (opened.text.encode("")[0],)
    assert opened.last.prompt == (*opening, *pieces(opened.text, "hello", " sat"))


async def test_the_pieces_are_the_plain_prompts_own(opened: World) -> None:
    frame = Frame(headed=True, tail=" sat")
    whole = [*opened.text.encode_piece("the cat", first=True), *frame.ids(opened.text, " on it", None, special=True)]
    assert whole == [*opened.text.encode("the cat"), *pieces(opened.text, " on it", " sat")]


async def test_truncation_leaves_the_template_whole(opened: World) -> None:
    opened.add("framed", virtual=3, template=TEMPLATE)
    await opened.generate("the cat sat on the mat", adapter_id="framed", truncate=2)
    given = pieces(opened.text, "the cat sat on the mat")
    assert opened.last.prompt == (*given[-2:], *pieces(opened.text, " sat"))


async def test_a_prompt_of_ids_gets_the_tail_too(opened: World) -> None:
    opened.add("framed", virtual=3, template=TEMPLATE)
    response = await opened.post("/v1/completions", {"model": "framed", "prompt": [40, 41], "echo": True})
    assert opened.last.prompt == (40, 41, *pieces(opened.text, " sat"))
    assert response.json()["choices"][0]["text"].startswith(opened.text.decode([40, 41]))
    assert not response.json()["choices"][0]["text"].startswith(opened.text.decode([40, 41]) + " sat")


async def test_a_chat_stands_in_the_template_as_it_is_rendered(opened: World) -> None:
    opened.add("framed", virtual=3, template=TEMPLATE)
    messages = [{"role": "user", "content": "hello"}]
    await opened.post("/v1/chat/completions", {"model": "framed", "messages": messages})
    assert opened.last.prompt == pieces(opened.text, opened.text.chat(messages), " sat")


async def test_a_long_input_is_framed_as_well(opened: World) -> None:
    opened.add("framed", template={"headed": True, "tail": "!"})
    await opened.generate("hello world, " * 800, adapter_id="framed", truncate=5, max_new_tokens=1)
    assert opened.last.prompt[-1:] == pieces(opened.text, "!")
    assert len(opened.last.prompt) == 6


async def test_the_tail_counts_for_the_room_a_request_has(opened: World) -> None:
    opened.add("framed", virtual=3, template={"headed": True, "tail": " sat" * 99})
    response = await opened.generate("hello", adapter_id="framed")
    assert response.status_code == 422
    assert "`inputs` must have less than 100 tokens" in refusal(response.json())


async def test_token_labels_are_those_of_the_input_alone(opened: World) -> None:
    opened.add("framed", virtual=3, template=TEMPLATE, head={**HEAD, "task_type": "TOKEN_CLS"})
    opened.engine.scorer = lambda request: tuple((1.0, 0.0, 0.0) for _ in request.prompt)
    found = (await opened.post("/classify", {"inputs": "the cat", "adapter_id": "framed"})).json()
    assert "".join(entity["word"] for entity in found) == "the cat"


async def test_two_templates_cannot_both_stand_around_an_input(world: World) -> None:
    world.add("framed", template=TEMPLATE)
    world.add("other", template=TEMPLATE)
    world.store.bind_user("default", "alice", "other")
    parameters = {"adapter_id": "framed", "compose": True}
    response = await world.post("/generate", {"inputs": "hello", "user_id": "alice", "parameters": parameters})
    assert (response.status_code, refusal(response.json())) == (422, f"{PREFIX}`compose` takes at most one discrete prompt")


@pytest.mark.parametrize(
    "details",
    [{}, {"template": None}, {"template": "Review: {input}"}, {"verbalizer": {"a": ["b"]}}],
)
def test_a_record_without_a_template_frames_nothing(details: dict[str, Any]) -> None:
    assert frame_of(details) is PLAIN


def test_a_plain_frame_is_the_tokenizers_own_way() -> None:
    text = Text(tiny_tokenizer(bos=True))
    assert PLAIN.ids(text, "the cat", None, special=True) == text.encode("the cat")
    assert PLAIN.ids(text, "the cat", 1, special=False) == text.encode("the cat", truncate=1, special=False)
    assert PLAIN.offsets(text, "the cat") == text.offsets("the cat")
