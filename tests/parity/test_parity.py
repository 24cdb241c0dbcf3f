"""A mixed, staggered, chunked batch gives every request what its own adapter alone gives in its own library.

Oracles: PEFT's forward for its families, the base with the biases for BitFit, the published formula for bottlenecks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from adapters_store.digest import Digest
from server.methods.base import Adapter, Part
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import make_base
from server.settings import default_home
from tests.lab import BASE, Lab
from tests.parity.zoo import PEFT_CONFIGS, Specimen, base_specimen, bitfit_specimen, bottleneck_specimen, peft_specimen
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

NEW = 10


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    name: str = request.param
    return name


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return Kernels("torch")
    chosen = choose_kernels(torch.device("cpu"), torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


@pytest.fixture(scope="module")
def zoo(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Specimen]:
    """Every family on one architecture, and the base itself under "base"."""
    home: Path = tmp_path_factory.mktemp(architecture)
    model = tiny_model(architecture)
    base = make_base(tiny_model(architecture), BASE, torch.device("cpu"), torch.float32).shape
    found = [peft_specimen(name, model, base, home / name) for name in PEFT_CONFIGS]
    found.append(bitfit_specimen(model, base, home / "bitfit"))
    found += [bottleneck_specimen(model, base, parallel=parallel) for parallel in (False, True)]
    return {specimen.name: specimen for specimen in found}


@pytest.fixture(scope="module")
def expected(architecture: str, zoo: Mapping[str, Specimen]) -> dict[str, tuple[list[int], list[int], torch.Tensor]]:
    """name -> (prompt, the oracle's tokens, the oracle's logits)."""
    generator = torch.Generator().manual_seed(1)
    oracles = dict(zoo)
    oracles["base"] = Specimen("base", Adapter(BASE, ()), base_specimen(tiny_model(architecture)))
    prompts = {name: torch.randint(3, VOCAB, (4 + 3 * i,), generator=generator).tolist() for i, name in enumerate(oracles)}
    return {name: (prompts[name], *specimen.greedy(prompts[name], NEW)) for name, specimen in oracles.items()}


def adapters_of(zoo: Mapping[str, Specimen]) -> dict[Digest, Adapter]:
    return {specimen.digest: specimen.adapter for specimen in zoo.values()}


def digests(zoo: Mapping[str, Specimen], name: str) -> tuple[Digest, ...]:
    return () if name == "base" else (zoo[name].digest,)


def check(lab: Lab, expected: Mapping[str, tuple[list[int], list[int], torch.Tensor]], suffix: str = "") -> None:
    for name, (_, tokens, logits) in expected.items():
        assert lab.tokens(name + suffix) == tokens, name
        error = (lab.logits(name + suffix)[-NEW:] - logits).abs().max()
        assert error < 1e-3, f"{name}: {error}"


def test_oracles_differ_from_the_base(zoo: Mapping[str, Specimen], expected: dict, architecture: str) -> None:
    base = base_specimen(tiny_model(architecture))
    for name, (prompt, _, logits) in expected.items():
        if name != "base":
            assert (base(prompt)[-1] - logits[0]).abs().max() > 0.1, name


@pytest.mark.parametrize("budget", [5, 64])
def test_mixed_staggered_chunked(
    architecture: str, zoo: Mapping[str, Specimen], expected: dict, budget: int, kernels: Kernels
) -> None:
    lab = Lab(tiny_model(architecture), adapters_of(zoo), kernels=kernels, max_batch_tokens=budget)
    for name, (prompt, _, _) in expected.items():
        lab.submit(name, prompt, *digests(zoo, name), max_new_tokens=NEW)
        lab.turn()
    lab.run()
    check(lab, expected)
    if budget == 64:
        assert max(lab.observer.adapters_per_step) >= 8
        assert max(lab.observer.families_per_step) >= 5


def test_preemption_forced(architecture: str, zoo: Mapping[str, Specimen], expected: dict, kernels: Kernels) -> None:
    lab = Lab(tiny_model(architecture), adapters_of(zoo), kernels=kernels, blocks=20, max_batch_tokens=32)
    for name, (prompt, _, _) in expected.items():
        lab.submit(name, prompt, *digests(zoo, name), max_new_tokens=NEW)
    lab.run()
    assert lab.observer.preemptions > 0
    check(lab, expected)


def test_eviction_forced(architecture: str, zoo: Mapping[str, Specimen], expected: dict, kernels: Kernels) -> None:
    lab = Lab(tiny_model(architecture), adapters_of(zoo), kernels=kernels, slots=3)
    for turn in range(2):
        for name, (prompt, _, _) in expected.items():
            lab.submit(f"{name}{turn}", prompt, *digests(zoo, name), max_new_tokens=NEW)
    lab.run()
    assert lab.observer.evictions >= 5
    for turn in range(2):
        check(lab, expected, str(turn))


def test_a_second_request_of_everyone_reuses_the_first_ones_blocks(
    architecture: str, zoo: Mapping[str, Specimen], expected: dict, kernels: Kernels
) -> None:
    lab = Lab(tiny_model(architecture), adapters_of(zoo), kernels=kernels)
    for turn in range(2):
        for name, (prompt, _, _) in expected.items():
            lab.submit(f"{name}{turn}", prompt, *digests(zoo, name), max_new_tokens=NEW)
        lab.run()
        check(lab, expected, str(turn))
    cached = {event.request_id: event.cached_tokens for event in lab.events}
    assert all(cached[f"{name}1"] > 0 for name, (prompt, _, _) in expected.items() if len(prompt) > 12)


def test_a_nan_adapter_in_the_batch_hurts_nobody_else(
    architecture: str, zoo: Mapping[str, Specimen], expected: dict, kernels: Kernels
) -> None:
    broken = {adapter.digest: adapter for adapter in (poisoned(zoo[name].adapter) for name in POISONED)}
    lab = Lab(tiny_model(architecture), {**adapters_of(zoo), **broken}, kernels=kernels)
    for digest in broken:
        lab.submit(f"nan {digest}", [5, 6, 7, 8, 9], digest)
    for name, (prompt, _, _) in expected.items():
        lab.submit(name, prompt, *digests(zoo, name), max_new_tokens=NEW)
    lab.run()
    check(lab, expected)
    for digest in broken:
        assert "not finite" in str(lab.ending(f"nan {digest}").error)


POISONED = ("lora", "ia3", "bitfit", "bottleneck", "prefix_tuning", "prompt_tuning")


def poisoned(adapter: Adapter) -> Adapter:
    """The same adapter with NaN in every tensor; an upload like this is refused, so it is made in memory."""
    parts = []
    for part in adapter.parts:
        sites = {m: {k: torch.full_like(t, torch.nan) for k, t in tensors.items()} for m, tensors in part.sites.items()}
        prefix = part.prefix
        if prefix is not None:
            halves = {
                field: torch.full_like(tensor, torch.nan)
                for field in ("keys", "values", "embeddings")
                if (tensor := getattr(prefix, field)) is not None
            }
            prefix = type(prefix)(prefix.length, **halves)
        parts.append(Part(part.method, part.pool, sites, prefix))
    return Adapter(Digest.of(b"nan " + adapter.digest.encode()), tuple(parts))
