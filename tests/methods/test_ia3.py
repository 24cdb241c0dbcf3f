"""IA3: PEFT's own logits on three architectures, both sides of one module, isolation of rows."""

from __future__ import annotations

import math

import pytest
import torch
from peft import IA3Config

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, ModuleShape
from server.methods.grouped import rows_of
from server.methods.ia3 import IA3Op

CPU = torch.device("cpu")
VARIANTS = {
    "llama": ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2, biases are scaled too": ("qwen2", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2, Conv1D": ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": ("gpt_neox", ["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "opt": ("opt", ["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gemma": ("gemma", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "no feed-forward": ("llama", ["q_proj"], []),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_ia3_gives_pefts_logits(variant, trained, hooked, ids):
    name, targets, feedforward = VARIANTS[variant]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)
    adapter, served = trained(name, config), hooked(name)
    (part,) = adapter.parts()
    served.put(part, 3)

    logits, alone = served.logits(ids, {"ia3": [3, 0, 3]}), served.logits(ids, {})

    expected = adapter.logits(ids)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], atol=1e-6, rtol=0)
    assert (expected - alone).abs().max() > 0.02


def _op() -> IA3Op:
    op = IA3Op(4, 3, CPU, torch.float32)
    op.grow(6)
    return op


@pytest.mark.parametrize("slots", [[1, 2, 3], [2, 2, 2], [0, 1, 0, 2, 2], [3, 0, 1, 1, 0]])
def test_the_rows_of_every_slot_are_scaled_by_their_own_vectors(slots):
    op, rows = _op(), rows_of(slots)
    vectors = {slot: {"in": torch.randn(4), "out": torch.randn(3)} for slot in (1, 2, 3)}
    for slot, tensors in vectors.items():
        op.put(slot, tensors)
    x, y = torch.randn(len(slots), 4), torch.randn(len(slots), 3)
    ones = {"in": torch.ones(4), "out": torch.ones(3)}

    for _ in range(2):  # the second step of a composition uses what the first one kept
        seen = op.before(x, rows)
        out = op.after(x, y.clone(), rows)
        assert torch.equal(seen, torch.stack([x[t] * vectors.get(s, ones)["in"] for t, s in enumerate(slots)]))
        assert torch.equal(out, torch.stack([y[t] * vectors.get(s, ones)["out"] for t, s in enumerate(slots)]))


def test_rows_of_adapters_that_do_not_name_the_module_pass_it_unchanged():
    op, rows = IA3Op(4, 3, CPU, torch.float32), rows_of([9, 1, 0, 9])
    op.grow(2)
    op.put(1, {"in": torch.full((4,), 2.0), "out": torch.full((3,), 3.0)})
    assert op.before(torch.ones(4, 4), rows)[:, 0].tolist() == [1, 2, 1, 1]
    assert op.after(torch.ones(4, 4), torch.ones(4, 3), rows)[:, 0].tolist() == [1, 3, 1, 1]


def test_before_leaves_the_shared_input_alone():
    op = _op()
    op.put(1, {"in": torch.full((4,), 2.0)})
    x = torch.ones(2, 4)

    op.before(x, rows_of([1, 0]))

    assert torch.equal(x, torch.ones(2, 4))


def test_a_side_costs_nothing_until_an_adapter_scales_it():
    op = _op()
    assert (op.nbytes, op.acts_before) == (0, False)
    op.put(1, {"out": torch.ones(3)})
    assert (op.nbytes, op.acts_before) == (4 * 6 * 3, False)
    op.put(2, {"in": torch.ones(4)})
    assert (op.nbytes, op.acts_before) == (4 * 6 * 7, True)


def test_a_reused_slot_keeps_no_vector_of_its_last_adapter():
    op, x, y = _op(), torch.randn(1, 4), torch.randn(1, 3)
    op.put(1, {"in": torch.full((4,), 2.0), "out": torch.full((3,), 2.0)})
    op.put(1, {"out": torch.full((3,), 5.0)})
    assert torch.equal(op.before(x, rows_of([1])), x)
    assert torch.equal(op.after(x, y.clone(), rows_of([1])), 5 * y)
    op.grow(20)
    op.clear(1)
    assert torch.equal(op.after(x, y.clone(), rows_of([1])), y)


def test_nan_in_one_slot_reaches_only_its_own_rows():
    op, rows = _op(), rows_of([1, 0, 2, 1])
    op.put(1, {"in": torch.full((4,), math.nan), "out": torch.full((3,), math.nan)})
    op.put(2, {"in": torch.ones(4), "out": torch.ones(3)})

    sick = [True, False, False, True]
    assert op.before(torch.ones(4, 4), rows).isnan().any(1).tolist() == sick
    assert op.after(torch.ones(4, 4), torch.ones(4, 3), rows).isnan().any(1).tolist() == sick


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"layer.q": {"out": torch.ones(4)}}, r"layer.q.ia3_l: has shape \[4\], the base model needs \[3\]"),
        ({"layer.q": {"in": torch.ones(3)}}, r"layer.q.ia3_l: has shape \[3\], the base model needs \[4\]"),
        ({"layer.n": {"out": torch.ones(4)}}, "'layer.n' is a module of kind norm"),
        ({"layer.z": {"out": torch.ones(4)}}, "has no module 'layer.z'"),
        ({}, "holds no IA3 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(sites, message):
    modules = {"layer.q": ModuleShape("linear", 4, 3), "layer.n": ModuleShape("norm", 4, 4)}
    base = BaseShape(Digest("0" * 64), "tiny", 4, 1, 2, 2, 2, 9, 32, modules)
    with pytest.raises(AdapterError, match=message):
        METHODS["ia3"].read(Checkpoint("ia3", {}, sites), base, Limits())
