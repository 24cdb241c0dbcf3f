"""Every golden adapter of AdapterHub's library in one staggered, chunked batch per base, on both kinds of kernels.

The library itself cannot be installed beside the server: what it computed lies in tests/golden.
"""

from __future__ import annotations

import copy

import pytest
import torch

from adapters_store.digest import Digest
from server.methods.base import Limits
from server.methods.read import read_adapter
from server.model.kernels import Kernels
from tests.checkpoints.golden import MODELS, base_of, build, cases, expectations, upload
from tests.lab import Lab

ALL = cases("cases")


def test_the_golden_files_are_of_six_bases_and_many_adapters() -> None:
    assert {case.partition("/")[0] for case in ALL} == MODELS.keys()
    assert len(MODELS) >= 6
    assert len(ALL) >= 70


@pytest.mark.parametrize("model", MODELS)
def test_all_adapters_of_a_base(model: str, kernels: Kernels) -> None:
    expected = expectations()
    base, prompt = base_of(model), expected["ids"][0].tolist()
    own = [case for case in ALL if case.startswith(f"{model}/")]
    adapters = {case: read_adapter(upload("cases", case), base, Limits(), Digest.of(case.encode())) for case in own}
    held = {adapter.digest: adapter for adapter in adapters.values()}
    lab = Lab(copy.deepcopy(build(model)), held, kernels=kernels, blocks=1500, slots=128, max_running=128)
    for case, adapter in adapters.items():
        lab.submit(case, prompt, adapter.digest)
        lab.turn()
    lab.run()
    for case in own:
        assert lab.tokens(case) == expected[f"{case}/tokens"][0].tolist(), case
        assert torch.allclose(lab.logits(case)[0], expected[f"{case}/logits"][0, -1], atol=1e-3), case
