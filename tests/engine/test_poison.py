"""Pages that a request left full of NaN are given to the next one as they are: no bit of its answer may change.

Blocks are not cleared, so every kernel must read only what its row wrote. The attacker fails, or is cancelled before anybody
could notice; victims are prefills in chunks, decodes, stored prefixes with a partly filled block, and soft prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.methods.base import Adapter, Part, Prefix
from server.model.kernels import Kernels
from server.requests import FinishReason
from tests.lab import Lab, kernels_named
from tests.tiny import tiny_model

BLOCKS, SIZE = 14, 4
CAPACITY = (BLOCKS - 2) * SIZE  # positions of one request that takes nearly every block
NAN = Adapter(
    Digest.of(b"nan"),
    (Part("bitfit", "bitfit", {"model.layers.0.self_attn.k_proj": {"delta": torch.full((16,), torch.nan)},
                               "model.layers.0.self_attn.v_proj": {"delta": torch.full((16,), torch.nan)},
                               "model.layers.0.mlp.down_proj": {"delta": torch.full((32,), torch.nan)}}),),
)  # fmt: skip
_keys, _values, _soft = torch.randn(3, 2, 5, 2, 8, generator=torch.Generator().manual_seed(1))
STORED = Adapter(Digest.of(b"kv"), (Part("prefix_tuning", prefix=Prefix(5, _keys, _values)),))
SOFT = Adapter(Digest.of(b"soft"), (Part("prompt_tuning", prefix=Prefix(5, embeddings=_soft.reshape(5, 32))),))
KNOWN = {adapter.digest: adapter for adapter in (NAN, STORED, SOFT)}
VICTIMS: dict[str, tuple[Digest, ...]] = {"base": (), "stored": (STORED.digest,), "soft": (SOFT.digest,)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with capture_logs():
        yield


@pytest.fixture(scope="module", params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


def new_lab(kernels: Kernels, architecture: str) -> Lab:
    return Lab(tiny_model(architecture), KNOWN, blocks=BLOCKS, block_size=SIZE, max_batch_tokens=7, kernels=kernels)


def answers(lab: Lab) -> dict[str, torch.Tensor]:
    """The logits [tokens, V] of each victim, alone on the pages."""
    for name, adapters in VICTIMS.items():
        lab.submit(name, [5, 9, 33, 60, 12, 71, 8, 40, 3], *adapters, max_new_tokens=8)
        lab.run()
        assert lab.finished(name)
    return {name: lab.logits(name) for name in VICTIMS}


def poisoned(lab: Lab) -> int:
    """Blocks that hold NaN in some layer."""
    return int(torch.stack([*chain.from_iterable(lab.runner._caches)]).isnan().any(dim=(0, 2, 3, 4)).sum())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # without and with a window and softcap
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_a_page_of_nan_changes_no_bit_of_its_next_owners(how: str, architecture: str, kernels: Kernels) -> None:
    clean = answers(new_lab(kernels, architecture))
    lab = new_lab(kernels, architecture)
    lab.submit("attacker", list(range(3, 3 + CAPACITY - 1)), NAN.digest, max_new_tokens=1)
    if how == "is cancelled":
        for _ in range(-(-CAPACITY // 7)):  # all but its last chunk
            lab.turn()
        lab.engine.cancel("attacker")
    lab.run()
    assert lab.ending("attacker").finish is (FinishReason.ERROR if how == "fails" else FinishReason.CANCELLED)
    assert poisoned(lab) >= BLOCKS - 4
    found = answers(lab)
    assert poisoned(lab) < BLOCKS - 4  # the victims wrote over some of these very pages
    for name in VICTIMS:
        assert torch.equal(found[name], clean[name]), name


def test_nothing_computed_through_nan_is_found_in_the_prefix_cache(kernels: Kernels) -> None:
    lab = new_lab(kernels, "llama")
    prompt = list(range(3, 3 + 5 * SIZE))
    for turn in range(2):
        lab.submit(f"{turn}", prompt, NAN.digest)
        lab.run()
        assert "not finite" in str(lab.ending(f"{turn}").error)
        assert lab.ending(f"{turn}").cached_tokens == 0
    assert not lab.scheduler.pages._by_key
