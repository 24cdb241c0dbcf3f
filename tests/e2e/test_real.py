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
from safetensors.torch import load_file

from server.demo import DEMO
from server.methods import METHODS
from tests.conftest import Serve
from tests.e2e.fleet import RECIPES, TOLERANCE, Fleet, Member, answer_of, generation
from tests.e2e.test_mixed import steps_with
from tests.process import DEADLINE, ServerProcess
from tests.training.sentiment import HELD_OUT, HELD_OUT_RIGHT, LABELS

pytestmark = pytest.mark.real

MODEL = "smollm2-135m-instruct"
PROMPTS = ("The quick brown fox", "Once upon a time there was a small robot who")
NEW = 6
TOLD = [line for _, line in HELD_OUT[::8]]  # lines that transformers is asked about too
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
    wanted = [(member, prompt, answer) for member in fleet for prompt, answer in member.answers.items()]
    plain = [generation(None, prompt, NEW) for prompt in base]
    answers = await at_once(server.url, [*(member.request(prompt) for member, prompt, _ in wanted), *plain])
    for body, (member, prompt, want) in zip(answers, wanted, strict=False):
        got = answer_of(body)
        assert got.tokens == want.tokens, member.family
        assert got.logprobs == pytest.approx(want.logprobs, abs=TOLERANCE), member.family
        assert want.logprobs != pytest.approx(base[prompt].logprobs, abs=10 * TOLERANCE), member.family
    for body, want in zip(answers[len(wanted) :], base.values(), strict=True):
        assert answer_of(body).same(want)
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


def labels_of(server: ServerProcess, name: str, lines: Sequence[str]) -> list[dict[str, float]]:
    """What /classify says of each line: label -> score, likeliest first."""
    response = server.http.post("/classify", json={"inputs": list(lines), "adapter_id": name})
    assert response.status_code == 200, response.text
    return [{entry["label"]: entry["score"] for entry in answer} for answer in response.json()]


@pytest.mark.parametrize("name", HELD_OUT_RIGHT)
def test_the_demo_tells_the_sentiment_of_lines_it_was_not_made_with(server: ServerProcess, name: str) -> None:
    """As often as tests/training/train_sentiment.py printed."""
    answers = labels_of(server, name, [line for _, line in HELD_OUT])
    right = [next(iter(answer)) == label for answer, (label, _) in zip(answers, HELD_OUT, strict=True)]
    assert sum(right) == HELD_OUT_RIGHT[name]


def test_the_sentiment_head_answers_as_transformers_own_classifier(server: ServerProcess, oracle: Fleet) -> None:
    directory = next(demo.directory for demo in DEMO if demo.name == "sentiment-head")
    template = json.loads((directory / "prompt" / "adapter_config.json").read_text())["template"]
    weight = load_file(directory / "head" / "adapter_model.safetensors")["score.weight"]
    for line, answer in zip(TOLD, labels_of(server, "sentiment-head", TOLD), strict=True):
        wanted = oracle.label_logits(oracle.framed(template, line), weight).softmax(-1)
        assert [answer[label] for label in LABELS] == pytest.approx(wanted.tolist(), abs=TOLERANCE)


def test_the_sentiment_prompt_answers_as_the_bases_own_next_words(server: ServerProcess, oracle: Fleet) -> None:
    directory = next(demo.directory for demo in DEMO if demo.name == "sentiment-prompt")
    config = json.loads((directory / "adapter_config.json").read_text())
    for line, answer in zip(TOLD, labels_of(server, "sentiment-prompt", TOLD), strict=True):
        ids = oracle.framed(config["template"], line)
        masses = {label: oracle.word_logprobs(ids, words).exp().sum() for label, words in config["verbalizer"].items()}
        wanted = [float(masses[label] / sum(masses.values())) for label in LABELS]
        assert [answer[label] for label in LABELS] == pytest.approx(wanted, abs=TOLERANCE)


def test_the_demo_is_there_and_says_so(server: ServerProcess) -> None:
    records = {record["adapter_id"]: record for record in server.http.get("/adapters").json()["adapters"]}
    for demo in DEMO:
        assert records[demo.name]["method"] == demo.method
    users = {user["user_id"]: user["adapter_id"] for user in server.http.get("/users").json()["users"]}
    assert users == {user: demo.name for user, demo in USERS.items()}
    assert re.fullmatch(rf"adapterd \S+ serves {MODEL} on {server.url}", server.announced)
