"""64 concurrent requests over 32 adapters of all families, uploaded to a real server process: each gets its own answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.e2e.fleet import RECIPES, Answer, Fleet, Member, answer_of
from tests.process import DEADLINE, ServerProcess

ADAPTERS = 32
PROMPTS = ("hello world, how are", "the cat")
NEW = 16


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


async def ask(http: httpx.AsyncClient, prompt: str, member: Member) -> Answer:
    route, body = member.request(prompt)
    response = await http.post(route, json=body)
    assert response.status_code == 200, response.text
    return answer_of(response.json())


async def ask_all(url: str, fleet: list[Member]) -> list[Answer]:
    """Every member, both prompts, all at once; in the order of the members."""
    limits = httpx.Limits(max_connections=len(fleet) * len(PROMPTS))
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE, limits=limits) as http:
        return await asyncio.gather(*(ask(http, prompt, member) for prompt in PROMPTS for member in fleet))


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
        alike = [(a.name, b.name) for a, b in combinations(fleet, 2) if a.answers[prompt].same(b.answers[prompt])]
        assert alike == []


async def test_64_requests_over_32_adapters_of_every_family(server: ServerProcess, fleet: list[Member]) -> None:
    answers = await ask_all(server.url, fleet)
    wanted = [(member, member.answers[prompt]) for prompt in PROMPTS for member in fleet]
    wrong = [
        f"{member.name} ({member.family})" for got, (member, want) in zip(answers, wanted, strict=True) if not got.same(want)
    ]
    assert not wrong
    metrics = server.http.get("/metrics").text
    assert steps_with(metrics, "adapterd_step_distinct_adapters", 8) >= 1
    assert steps_with(metrics, "adapterd_step_distinct_families", 4) >= 1
    assert {member.family for member in fleet} == set(server.http.get("/info").json()["methods"])


async def test_the_same_with_little_memory_for_adapters_and_blocks_for_few_requests(
    serve: Serve, tiny_base: Path, fleet: list[Member]
) -> None:
    """Evictions, for slots and for bytes, and preemptions change nothing but the time it takes."""
    tight = ("--adapter-slots", "5", "--adapter-memory-mb", "0.4", "--kv-cache-gb", "0.00006", "--max-batch-tokens", "40")
    with serve("--model", str(tiny_base), *tight) as server:
        for member in fleet:
            assert server.upload(member.name, member.files).status_code == 201
        answers = await ask_all(server.url, fleet)
        wanted = [(member, member.answers[prompt]) for prompt in PROMPTS for member in fleet]
        wrong = [member.name for got, (member, want) in zip(answers, wanted, strict=True) if not got.same(want)]
        assert not wrong
        metrics = server.http.get("/metrics").text
        assert counter(metrics, "adapterd_adapter_evictions_total") >= ADAPTERS - 5
        assert counter(metrics, "adapterd_preemptions_total") >= 1
        assert 0 < counter(metrics, "adapterd_adapter_slots_bytes") <= counter(metrics, "adapterd_adapter_slots_bytes_total")
