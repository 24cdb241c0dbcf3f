"""/generate and its kin: shapes, parameters, refusals, streaming, disconnects, time limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.api.schemas import GenerateResponse, StreamResponse
from server.errors import GenerationError, OverloadedError

from .conftest import Make, World, events_of

PREFIX = "Input validation error: "


async def test_generate_answers_text_alone_unless_details_are_asked_for(world: World) -> None:
    response = await world.generate(max_new_tokens=50)
    assert response.status_code == 200
    assert response.json() == {"generated_text": " world, how are you"}


async def test_details_hold_every_token(world: World) -> None:
    response = await world.generate(max_new_tokens=50, details=True)
    answer = GenerateResponse.model_validate(response.json(), strict=True)
    assert answer.details is not None
    assert "".join(token.text for token in answer.details.tokens if not token.special) == answer.generated_text
    assert answer.details.tokens[-1].special
    assert answer.details.tokens[-1].text == "</s>"
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert answer.details.prompt_tokens == len(world.text.encode("hello"))
    assert answer.details.seed is None
    assert answer.details.prefill == []


async def test_length_ends_a_generation(world: World) -> None:
    details = (await world.generate(max_new_tokens=2, details=True)).json()["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 2)


async def test_prefill_tokens(world: World) -> None:
    response = await world.generate("hello world", decoder_input_details=True)
    prefill = response.json()["details"]["prefill"]
    assert "".join(token["text"] for token in prefill) == "hello world"
    assert prefill[0]["logprob"] is None


async def test_alternatives_under_both_names(world: World) -> None:
    lorax = (await world.generate(return_k_alternatives=2, details=True)).json()["details"]
    assert [len(token["alternative_tokens"]) for token in lorax["tokens"]] == [2] * len(lorax["tokens"])
    assert "top_tokens" not in lorax
    tgi = (await world.generate(top_n_tokens=3, details=True)).json()["details"]
    assert {len(top) for top in tgi["top_tokens"]} == {3}
    assert set(tgi["top_tokens"][0][0]) == {"id", "text", "logprob", "special"}


async def test_return_full_text(world: World) -> None:
    assert (await world.generate("hello", return_full_text=True)).json()["generated_text"].startswith("hello world,")


async def test_compat_route_answers_a_list(world: World) -> None:
    response = await world.post("/", {"inputs": "hello"})
    assert response.json() == [{"generated_text": " world, how are you"}]


async def test_max_new_tokens_defaults_to_what_fits(world: World) -> None:
    await world.post("/generate", {"inputs": "hello"})
    assert world.last.sampling.max_new_tokens == 100 - len(world.text.encode("hello"))


async def test_null_means_default(world: World) -> None:
    body = {"inputs": "hello", "parameters": {"details": None, "stop": None, "do_sample": None, "watermark": None}}
    assert (await world.post("/generate", body)).status_code == 200
    assert (await world.post("/generate", {"inputs": "hello", "parameters": None})).status_code == 200


async def test_headers(world: World) -> None:
    world.add("support")
    response = await world.generate(adapter_id="support")
    headers = response.headers
    assert headers["x-model-id"] == "tiny"
    assert headers["x-adapter-id"] == "support"
    assert headers["x-compute-characters"] == "5"
    assert int(headers["x-prompt-tokens"]) + int(headers["x-generated-tokens"]) == int(headers["x-total-tokens"])
    assert headers["x-queue-time"] == "250"
    for name in ("total", "validation", "inference", "compute"):
        assert int(headers[f"x-{name}-time"]) >= 0
    for name in ("x-time-per-token", "x-time-to-first-token", "x-time-per-output-token"):
        assert int(headers[name]) >= 0


async def test_request_id_is_the_clients_if_sane(world: World) -> None:
    assert (await world.http.get("/livez", headers={"X-Request-Id": "abc-1"})).headers["x-request-id"] == "abc-1"
    made_up = (await world.http.get("/livez", headers={"X-Request-Id": "a b\x7f"})).headers["x-request-id"]
    assert len(made_up) == 32
    refused = await world.http.get("/nowhere", headers={"X-Request-Id": "abc-2"})
    assert refused.headers["x-request-id"] == "abc-2"


# -- sampling parameters reach the engine ----------------------------------------------------------------------------


async def test_greedy_by_default(world: World) -> None:
    await world.generate()
    assert not world.last.sampling.do_sample


@pytest.mark.parametrize("parameters", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"typical_p": 0.9}])
async def test_sampling_is_implied(world: World, parameters: dict[str, Any]) -> None:
    await world.generate(**parameters)
    assert world.last.sampling.do_sample


async def test_temperature_zero_is_greedy(world: World) -> None:
    await world.generate(temperature=0, do_sample=True)
    assert not world.last.sampling.do_sample


async def test_seed_is_kept_or_drawn(world: World) -> None:
    response = await world.generate(seed=7, do_sample=True, details=True)
    assert (world.last.sampling.seed, response.json()["details"]["seed"]) == (7, 7)
    await world.generate(do_sample=True)
    first = world.last.sampling.seed
    await world.generate(do_sample=True)
    assert world.last.sampling.seed != first


async def test_every_parameter_arrives(world: World) -> None:
    await world.generate(
        do_sample=True,
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        typical_p=0.6,
        repetition_penalty=1.5,
        frequency_penalty=-2,
        presence_penalty=2.0,
        seed=2**64 - 1,
        ignore_eos_token=True,
        max_new_tokens=3,
        top_n_tokens=2,
        decoder_input_details=True,
    )
    sampling = world.last.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 4, 0.5, 0.6)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -2.0, 2.0)
    assert (sampling.seed, sampling.ignore_eos, sampling.max_new_tokens) == (2**64 - 1, True, 3)
    assert (sampling.top_n, sampling.prompt_logprobs) == (2, True)


async def test_truncate_keeps_the_end(world: World) -> None:
    await world.generate("the cat sat on the mat", truncate=2)
    assert world.last.prompt == tuple(world.text.encode("the cat sat on the mat")[-2:])


# -- refusals --------------------------------------------------------------------------------------------------------

TOTAL = "`inputs` tokens + `max_new_tokens` must be <= 100. "


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -0.1}, "`temperature` must be non-negative"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"top_p": 1.1}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"max_new_tokens": 100}, TOTAL + "Given: 1 `inputs` tokens and 100 `max_new_tokens`"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` sequences cannot be empty"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 100. Given: 0"),
        ({"truncate": 100}, "`truncate` must be strictly positive and less than 100. Given: 100"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64. Given: -1"),
        ({"seed": 2**64}, f"`seed` must be >= 0 and < 2^64. Given: {2**64}"),
        ({"best_of": 2}, "`best_of` must be > 0 and <= 1. Given: 2"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 1. Given: 0"),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
        ({"return_k_alternatives": 21}, "`return_k_alternatives` must be >= 0 and <= 20. Given: 21"),
        ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 20. Given: -1"),
        ({"watermark": True}, "`watermark` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"grammar": {"type": "json", "value": "{}"}}, "`grammar` is not supported"),
        ({"adapter_source": "hub"}, "`adapter_source` is not supported"),
        ({"temperature": "0.5"}, '`temperature` must be a number. Given: "0.5"'),
        ({"temperature": True}, "`temperature` must be a number. Given: true"),
        ({"top_k": 1.5}, "`top_k` must be an integer. Given: 1.5"),
        ({"top_k": True}, "`top_k` must be an integer. Given: true"),
        ({"do_sample": 1}, "`do_sample` must be a boolean. Given: 1"),
        ({"stop": "a"}, '`stop` must be a list. Given: "a"'),
        ({"stop": [1]}, "`stop[0]` must be a string. Given: 1"),
        ({"adapter_id": 5}, "`adapter_id` must be a string. Given: 5"),
    ],
)
async def test_parameters_out_of_range(world: World, parameters: dict[str, Any], message: str) -> None:
    response = await world.generate("a", **parameters)
    assert response.status_code == 422
    assert response.json() == {"error": PREFIX + message, "error_type": "validation"}
    assert world.engine.submitted == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"inputs": ""}', 422, PREFIX + "`inputs` cannot be empty"),
        (b"{}", 422, PREFIX + "`inputs` is required"),
        (b'{"inputs": 5}', 422, PREFIX + "`inputs` must be a string. Given: 5"),
        (b'{"inputs": "a", "parameters": []}', 422, PREFIX + "`parameters` must be an object. Given: []"),
        (b'{"inputs": "a", "stream": "yes"}', 422, PREFIX + '`stream` must be a boolean. Given: "yes"'),
        (b"[]", 422, PREFIX + "the request body must be an object. Given: []"),
        (b'{"inputs": "a"', 400, "the request body is not JSON: EOF while parsing an object at line 1 column 14"),
        (b"", 400, "the request body is not JSON: EOF while parsing a value at line 1 column 0"),
        (b'{"inputs": "\xff"}', 400, "the request body is not JSON: "),
        (b"[" * 10_000, 400, "the request body is not JSON: recursion limit exceeded"),
        (b'{"inputs": "a\\ud800"}', 400, "the request body is not JSON: "),
        (
            b'{"inputs": "a", "parameters": {"temperature": 1e999}}',
            422,
            PREFIX + "`temperature` must be a finite number. Given: Infinity",
        ),
    ],
)
async def test_bodies_that_are_no_request(world: World, body: bytes, status: int, message: str) -> None:
    response = await world.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"].startswith(message)
    assert response.json()["error_type"] == "validation"


async def test_body_must_be_declared_as_json(world: World) -> None:
    response = await world.http.post("/generate", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]


@pytest.mark.parametrize("declared", [True, False])
async def test_body_over_the_limit(make: Make, declared: bool) -> None:
    world = make(max_request_mb=0.01)

    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 1000

    content = b"x" * 20_000 if declared else chunks()
    response = await world.http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error_type"]) == (413, "too_large")


async def test_prompt_longer_than_the_context(world: World) -> None:
    response = await world.post("/generate", {"inputs": "z" * 1_000_000})
    assert response.status_code == 422
    assert response.json()["error"] == PREFIX + "`inputs` must have less than 100 tokens. Given: 1000000"


async def test_virtual_tokens_take_room(world: World) -> None:
    world.add("soft", virtual=60)
    response = await world.generate("a", adapter_id="soft", max_new_tokens=40)
    expected = TOTAL + "Given: 61 `inputs` tokens (60 of them are its adapter's) and 40 `max_new_tokens`"
    assert response.json()["error"] == PREFIX + expected
    assert (await world.generate("a", adapter_id="soft", max_new_tokens=39)).status_code == 200
    await world.generate("a", adapter_id="soft")
    assert world.last.sampling.max_new_tokens == 39


async def test_nul_and_astral_characters_are_text(world: World) -> None:
    body = b'{"inputs": "a\\u0000\\ud83d\\ude00"}'
    response = await world.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert world.text.decode(world.last.prompt) == "a\x00\N{GRINNING FACE}"


async def test_overloaded_is_429_with_retry_after(world: World) -> None:
    world.engine.refusal = OverloadedError(retry_after=2.5)
    for path in ("/generate", "/generate_stream"):
        response = await world.post(path, {"inputs": "a"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


async def test_not_ready_is_503(world: World) -> None:
    for phase in (lambda: world.readiness.loading(40), world.readiness.draining):
        phase()
        response = await world.generate()
        assert (response.status_code, response.json()["error_type"]) == (503, "unavailable")


async def test_failed_generation_is_424(world: World) -> None:
    world.engine.failure, world.engine.failure_after = GenerationError("the adapter cannot be loaded"), 2
    response = await world.generate()
    assert response.status_code == 424
    assert response.json() == {"error": "the adapter cannot be loaded", "error_type": "generation"}


async def test_request_that_takes_too_long_is_ended_and_cancelled(make: Make) -> None:
    world = make(request_timeout=0.05)
    world.engine.silent = True
    response = await world.generate()
    assert response.status_code == 424
    assert response.json()["error"] == "the request took longer than 0.05 seconds"
    assert world.engine.cancelled == [world.last.id]


async def test_bug_is_an_opaque_500(world: World) -> None:
    record = world.add("support")
    world.engine.crash = bug = RuntimeError("secret path /etc")
    with capture_logs() as logs:
        response = await world.http.get(f"/adapters/{record.name}", headers={"X-Request-Id": "r-1"})
    assert [(line["request_id"], line["exc_info"]) for line in logs] == [("r-1", bug)]
    assert response.status_code == 500
    assert response.json() == {
        "error": "internal error; the server's log has it under request id r-1",
        "error_type": "internal",
    }


async def test_unknown_routes_and_methods(world: World) -> None:
    missing = await world.http.get("/nowhere")
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found", "error_type": "not_found"})
    wrong = await world.http.get("/generate")
    assert (wrong.status_code, wrong.json()["error_type"]) == (405, "method_not_allowed")


# -- which adapters --------------------------------------------------------------------------------------------------


async def test_adapter_by_parameter_or_at_top_level(world: World) -> None:
    record = world.add("org/support")
    for body in (
        {"inputs": "a", "parameters": {"adapter_id": "org/support"}},
        {"inputs": "a", "adapter_id": "org/support"},
        {"inputs": "a", "adapter_id": "org/support", "parameters": {"adapter_id": "org/support"}},
    ):
        assert (await world.post("/generate", body)).status_code == 200
        assert world.last.adapters == (record.digest,)
        assert world.last.tenant == "default"


async def test_adapter_named_twice_must_agree(world: World) -> None:
    response = await world.post("/generate", {"inputs": "a", "adapter_id": "x", "parameters": {"adapter_id": "y"}})
    assert response.json()["error"] == PREFIX + "`adapter_id` is given twice, with different values"


@pytest.mark.parametrize("adapter_id", ["", "__base_model__", None])
async def test_base_model_by_its_names(world: World, adapter_id: str | None) -> None:
    assert (await world.generate(adapter_id=adapter_id)).status_code == 200
    assert world.last.adapters == ()


@pytest.mark.parametrize("adapter_id", ["nope", "../../etc/passwd", "a b", "x" * 5000, "a\x00b"])
async def test_unknown_adapter_is_404(world: World, adapter_id: str) -> None:
    for path in ("/generate", "/generate_stream"):
        response = await world.post(path, {"inputs": "a", "adapter_id": adapter_id})
        assert response.status_code == 404
        assert response.json()["error_type"] == "not_found"
        assert "does not exist" in response.json()["error"]


async def test_user_goes_through_the_bound_adapter(world: World) -> None:
    mine, other = world.add("mine"), world.add("other")
    world.store.bind_user("default", "alice", "mine")
    await world.post("/generate", {"inputs": "a", "user_id": "alice"})
    assert world.last.adapters == (mine.digest,)
    await world.post("/generate", {"inputs": "a"}, **{"X-User-Id": "alice"})
    assert world.last.adapters == (mine.digest,)
    await world.post("/generate", {"inputs": "a", "user_id": "alice", "adapter_id": "other"})
    assert world.last.adapters == (other.digest,)
    await world.post("/generate", {"inputs": "a", "user_id": "alice", "adapter_id": ""})
    assert world.last.adapters == ()
    await world.post("/generate", {"inputs": "a", "user_id": "nobody we know"})
    assert world.last.adapters == ()


async def test_compose_applies_both(world: World) -> None:
    mine, other = world.add("mine", part="ia3"), world.add("other")
    world.store.bind_user("default", "alice", "mine")
    body: dict[str, Any] = {"inputs": "a", "user_id": "alice", "parameters": {"adapter_id": "other", "compose": True}}
    response = await world.post("/generate", body)
    assert world.last.adapters == (other.digest, mine.digest)
    assert response.headers["x-adapter-id"] == "other,mine"
    body["parameters"]["adapter_id"] = "mine"
    await world.post("/generate", body)
    assert world.last.adapters == (mine.digest,)


async def test_user_of_a_deleted_adapter_gets_404(world: World) -> None:
    world.add("mine")
    world.store.bind_user("default", "alice", "mine")
    world.store.delete("default", "mine")
    assert (await world.post("/generate", {"inputs": "a", "user_id": "alice"})).status_code == 404


async def test_new_version_is_used_by_the_next_request(world: World) -> None:
    first = world.add("support")
    await world.generate(adapter_id="support")
    assert world.last.adapters == (first.digest,)
    with world.store.stage() as staged:
        staged.write("adapter_config.json", [b"another"])
        second, _ = world.store.publish(staged, tenant="default", name="support", method="lora", parts=("lora",), details={})
    await world.generate(adapter_id="support")
    assert world.last.adapters == (second.digest,)


# -- streaming -------------------------------------------------------------------------------------------------------


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


# -- clients that leave ----------------------------------------------------------------------------------------------


class Connection:
    """An ASGI connection whose client can hang up."""

    def __init__(self, path: str, body: Any) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def send(self, message: Any) -> None:
        await self.sent.put(message)

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_client_that_leaves_while_waiting_is_cancelled(world: World, path: str) -> None:
    world.engine.silent = True
    connection = Connection(path, {"inputs": "a", "prompt": "a", "model": "tiny"})
    serving = asyncio.create_task(world.app(connection.scope, connection.incoming.get, connection.send))
    await asyncio.to_thread(world.engine.wait_until, lambda: len(world.engine.submitted) == 1)
    connection.hang_up()
    await asyncio.wait_for(serving, 10)
    assert world.engine.cancelled == [world.last.id]
    assert 'adapterd_requests_total{outcome="cancelled"} 1.0' in (await world.http.get("/metrics")).text


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
async def test_client_that_leaves_a_stream_is_cancelled(world: World, path: str) -> None:
    world.says("a" * 90)
    world.engine.pause_after = 2
    connection = Connection(path, {"inputs": "a", "prompt": "a", "model": "tiny", "max_tokens": 50, "stream": True})
    serving = asyncio.create_task(world.app(connection.scope, connection.incoming.get, connection.send))
    assert (await connection.sent.get())["type"] == "http.response.start"
    await asyncio.to_thread(world.engine.wait_until, lambda: world.engine.held)
    connection.hang_up()
    await asyncio.wait_for(serving, 10)
    assert world.engine.cancelled == [world.last.id]
    assert world.engine.stats().running == 0


async def test_tokenize(world: World) -> None:
    tokens = (await world.post("/tokenize", {"inputs": "héllo world"})).json()
    assert [token["id"] for token in tokens] == world.text.encode("héllo world")
    for token in tokens:
        assert token["text"] == "héllo world"[token["start"] : token["stop"]]
