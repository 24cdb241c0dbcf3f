"""Promises 1 to 4 in whatever order: nobody sees, reaches, reuses or disturbs what another tenant has."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.security.contents import BROKEN, CONTENTS
from tests.security.isolation import PROMPTS, Isolation, answer

STEPS = 30  # per walk
WALKS = int(os.environ.get("ADAPTERD_TEST_WALKS", "50"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Adapters that overflow are logged each time; there are hundreds."""
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def walk(walks: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Isolation,
        settings=settings(
            max_examples=walks, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_the_oracle_can_tell_all_contents_apart() -> None:
    sound = [None, *sorted(CONTENTS.keys() - BROKEN)]
    assert len({answer(content, PROMPTS[0]) for content in sound}) == len(sound)


def test_tenants_with_equal_names_and_files_are_isolated_in_a_short_walk() -> None:
    Isolation.seen.clear()
    walk(6)
    assert Isolation.seen["steps"] > 100


@pytest.mark.slow
def test_tenants_with_equal_names_and_files_are_isolated_in_a_thousand_steps() -> None:
    """And on, until all that may happen has: walks are drawn at random, and some draw no adapter that breaks."""
    seen = Isolation.seen
    seen.clear()
    met = {"answered", "cancelled", "cached", "deleted", "evictions", "foreign", "preemptions", "replaced"}
    met |= {f"{content} broke" for content in BROKEN}
    for _ in range(5):
        walk(WALKS)
        if met <= seen.keys():
            break
    assert seen["steps"] >= 1000
    assert met <= seen.keys(), seen
