"""Fairness through the real engine on a tiny model: what a hostile tenant can do to another's answers, turns and adapters."""

from __future__ import annotations

import pytest
import torch

from adapters_store.digest import Digest
from server.methods.base import Adapter, Part
from server.requests import FinishReason
from server.tenancy.policy import TenantPolicy
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 33, 60, 12]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapter(name: str) -> Adapter:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    sites = {f"model.layers.{i}.mlp.down_proj": {"delta": torch.randn(32, generator=generator)} for i in range(2)}
    return Adapter(Digest.of(name.encode()), (Part("bitfit", "bitfit", sites),))


def ended(lab: Lab, id: str) -> bool:
    return any(event.request_id == id and event.finish is not None for event in lab.events)


def test_a_victims_answers_and_turns_beside_an_attacker() -> None:
    """The attacker has 30 long requests waiting all the time; the victim's next one starts as soon as a place is free."""
    alone = Lab(tiny_model("llama"), {})
    alone.submit("v", PROMPT, max_new_tokens=8)
    alone.run()
    lab = Lab(tiny_model("llama"), {}, max_running=4, blocks=257)
    for n in range(30):
        lab.submit(f"a{n}", [n + 3, *range(3, 60)], tenant="attacker", max_new_tokens=12)
    for _ in range(10):
        lab.turn()
    for n in range(4):
        lab.submit(f"v{n}", PROMPT, tenant="victim", max_new_tokens=8)
        others = sum(1 for k in range(30) if ended(lab, f"a{k}"))
        while not ended(lab, f"v{n}"):
            lab.turn()
        assert lab.tokens(f"v{n}") == alone.tokens("v")
        assert sum(1 for k in range(30) if ended(lab, f"a{k}")) - others <= 4  # those that ran when it came, and no more
    lab.run()
    assert all(lab.finished(f"a{n}") for n in range(30))


def test_weights_of_1_2_4_through_the_engine() -> None:
    lab = Lab(tiny_model("llama"), {}, max_running=3, blocks=257)
    tenants = {"a": 1.0, "b": 2.0, "c": 4.0}
    for n in range(120):
        for tenant, weight in tenants.items():
            lab.submit(f"{tenant}{n}", PROMPT, tenant=tenant, policy=TenantPolicy(weight=weight), max_new_tokens=2)
    while sum(1 for event in lab.events if event.finish is not None) < 175:
        lab.turn()
    served = {tenant: sum(1 for e in lab.events if e.finish and e.request_id.startswith(tenant)) for tenant in tenants}
    normalised = [served[tenant] / weight for tenant, weight in tenants.items()]
    assert max(normalised) <= 1.05 * min(normalised)
    for tenant in tenants:
        for n in range(120):
            lab.engine.cancel(f"{tenant}{n}")
    lab.run()
    assert lab.scheduler.waiting.tenants == 0


@pytest.mark.slow
def test_an_attacker_with_a_thousand_adapters_evicts_none_of_the_victims() -> None:
    own = adapter("victim")
    crowd = [adapter(f"attacker{n}") for n in range(1000)]
    lab = Lab(tiny_model("llama"), {each.digest: each for each in (own, *crowd)}, slots=4)
    lab.submit("v", PROMPT, own.digest, tenant="victim", max_new_tokens=4)
    lab.run()
    expected = lab.tokens("v")
    for n in range(0, 1000, 100):
        for each in crowd[n : n + 100]:
            lab.submit(each.digest, PROMPT[:2], each.digest, tenant="attacker", max_new_tokens=1)
        for k in range(3):
            lab.submit(f"v{n} {k}", PROMPT, own.digest, tenant="victim", max_new_tokens=4)
            while not ended(lab, f"v{n} {k}"):
                lab.turn()
                assert lab.scheduler.residency.is_resident(own.digest)
            assert lab.tokens(f"v{n} {k}") == expected
        lab.run()
    assert all(lab.ending(each.digest).finish is FinishReason.LENGTH for each in crowd)
    assert lab.observer.evictions >= 1000 - 4
    assert lab.observer.loads == 1001  # the victim's was loaded once
