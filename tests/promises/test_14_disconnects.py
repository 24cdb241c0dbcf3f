"""Promise 14: a client that goes away frees its pages and slots within one step.

Over sockets: `tests/e2e/test_lifecycle.py`.
"""

from __future__ import annotations

import random

import pytest

from adapters_store.digest import Digest
from tests.lab import Lab
from tests.security.isolation import alone
from tests.tiny import tiny_model

NAMES = ("lora 1", "bias", "prefix")


def test_a_cancelled_request_holds_nothing_after_one_step() -> None:
    lab = Lab(tiny_model("llama"), {})
    free = lab.scheduler.pages.used
    lab.submit("gone", [5, 9, 33, 60, 12], max_new_tokens=50)
    lab.turn()
    assert lab.scheduler.pages.used > free
    lab.engine.cancel("gone")
    lab.turn()
    assert lab.scheduler.pages.used == free
    assert lab.ending("gone").finish is not None
    lab.scheduler.check_idle()


@pytest.mark.slow
def test_after_a_thousand_random_disconnects_pages_and_slots_are_as_at_the_start() -> None:
    """At every stage: queued, waiting for an adapter or a prefix, in the prompt, between tokens, done already."""
    lab, chance = Lab(tiny_model("llama"), {}, blocks=40, slots=2), random.Random(7)
    digests = {name: Digest.of(name.encode()) for name in NAMES}
    for name, digest in digests.items():
        lab.adapters[digest] = alone(name, lab, digest)
    for number in range(1000):
        adapters = chance.sample(list(digests.values()), chance.randint(0, 1))
        prompt = chance.choices(range(3, 97), k=chance.randint(1, 20))
        lab.submit(str(number), prompt, *adapters, max_new_tokens=chance.randint(1, 8), tenant=chance.choice("ab"))
        for _ in range(chance.randint(0, 3)):
            lab.turn()
        lab.engine.cancel(str(max(0, number - chance.randint(0, 3))))
    lab.run()  # checks that nothing holds a page but shared prefixes, and nothing pins a slot
    assert {event.request_id for event in lab.events if event.finish} == {str(number) for number in range(1000)}
    for digest in digests.values():
        lab.engine._unload(digest)
    assert lab.scheduler.residency.used == 0
    assert lab.scheduler.pages.used == 0


def test_a_deleted_adapter_leaves_no_page_even_if_it_had_been_evicted() -> None:
    lab = Lab(tiny_model("llama"), {}, slots=1)
    digests = {name: Digest.of(name.encode()) for name in NAMES}
    for name in ("prefix", "bias"):
        lab.adapters[digests[name]] = alone(name, lab, digests[name])
        lab.submit(name, [5, 9, 33], digests[name])
        lab.run()
    for name in ("prefix", "bias"):
        lab.engine._unload(digests[name])
    assert lab.scheduler.residency.used == 0
    assert lab.scheduler.pages.used == 0
