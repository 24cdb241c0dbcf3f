"""LoRA on embeddings: PEFT's own logits through a real engine, and the op against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig

from adapters_store.digest import Digest
from server.methods.base import Adapter
from server.methods.grouped import rows_of
from server.methods.lora import LoraOp
from server.methods.lora_embedding import EmbeddingLoraOp
from tests.lab import Lab
from tests.tiny import tiny_model

CPU = torch.device("cpu")
CONFIGS = {
    "llama": {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "gemma": {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "gpt2": {"r": 12, "use_rslora": True, "target_modules": ["wte", "wpe", "c_attn", "lm_head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_in_one_batch_with_others(name, trained, kernels):
    """Prefill in chunks beside decoding rows: the output head sees the kept rows only."""
    saved = [trained(name, LoraConfig(**CONFIGS[name])), trained(name, LoraConfig(r=4, target_modules=r".*(q_proj|c_attn)"))]
    adapters = {Digest(f"{i}" * 64): Adapter(Digest(f"{i}" * 64), each.parts()) for i, each in enumerate(saved)}
    lab = Lab(tiny_model(name), adapters, max_batch_tokens=9, kernels=kernels)
    for i, digest in enumerate([*adapters, *adapters]):
        lab.submit(f"r{i}", range(3 + i, 12 + 2 * i), digest)
        lab.turn()
    lab.submit("base", range(3, 12))
    lab.run()

    for i in range(4):
        prompt, tokens = list(range(3 + i, 12 + 2 * i)), lab.tokens(f"r{i}")
        expected = saved[i % 2].logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(lab.logits(f"r{i}"), expected, atol=1e-3, rtol=0)
        assert expected.argmax(-1).tolist() == tokens
    tokens = torch.tensor([[*range(3, 12), *lab.tokens("base")]])
    torch.testing.assert_close(lab.logits("base"), tiny_model(name)(tokens).logits[0, 8:-1], atol=1e-4, rtol=0)


def _op(dtype: torch.dtype = torch.float32) -> EmbeddingLoraOp:
    op = EmbeddingLoraOp(9, 8, LoraOp(8, 8, 5, CPU, dtype), CPU, dtype)
    op.grow(4)
    return op


@pytest.mark.parametrize("slots", [[1, 2, 3], [1, 1, 1, 1, 1, 2], [0, 2, 0, 2, 1], [3], [0, 0], [7, 1, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_goes_through_its_own_adapter(slots, dtype):
    torch.manual_seed(0)
    op, sites = _op(dtype), {}
    for slot, rank in ((1, 2), (2, 8), (3, 1)):
        sites[slot] = {"A": torch.randn(rank, 9).to(dtype), "B": torch.randn(5, rank).to(dtype)}
        op.put(slot, sites[slot])
    ids, y = torch.randint(9, (len(slots),)), torch.randn(len(slots), 5)
    expected = y.clone()
    for at, slot in enumerate(slots):
        if slot in sites:
            expected[at] += sites[slot]["B"].float() @ sites[slot]["A"].float()[:, ids[at]]

    torch.testing.assert_close(op.after(ids, y.clone(), rows_of(slots)), expected, atol=1e-5, rtol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_batch_mates(kernels):
    if kernels.lora is None:
        pytest.skip("torch's batched products may round differently with the number of rows")
    torch.manual_seed(0)
    op = EmbeddingLoraOp(9, 8, LoraOp(8, 8, 47, CPU, torch.float32, kernels.lora), CPU, torch.float32)
    op.grow(4)
    for slot in (1, 2, 3):
        op.put(slot, {"A": torch.randn(5, 9), "B": torch.randn(47, 5)})
    slots = [2, 0, 1, 1, 1, 1, 1, 3, 3]
    ids, y = torch.randint(9, (len(slots),)), torch.randn(len(slots), 47)

    together = op.after(ids, y.clone(), rows_of(slots))

    for at, slot in enumerate(slots):
        alone = op.after(ids[at : at + 1], y[at : at + 1].clone(), rows_of([slot]))
        assert torch.equal(alone[0], together[at])


def test_nan_and_what_a_slot_held_before_stay_where_they_are():
    op, ids, rows = _op(), torch.tensor([3, 3, 4]), rows_of([1, 2, 0])
    op.put(1, {"A": torch.full((8, 9), math.nan), "B": torch.ones(5, 8)})
    op.put(2, {"A": torch.ones(2, 9), "B": torch.ones(5, 2)})
    assert op.after(ids, torch.zeros(3, 5), rows).isnan().any(-1).tolist() == [True, False, False]

    op.put(1, {"A": torch.ones(1, 9), "B": torch.ones(5, 1)})
    assert op.after(ids, torch.zeros(3, 5), rows_of([1, 2, 0])).tolist() == [[1.0] * 5, [2.0] * 5, [0.0] * 5]
    op.clear(1)
    assert torch.equal(op.after(ids, torch.zeros(3, 5), rows_of([1, 1, 1])), torch.zeros(3, 5))
    assert op.nbytes == 4 * 4 * (9 * 8 + 8 * 8 + 8 * 5)
