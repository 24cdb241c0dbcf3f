"""Device memory of adapters: a budget in bytes is kept at every step, costs answers nothing, and refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters_store.digest import Digest
from server.errors import AdapterError, ValidationError
from server.methods.base import Adapter, Part
from server.methods.weigh import footprint_of
from server.requests import FinishReason
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 33, 60, 12]
LAYERS = range(2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bitfit(seed: int, module: str) -> Adapter:
    """A delta of 32 numbers per layer."""
    generator = torch.Generator().manual_seed(seed)
    sites = {f"model.layers.{i}.{module}": {"delta": torch.randn(32, generator=generator)} for i in LAYERS}
    return Adapter(Digest.of(b"bitfit %d" % seed), (Part("bitfit", "bitfit", sites),))


def whole(seed: int) -> Adapter:
    """Both layers' output projections, 8 KB together."""
    generator = torch.Generator().manual_seed(seed)
    sites = {f"model.layers.{i}.self_attn.o_proj": {"weight": torch.randn(32, 32, generator=generator)} for i in LAYERS}
    return Adapter(Digest.of(b"whole %d" % seed), (Part("full", "full", sites),))


BITFITS = [bitfit(seed, "mlp.down_proj") for seed in range(4)]
WHOLE = [whole(seed) for seed in range(4)]
ALL = {adapter.digest: adapter for adapter in (*BITFITS, *WHOLE)}
SMALL, LARGE = 2 * 2 * 32 * 4, 2 * 32 * 32 * 4  # bytes alone: two slots of a delta; a matrix per layer


def new_lab(**options: Any) -> Lab:
    return Lab(tiny_model("llama"), ALL, **options)


@pytest.fixture(scope="module")
def expected() -> dict[Digest, list[int]]:
    lab = new_lab()
    for digest in ALL:
        lab.submit(digest, PROMPT, digest)
    lab.run()
    return {digest: lab.tokens(digest) for digest in ALL}


def test_the_sizes_here_are_what_the_ops_hold() -> None:
    lab = new_lab()
    alone = [footprint_of(adapter.parts, lab.runner.base.shape, torch.float32).alone for adapter in (BITFITS[0], WHOLE[0])]
    assert alone == [SMALL, LARGE]


@pytest.mark.parametrize("budget", [LARGE, LARGE + SMALL, 2 * LARGE + 3 * SMALL])
def test_a_tight_budget_is_kept_at_every_step_and_changes_no_answer(budget: int, expected: dict[Digest, list[int]]) -> None:
    lab = new_lab(budget=budget)
    for again in ("", " again"):
        for digest in ALL:
            lab.submit(digest + again, PROMPT, digest)
    while not lab.scheduler.idle or lab.engine._inbox:
        lab.turn()
        assert lab.runner.adapter_bytes == lab.scheduler.residency.nbytes <= budget
    lab.run()
    assert {digest: lab.tokens(digest) for digest in ALL} == expected
    assert {digest: lab.tokens(digest + " again") for digest in ALL} == expected
    assert lab.observer.evictions > 0
    stats = lab.engine.stats()
    assert (stats.device_bytes, stats.device_budget) == (lab.runner.adapter_bytes, budget)


def test_an_adapter_that_alone_is_too_large_is_refused_by_name_and_costs_nobody_else(expected: dict[Digest, list[int]]) -> None:
    lab = new_lab(budget=LARGE - 1)
    for digest in ALL:
        lab.submit(digest, PROMPT, digest)
    lab.run()
    reason = f"full: the adapter needs {LARGE} bytes of device memory, over this server's {LARGE - 1} (--adapter-memory-mb)"
    for adapter in WHOLE:
        error = lab.ending(adapter.digest).error
        assert isinstance(error, AdapterError)
        assert str(error) == reason
        assert lab.engine.residency(adapter.digest) == ("failed", reason)
    for adapter in BITFITS:
        assert lab.tokens(adapter.digest) == expected[adapter.digest]


def test_a_composition_that_does_not_fit_is_refused_with_both_numbers() -> None:
    lab = new_lab(budget=LARGE + SMALL - 1)
    lab.submit("both", PROMPT, BITFITS[0].digest, WHOLE[0].digest)
    lab.submit("one", PROMPT, WHOLE[1].digest)
    lab.run()
    error = lab.ending("both").error
    assert isinstance(error, ValidationError)
    needed, limit = LARGE + SMALL, LARGE + SMALL - 1
    assert (
        str(error)
        == f"Input validation error: `compose` needs {needed} bytes of device memory for its adapters, this server has {limit}"
    )
    assert lab.finished("one")


def test_a_composition_that_just_fits_is_served_though_one_adapter_holds_a_high_slot() -> None:
    roomy, tight = new_lab(), new_lab(budget=LARGE + SMALL)
    for lab in (roomy, tight):
        for adapter in BITFITS:
            lab.submit(adapter.digest, PROMPT, adapter.digest, max_new_tokens=1)
        lab.run()
        lab.submit("both", PROMPT, BITFITS[3].digest, WHOLE[0].digest)
        lab.run()
        assert lab.ending("both").finish is FinishReason.LENGTH
    assert tight.tokens("both") == roomy.tokens("both")
