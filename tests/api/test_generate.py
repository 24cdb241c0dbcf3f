"""/generate and its kin: shapes of the answers, headers, and the parameters that reach the engine."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.schemas import GenerateResponse

from .conftest import World


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


async def test_tokenize(world: World) -> None:
    tokens = (await world.post("/tokenize", {"inputs": "héllo world"})).json()
    assert [token["id"] for token in tokens] == world.text.encode("héllo world")
    for token in tokens:
        assert token["text"] == "héllo world"[token["start"] : token["stop"]]


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


async def test_nul_and_astral_characters_are_text(world: World) -> None:
    body = b'{"inputs": "a\\u0000\\ud83d\\ude00"}'
    response = await world.http.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert world.text.decode(world.last.prompt) == "a\x00\N{GRINNING FACE}"
