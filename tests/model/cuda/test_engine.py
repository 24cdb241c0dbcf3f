"""A whole engine over a GPU's kernels, in Triton's interpreter: the tokens and logits of pure torch, replayed steps too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

from server.model.cuda.lora import triton_lora
from server.model.cuda.paged import triton_attention
from server.model.kernels import Kernels
from tests.lab import Lab
from tests.model.test_graphs import BLOCKS, SIZE, adapter, ask, recording
from tests.tiny import tiny_model

TRITON = Kernels("triton", triton_attention, lora=triton_lora)
MADE = (("a", "lora"), ("b", "lora"), ("c", "bitfit"))


def lab_of(kernels: Kernels, model: str) -> Lab:
    lab = Lab(tiny_model(model), {}, kernels=kernels, blocks=BLOCKS, block_size=SIZE)
    for seed, (name, method) in enumerate(MADE):
        made = adapter(lab, name, method, seed)
        lab.adapters[made.digest] = made
    return lab


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_the_engine_says_the_same(graphs: bool) -> None:
    plain, lab = lab_of(Kernels("torch"), "llama"), lab_of(TRITON, "llama")
    record = recording(lab) if graphs else None
    ask(plain)
    ask(lab)
    for name in ("base", *(f"r{i}" for i in range(len(MADE)))):
        assert lab.tokens(name) == plain.tokens(name)
        torch.testing.assert_close(lab.logits(name), plain.logits(name), rtol=1e-4, atol=1e-4)
    assert record is None or record.replayed


def test_windows_and_softcaps_of_a_real_architecture() -> None:
    plain, lab = lab_of(Kernels("torch"), "gemma2"), lab_of(TRITON, "gemma2")
    for each in (plain, lab):
        each.submit("a", [5, 6, 7, 8] * 5, max_new_tokens=4)
        each.run()
    assert lab.tokens("a") == plain.tokens("a")
    torch.testing.assert_close(lab.logits("a"), plain.logits("a"), rtol=1e-4, atol=1e-4)
