"""Promise 7: quotas per tenant, refused before any engine work: 429 with Retry-After for rates and queues, 403 for the rest.

The arithmetic: `tests/tenancy`.
"""

from __future__ import annotations

from typing import Any

import pytest

from server.tenancy.policy import TenantPolicy
from tests.e2e.uploads import lora
from tests.house import Caller, House


def allowed(house: House, name: str, **policy: Any) -> Caller:
    """A tenant with these quotas."""
    house.server.store.put_tenant(name, TenantPolicy(**policy).model_dump(mode="json"))
    return house.tenant(name)


def steps(house: House) -> str:
    body, _ = house.server.metrics.render()
    (line,) = [line for line in body.decode().splitlines() if line.startswith("adapterd_step_tokens_sum ")]
    return line


def test_adapters_and_bytes_over_the_quota_are_403(house: House) -> None:
    files = lora(71)
    few = allowed(house, "few-adapters", max_adapters=1)
    assert few.upload("one", files).status_code == 201
    assert few.upload("one", lora(72)).status_code == 201, "a new version is no new adapter"
    assert few.upload("two", files).status_code == 403
    assert few.delete("/adapters/one").status_code == 204
    assert few.upload("two", files).status_code == 201
    small = allowed(house, "few-bytes", max_adapter_bytes=100)
    assert small.upload("one", files).status_code == 403
    assert small.get("/adapters/one").status_code == 404


@pytest.mark.parametrize(
    ("policy", "ask"),
    [
        ({"max_new_tokens": 3}, {"max_new_tokens": 4}),
        ({"max_stop_sequences": 1}, {"stop": ["a", "b"]}),
    ],
)
def test_a_request_over_its_tenants_limits_is_403_before_any_step(
    house: House, policy: dict[str, Any], ask: dict[str, Any]
) -> None:
    caller = allowed(house, f"limited-{next(iter(policy)).replace('_', '-')}", **policy)
    before = steps(house)
    response = caller.generate(**ask)
    assert (response.status_code, response.json()["error_type"]) == (403, "quota")
    assert steps(house) == before
    assert caller.generate(max_new_tokens=1).status_code == 200


def test_answers_per_request_over_the_quota_are_403(house: House) -> None:
    caller = allowed(house, "one-answer", max_n=1)
    body = {"model": "", "prompt": "hello", "max_tokens": 1}
    assert caller.post("/v1/completions", {**body, "n": 2}).status_code == 403
    assert caller.post("/v1/completions", body).status_code == 200


def test_tokens_per_minute_over_the_quota_are_429_with_retry_after(house: House) -> None:
    caller = allowed(house, "slow-and-steady", tokens_per_minute=40)
    answers = [caller.generate(max_new_tokens=12) for _ in range(6)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert answers[0].status_code == 200
    assert refused, "six requests are far more than forty tokens"
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert house.tenant("somebody-else").generate(max_new_tokens=1).status_code == 200


def test_a_tenant_that_may_queue_nothing_is_429_and_others_are_served(house: House) -> None:
    caller = allowed(house, "no-room", max_running=0, max_queued=0)
    before = steps(house)
    response = caller.generate(max_new_tokens=1)
    assert response.status_code in (403, 429)
    assert steps(house) == before
    assert house.tenant("somebody-else").generate(max_new_tokens=1).status_code == 200
