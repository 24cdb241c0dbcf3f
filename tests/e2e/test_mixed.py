"""64 concurrent requests over 32 adapters of all families, uploaded to a real server process: each gets its own answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.e2e.fleet import RECIPES, Answer, Fleet, Member
from tests.process import DEADLINE, ServerProcess

ADAPTERS = 32
PROMPTS = ("hello world, how are", "the cat")
NEW = 16
TOLERANCE = 1e-3  # of log-probabilities


@pytest.fixture(scope="module")
def fleet(tiny_base: Path) -> list[Member]:
    fleet = Fleet(tiny_base, strength=0.3)
    return [fleet.make(f"member{i}", RECIPES[i % len(RECIPES)], i, PROMPTS, NEW) for i in range(ADAPTERS)]


@pytest.fixture(scope="module")
def server(serve: Serve, tiny_base: Path, fleet: list[Member]) -> ServerProcess:
    server = serve("--model", str(tiny_base))
    for member in fleet:
        assert server.upload(member.name, member.files).status_code == 201
    return server


async def ask(http: httpx.AsyncClient, prompt: str, adapter: str | None) -> Answer:
    parameters = {"adapter_id": adapter, "max_new_tokens": NEW, "ignore_eos_token": True, "details": True}
    response = await http.post("/generate", json={"inputs": prompt, "parameters": parameters})
    assert response.status_code == 200, response.text
    tokens = response.json()["details"]["tokens"]
    return Answer([token["id"] for token in tokens], [token["logprob"] for token in tokens])


async def ask_all(url: str, fleet: list[Member]) -> list[Answer]:
    """Every member, both prompts, all at once; in the order of the members."""
    limits = httpx.Limits(max_connections=len(fleet) * len(PROMPTS))
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE, limits=limits) as http:
        return await asyncio.gather(*(ask(http, prompt, member.name) for prompt in PROMPTS for member in fleet))


def same(got: Answer, want: Answer) -> bool:
    return got.tokens == want.tokens and got.logprobs == pytest.approx(want.logprobs, abs=TOLERANCE)


def steps_with(metrics: str, name: str, at_least: int) -> float:
    """How many steps a histogram of whole numbers counts at `at_least` or more."""
    buckets: Mapping[float, float] = {
        float(bound): float(count) for bound, count in re.findall(rf'^{name}_bucket{{le="(\S+)"}} (\S+)$', metrics, re.M)
    }
    assert buckets, f"no histogram {name}"
    return buckets[float("inf")] - max(count for bound, count in buckets.items() if bound < at_least)


def counter(metrics: str, name: str) -> float:
    (value,) = re.findall(rf"^{name} (\S+)$", metrics, re.M)
    return float(value)


def test_the_answers_tell_the_adapters_apart(fleet: list[Member]) -> None:
    """Or else all that follows could hold on a server that mixes them up."""
    for prompt in PROMPTS:
        assert len({tuple(member.answers[prompt].tokens) for member in fleet}) == ADAPTERS


async def test_64_requests_over_32_adapters_of_every_family(server: ServerProcess, fleet: list[Member]) -> None:
    answers = await ask_all(server.url, fleet)
    wanted = [(member, member.answers[prompt]) for prompt in PROMPTS for member in fleet]
    wrong = [
        f"{member.name} ({member.family})" for got, (member, want) in zip(answers, wanted, strict=True) if not same(got, want)
    ]
    assert not wrong
    metrics = server.http.get("/metrics").text
    assert steps_with(metrics, "adapterd_step_distinct_adapters", 8) >= 1
    assert steps_with(metrics, "adapterd_step_distinct_families", 4) >= 1
    assert {member.family for member in fleet} == set(server.http.get("/info").json()["methods"])


async def test_the_same_with_fewer_slots_than_adapters_and_blocks_for_few_requests(
    serve: Serve, tiny_base: Path, fleet: list[Member]
) -> None:
    """Evictions and preemptions change nothing but the time it takes."""
    with serve(
        "--model", str(tiny_base), "--adapter-slots", "5", "--kv-cache-gb", "0.00008", "--max-batch-tokens", "40"
    ) as server:
        for member in fleet:
            assert server.upload(member.name, member.files).status_code == 201
        answers = await ask_all(server.url, fleet)
        wanted = [(member, member.answers[prompt]) for prompt in PROMPTS for member in fleet]
        wrong = [member.name for got, (member, want) in zip(answers, wanted, strict=True) if not same(got, want)]
        assert not wrong
        metrics = server.http.get("/metrics").text
        assert counter(metrics, "adapterd_adapter_evictions_total") >= ADAPTERS - 5
        assert counter(metrics, "adapterd_preemptions_total") >= 1
