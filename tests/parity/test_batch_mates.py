"""Batch mates never matter: a request's answer among 31 others is the one it gets alone, whoever the others are."""

from __future__ import annotations

import random

import pytest
import torch

from server.model.kernels import Kernels
from tests.lab import Lab
from tests.parity.families import FAMILIES
from tests.parity.zoo import OWN, Zoo, make_zoo
from tests.tiny import VOCAB

ROWS = 32
NEW = 6
PROMPTS = [torch.randint(3, VOCAB, (5 + i % 9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(ROWS)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(request.param, [*FAMILIES, *OWN], tmp_path_factory.mktemp(request.param))


def run(zoo: Zoo, kernels: Kernels, requests: list[tuple[int, str]]) -> Lab:
    """Every (prompt, name) at once, once everyone's adapter is there: all of them are in every step."""
    lab = zoo.lab(kernels=kernels, max_batch_tokens=1024, slots=ROWS, blocks=1025)
    used = {name: () if name == "base" else (zoo.specimens[name].digest,) for _, name in requests}
    for name, digests in used.items():
        lab.submit(name, [90], *digests, max_new_tokens=1)
    lab.run()
    before = len(lab.observer.rows_per_step)
    for at, name in requests:
        lab.submit(f"{at}", PROMPTS[at], *used[name], max_new_tokens=NEW)
    lab.run()
    assert lab.observer.rows_per_step[before:] == [len(requests)] * NEW
    return lab


def logprobs(lab: Lab, at: int) -> torch.Tensor:
    """[NEW, V]"""
    return lab.logits(f"{at}").log_softmax(-1)


def test_alone_and_among_thirty_one_others(zoo: Zoo, kernels: Kernels) -> None:
    names = ["base", *zoo.specimens]
    requests = [(at, names[at % len(names)]) for at in range(ROWS)]
    alone = {at: run(zoo, kernels, [(at, name)]) for at, name in requests}
    for seed in range(3):
        random.Random(seed).shuffle(requests)
        together = run(zoo, kernels, requests)
        different = {}
        for at, name in requests:
            assert together.tokens(f"{at}") == alone[at].tokens(f"{at}"), name
            different[name] = float((logprobs(together, at) - logprobs(alone[at], at)).abs().max())
        # Native kernels promise more: not a bit depends on the number of rows.
        assert {name: by for name, by in different.items() if by > (0 if kernels.name == "native" else 1e-4)} == {}
