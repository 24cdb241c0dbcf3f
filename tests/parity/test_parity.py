"""What a server does to a batch (chunks, preemption, eviction, cached blocks, a broken neighbour) changes nobody's answer.

Every family at once on a few architectures; the families' own configurations are tried in test_configs.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters_store.digest import Digest
from server.methods.base import Adapter, Part, Prefix
from server.model.kernels import Kernels
from tests.parity.families import FAMILIES
from tests.parity.zoo import OWN, Zoo, make_zoo

ARCHITECTURES = ("llama", "gpt2", "gemma2", "phi")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(request.param, [*FAMILIES, *OWN], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("budget", [5, 64])
def test_chunks_of_any_size(zoo: Zoo, budget: int, kernels: Kernels) -> None:
    lab = zoo.lab(kernels=kernels, max_batch_tokens=budget)
    for name in zoo.expected:
        zoo.submit(lab, name)
        lab.turn()
    lab.run()
    zoo.check(lab)
    if budget == 64:
        assert max(lab.observer.adapters_per_step) >= 7
        assert max(lab.observer.families_per_step) >= 5


def test_preemption_forced(zoo: Zoo, kernels: Kernels) -> None:
    lab = zoo.lab(kernels=kernels, blocks=20, max_batch_tokens=32)
    for name in zoo.expected:
        zoo.submit(lab, name)
    lab.run()
    assert lab.observer.preemptions > 0
    zoo.check(lab)


def test_eviction_forced(zoo: Zoo, kernels: Kernels) -> None:
    lab = zoo.lab(kernels=kernels, slots=3)
    for turn in range(2):
        for name in zoo.expected:
            zoo.submit(lab, name, str(turn))
    lab.run()
    lab.check_bytes()
    assert lab.observer.evictions >= 5
    for turn in range(2):
        zoo.check(lab, str(turn))


def test_a_second_request_of_everyone_reuses_the_first_ones_blocks(zoo: Zoo, kernels: Kernels) -> None:
    lab = zoo.lab(kernels=kernels)
    for turn in range(2):
        for name in zoo.expected:
            zoo.submit(lab, name, str(turn))
        lab.run()
        zoo.check(lab, str(turn))
    cached = {event.request_id: event.cached_tokens for event in lab.events}
    assert all(cached[f"{name}1"] > 0 for name, expected in zoo.expected.items() if len(expected.prompt) > 12)


def test_a_nan_adapter_in_the_batch_hurts_nobody_else(zoo: Zoo, kernels: Kernels) -> None:
    broken = {poisoned(specimen.adapter).digest: poisoned(specimen.adapter) for specimen in zoo.specimens.values()}
    lab = zoo.lab(broken, kernels=kernels)
    for digest in broken:
        lab.submit(f"nan {digest}", [5, 6, 7, 8, 9], digest)
    for name in zoo.expected:
        zoo.submit(lab, name)
    lab.run()
    zoo.check(lab)
    for digest in broken:
        assert "not finite" in str(lab.ending(f"nan {digest}").error)


def poisoned(adapter: Adapter) -> Adapter:
    """The same adapter with NaN in every tensor; an upload like this is refused, so it is made in memory."""
    return Adapter(Digest.of(b"nan " + adapter.digest.encode()), tuple(_poisoned(part) for part in adapter.parts))


def _poisoned(part: Part) -> Part:
    sites = {module: {name: _nan(tensor) for name, tensor in site.items()} for module, site in part.sites.items()}
    return replace(part, sites=sites, prefix=part.prefix and _poisoned_prefix(part.prefix))


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    """Token ids stay what they are."""
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


def _poisoned_prefix(prefix: Prefix) -> Prefix:
    stored = {field: getattr(prefix, field) for field in ("keys", "values", "embeddings")}
    return replace(prefix, **{field: _nan(tensor) for field, tensor in stored.items() if tensor is not None})
