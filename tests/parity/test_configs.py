"""Every configuration of a real checkpoint: mixed, staggered and chunked, it answers what its own library does alone."""

from __future__ import annotations

import pytest

from server.model.kernels import Kernels
from tests.parity.configs import CONFIGS, covering
from tests.parity.places import PLACES
from tests.parity.zoo import OWN, Zoo, make_zoo
from tests.tiny import ARCHITECTURES

COVERING = covering()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    architecture: str = request.param
    return make_zoo(architecture, [*COVERING[architecture], *OWN], tmp_path_factory.mktemp(architecture))


def test_every_configuration_is_tried_on_two_architectures_and_every_architecture_with_twelve() -> None:
    assert PLACES.keys() == ARCHITECTURES.keys()
    assert len(CONFIGS) >= 60
    assert min(len(names) for names in COVERING.values()) >= 12
    tried = [name for names in COVERING.values() for name in names]
    assert {name for name in CONFIGS if tried.count(name) < 2} == set()


def test_the_oracles_differ_from_the_base(zoo: Zoo) -> None:
    base = zoo._specimen("base")
    for name, expected in zoo.expected.items():
        moved = float((base.oracle(expected.prompt)[-1] - expected.logits[0]).abs().max())
        assert name == "base" or moved > 0.02, name


def test_mixed_staggered_and_chunked(zoo: Zoo, kernels: Kernels) -> None:
    lab = zoo.lab(kernels=kernels, max_batch_tokens=30, slots=len(zoo.specimens))
    for name in zoo.expected:
        zoo.submit(lab, name)
        lab.turn()
    lab.run()
    zoo.check(lab)
    assert max(lab.observer.families_per_step) >= 3
