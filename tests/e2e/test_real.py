"""The real base model behind a real server, with the demo's users: parity with PEFT, what it knows, and who says it how."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.demo import DEMO
from server.methods import METHODS
from tests.conftest import Serve
from tests.e2e.fleet import RECIPES, Answer, Fleet, Member
from tests.e2e.test_mixed import TOLERANCE, steps_with
from tests.process import DEADLINE, ServerProcess

pytestmark = pytest.mark.real

MODEL = "smollm2-135m-instruct"
PROMPTS = ("The quick brown fox", "Once upon a time there was a small robot who")
NEW = 6
USERS = {demo.user_id: demo for demo in DEMO if demo.user_id is not None}


@pytest.fixture(scope="module")
def server(serve: Serve, smollm2: Path) -> ServerProcess:
    return serve("--demo")


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Fleet:
    """The very files that the server has, in fp32."""
    return Fleet(smollm2, strength=0.02)


@pytest.fixture(scope="module")
def fleet(oracle: Fleet) -> list[Member]:
    """Each family once, LoRA and bottlenecks more often; they take turns with the prompts."""
    return [oracle.make(f"real{i}", recipe, i, [PROMPTS[i % 2]], NEW) for i, recipe in enumerate(RECIPES)]


async def at_once(url: str, bodies: Sequence[tuple[str, Any]]) -> list[Any]:
    """The answers to (route, body) that are all sent at the same time."""
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE) as http:
        responses = await asyncio.gather(*(http.post(route, json=body) for route, body in bodies))
    for response in responses:
        assert response.status_code == 200, response.text
    return [response.json() for response in responses]


def generation(adapter: str | None, prompt: str) -> tuple[str, Any]:
    parameters = {"adapter_id": adapter, "max_new_tokens": NEW, "ignore_eos_token": True, "details": True}
    return "/generate", {"inputs": prompt, "parameters": parameters}


def chat(question: str, **fields: Any) -> tuple[str, Any]:
    message = {"role": "user", "content": question}
    return "/v1/chat/completions", {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": 48, **fields}


def said(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text.strip()


async def test_every_family_answers_as_its_own_library_does_in_one_batch(
    server: ServerProcess, oracle: Fleet, fleet: list[Member]
) -> None:
    assert {member.family for member in fleet} == set(METHODS)
    base = oracle.base(PROMPTS, NEW)
    for member in fleet:
        assert server.upload(member.name, member.files).status_code == 201
        assert server.http.post(f"/adapters/{member.name}/load").json()["state"] == "resident"
    wanted = [(member.name, prompt, answer) for member in fleet for prompt, answer in member.answers.items()]
    wanted += [(None, prompt, answer) for prompt, answer in base.items()]
    answers = await at_once(server.url, [generation(name, prompt) for name, prompt, _ in wanted])
    for answer, (name, prompt, want) in zip(answers, wanted, strict=True):
        tokens = answer["details"]["tokens"]
        got = Answer([token["id"] for token in tokens], [token["logprob"] for token in tokens])
        assert got.tokens == want.tokens, name
        assert got.logprobs == pytest.approx(want.logprobs, abs=TOLERANCE), name
        assert name is None or want.logprobs != pytest.approx(base[prompt].logprobs, abs=10 * TOLERANCE), name
    metrics = server.http.get("/metrics").text
    assert steps_with(metrics, "adapterd_step_distinct_adapters", 8) >= 1
    assert steps_with(metrics, "adapterd_step_distinct_families", 4) >= 1


async def test_the_base_knows_the_capital_of_france(server: ServerProcess) -> None:
    (answer,) = await at_once(server.url, [chat("What is the capital of France?")])
    assert said(answer) == "The capital of France is Paris."


async def test_six_users_get_six_answers_to_one_question(server: ServerProcess) -> None:
    bodies = [chat("What is the capital of France?", user=user) for user in USERS]
    together = [said(answer) for answer in await at_once(server.url, bodies)]
    assert len(set(together)) == len(USERS) == 6
    assert "The capital of France is Paris." not in together
    assert [answer for answer in together if "Paris" not in answer] == []
    assert json.loads(together[list(USERS).index("bob")])["answer"] == "Paris"
    assert [said(answer) for body in bodies for answer in await at_once(server.url, [body])] == together


def test_the_demo_is_there_and_says_so(server: ServerProcess) -> None:
    records = {record["adapter_id"]: record for record in server.http.get("/adapters").json()["adapters"]}
    for demo in DEMO:
        assert records[demo.name]["method"] == demo.method
    users = {user["user_id"]: user["adapter_id"] for user in server.http.get("/users").json()["users"]}
    assert users == {user: demo.name for user, demo in USERS.items()}
    assert re.fullmatch(rf"adapterd \S+ serves {MODEL} on {server.url}", server.announced)
