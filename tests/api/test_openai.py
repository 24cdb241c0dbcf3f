"""/v1: completions, chat completions, models; whole and in chunks."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import GenerationError, OverloadedError

from .conftest import World, events_of
from .fakes import CHAT_TEMPLATE

PREFIX = "Input validation error: "


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", **fields}


async def test_completion(world: World) -> None:
    body = (await world.post("/v1/completions", completion(max_tokens=50))).json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [{"index": 0, "text": " world, how are you", "logprobs": None, "finish_reason": "stop"}]
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(world.text.encode("hello"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_completion_defaults_are_openais(world: World) -> None:
    await world.post("/v1/completions", completion())
    assert world.last.sampling.max_new_tokens == 16
    assert world.last.sampling.do_sample
    assert world.last.sampling.temperature == 1.0
    await world.post("/v1/completions", completion(temperature=0, top_k=-1))
    assert not world.last.sampling.do_sample


async def test_length_is_length(world: World) -> None:
    body = (await world.post("/v1/completions", completion(max_tokens=2))).json()
    assert body["choices"][0]["finish_reason"] == "length"


async def test_stop_sequence_is_left_out(world: World) -> None:
    for stop in (" how", [" how", "zzz"]):
        body = (await world.post("/v1/completions", completion(stop=stop))).json()
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (" world,", "stop")
        chunks = events_of(await world.post("/v1/completions", completion(stop=stop, stream=True)))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " world,"


async def test_text_that_only_began_like_a_stop_sequence_is_not_lost(world: World) -> None:
    body = completion(stop=["you there"], stream=True, max_tokens=50)
    chunks = events_of(await world.post("/v1/completions", body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " world, how are you"


async def test_several_prompts_and_choices(world: World) -> None:
    body = (await world.post("/v1/completions", completion(prompt=["hello", "a b"], n=2, seed=5))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt for request in world.engine.submitted]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert [request.sampling.seed for request in world.engine.submitted] == [5, 6, 5, 6]
    assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
async def test_prompt_of_token_ids(world: World, prompt: Any) -> None:
    assert (await world.post("/v1/completions", completion(prompt=prompt))).status_code == 200
    assert world.last.prompt == (5, 6)


async def test_echo(world: World) -> None:
    assert (await world.post("/v1/completions", completion(echo=True))).json()["choices"][0]["text"].startswith("hello ")
    chunks = events_of(await world.post("/v1/completions", completion(echo=True, stream=True)))
    assert chunks[0]["choices"][0]["text"] == "hello"


async def test_completion_logprobs(world: World) -> None:
    choice = (await world.post("/v1/completions", completion(logprobs=2))).json()["choices"][0]
    listed = choice["logprobs"]
    assert len(listed["tokens"]) == len(listed["token_logprobs"]) == len(listed["top_logprobs"])
    assert "".join(listed["tokens"]).removesuffix("</s>") == choice["text"]
    assert listed["text_offset"][1] == len(listed["tokens"][0])
    chunks = events_of(await world.post("/v1/completions", completion(logprobs=2, stream=True)))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert [entry["tokens"][0] for entry in streamed] == listed["tokens"]
    assert [entry["text_offset"][0] for entry in streamed] == listed["text_offset"]


async def test_chat(world: World) -> None:
    body = (await world.post("/v1/chat/completions", chat())).json()
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": " world, how are you"}
    assert choice["finish_reason"] == "stop"
    assert world.text.decode(world.last.prompt) == "<|start|>user\nhello<|end|>\n<|start|>assistant"


async def test_chat_content_in_parts(world: World) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await world.post("/v1/chat/completions", chat(messages=[{"role": "user", "content": parts}]))
    assert "user\nhello<|end|>" in world.text.decode(world.last.prompt)


async def test_chat_logprobs(world: World) -> None:
    body = (await world.post("/v1/chat/completions", chat(logprobs=True, top_logprobs=1))).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert len(content[0]["top_logprobs"]) == 1


async def test_chat_stream(world: World) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    response = await world.post("/v1/chat/completions", body)
    events = events_of(response)
    assert events[-1] == "[DONE]"
    *chunks, usage = events[:-1]
    assert len({chunk["id"] for chunk in events[:-1]}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == " world, how are you"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(world.text.encode(" world, how are you")) + 1


async def test_chat_stream_of_several_choices(world: World) -> None:
    chunks = events_of(await world.post("/v1/chat/completions", chat(stream=True, n=3)))[:-1]
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in mine) == " world, how are you"
        assert mine[-1]["finish_reason"] == "stop"


async def test_model_may_be_an_adapter(world: World) -> None:
    record = world.add("org/support")
    await world.post("/v1/completions", completion(model="org/support"))
    assert world.last.adapters == (record.digest,)


async def test_user_is_the_bound_user(world: World) -> None:
    mine, other = world.add("mine", part="ia3"), world.add("other")
    world.store.bind_user("default", "alice", "mine")
    await world.post("/v1/chat/completions", chat(user="alice"))
    assert world.last.adapters == (mine.digest,)
    await world.post("/v1/chat/completions", chat(user="alice", model="other"))
    assert world.last.adapters == (other.digest,)
    await world.post("/v1/chat/completions", chat(user="alice", model="other", compose=True))
    assert world.last.adapters == (other.digest, mine.digest)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("model", ["nope", "../x", "a b"])
async def test_unknown_model_in_openais_words(world: World, path: str, model: str) -> None:
    response = await world.post(f"/v1/{path}", {**chat(), **completion(), "model": model})
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": f"The model `{model}` does not exist.",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "`prompt` cannot be empty"),
        ({"prompt": []}, "`prompt` cannot be empty"),
        ({"prompt": ["a", ""]}, "`prompt` cannot be empty"),
        ({"prompt": [5000]}, "`prompt` token ids must be >= 0 and < "),
        ({"prompt": [-1]}, "`prompt` token ids must be >= 0 and < "),
        ({"prompt": ["a"] * 17}, "`n` must be > 0 and <= 0. Given: 1"),
        ({"n": 17}, "`n` must be > 0 and <= 16. Given: 17"),
        ({"n": 0}, "`n` must be > 0 and <= 16. Given: 0"),
        ({"best_of": 2}, "`best_of` must equal `n`. Given: 2"),
        ({"logprobs": 21}, "`logprobs` must be >= 0 and <= 20. Given: 21"),
        ({"suffix": "x"}, "`suffix` is not supported"),
        ({"logit_bias": {"5": 1.0}}, "`logit_bias` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"echo": True, "logprobs": 1}, "`echo` cannot be combined with `logprobs`"),
        ({"max_tokens": 100}, "`inputs` tokens + `max_new_tokens` must be <= 100. "),
        ({"temperature": -1}, "`temperature` must be non-negative"),
        ({"model": None}, "`model` must be a string. Given: null"),
        ({"seed": "1"}, '`seed` must be an integer. Given: "1"'),
    ],
)
async def test_completions_refuse(world: World, fields: dict[str, Any], message: str) -> None:
    response = await world.post("/v1/completions", completion(**fields))
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["message"].startswith(PREFIX + message)
    assert (error["type"], error["code"]) == ("invalid_request_error", "validation")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "`messages` cannot be empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "`messages` do not fit the chat template: no such role"),
        ({"messages": [{"content": "x"}]}, "`messages[0].role` is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "`messages[0].content` may hold text only. Given: a part of type 'image_url'",
        ),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"top_logprobs": 1}, "`top_logprobs` needs `logprobs` to be true"),
    ],
)
async def test_chat_refuses(world: World, fields: dict[str, Any], message: str) -> None:
    response = await world.post("/v1/chat/completions", chat(**fields))
    assert response.status_code == 422
    assert response.json()["error"]["message"] == PREFIX + message


async def test_chat_without_a_template(world: World) -> None:
    tokenizer = world.text._chat
    tokenizer.chat_template = None
    try:
        response = await world.post("/v1/chat/completions", chat())
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert (response.status_code, response.json()["error"]["code"]) == (422, "validation")


async def test_malformed_json_in_openais_shape(world: World) -> None:
    response = await world.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_overloaded_cancels_the_choices_already_accepted(world: World) -> None:
    accept, world.engine.silent = world.engine.submit, True

    def one_only(request: Any) -> None:
        if world.engine.submitted:
            raise OverloadedError
        accept(request)

    world.engine.submit = one_only  # type: ignore[method-assign]
    response = await world.post("/v1/completions", completion(n=3))
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"] == "1"
    assert world.engine.cancelled == [world.last.id]


async def test_failure_of_one_choice_fails_the_request(world: World) -> None:
    world.engine.failure, world.engine.failure_after = GenerationError("out of luck"), 1
    response = await world.post("/v1/completions", completion(n=2))
    assert response.status_code == 424
    assert world.engine.stats().running == 0
    events = events_of(await world.post("/v1/completions", completion(stream=True)))
    assert events[-1]["error"]["message"] == "out of luck"


async def test_models(world: World) -> None:
    world.add("org/support")
    listed = (await world.http.get("/v1/models")).json()
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [("tiny", None), ("org/support", "tiny")]
    for name in ("tiny", "org/support"):
        assert (await world.http.get(f"/v1/models/{name}")).json()["id"] == name
    assert (await world.http.get("/v1/models/nope")).json()["error"]["code"] == "model_not_found"
