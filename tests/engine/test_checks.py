"""Checks: what is refused before it queues, and what may start from the prefix cache."""

from __future__ import annotations

import pytest

from adapters_store.digest import Digest
from server.engine.checks import Checks
from server.engine.plan import Sequence
from server.engine.residency import AdapterFacts, Residency
from server.errors import QuotaError, ValidationError
from server.requests import Request, Sampling
from server.tenancy.policy import TenantPolicy

HEAD, TOKENS = (Digest(letter * 64) for letter in "ab")


def request(*adapters: Digest, prompt: int = 4, new: int = 4, **more: object) -> Request:
    return Request("r", "t", adapters, (5,) * prompt, Sampling(new), **more)  # type: ignore[arg-type]


@pytest.fixture
def checks() -> Checks:
    residency = Residency(2)
    for digest, head in ((HEAD, "last"), (TOKENS, "every")):
        residency.want(digest)
        residency.loaded(digest, AdapterFacts(("head",), head=head))  # type: ignore[arg-type]
        residency.place(digest)
    return Checks(residency, max_total_tokens=10)


def test_limits_are_inclusive(checks: Checks) -> None:
    checks.request(request(prompt=6))
    with pytest.raises(ValidationError, match=r"must be <= 10\. Given: 7 `inputs` tokens and 4"):
        checks.request(request(prompt=7))


def test_more_adapters_than_slots_are_refused_the_servers_or_the_tenants(checks: Checks) -> None:
    three = [Digest(str(n) * 64) for n in range(3)]
    with pytest.raises(ValidationError, match="needs 3 adapter slots at once, this server has 2"):
        checks.request(request(*three))
    checks.request(request(*three[:2], policy=TenantPolicy(max_slots=2)))
    with pytest.raises(QuotaError, match="needs 2 adapter slots at once, max_slots is 1") as refused:
        checks.request(request(*three[:2], policy=TenantPolicy(max_slots=1)))
    assert refused.value.limit == "max_slots"


@pytest.mark.parametrize(
    ("asked", "may"),
    [
        (request(), True),
        (request(task="score"), True),
        (request(HEAD, task="classify"), True),
        (request(TOKENS, task="classify"), False),
        (request(TOKENS), True),
        (request(task="embed", pooling="last"), True),
        (request(task="embed", pooling="mean"), False),
    ],
)
def test_who_may_start_from_the_cache(checks: Checks, asked: Request, may: bool) -> None:
    assert checks.may_start_from_cache(Sequence(asked, asked.adapters, b"", 0, [5] * 4, 4)) is may
