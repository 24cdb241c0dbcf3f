"""BitFit: the deltas of trained biases, also where the base has none, against the base with its biases replaced."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, ModuleShape
from server.methods.bitfit import BitFitOp
from server.methods.grouped import rows_of
from server.methods.read import read_parts

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.ln_2", "transformer.ln_f", "transformer.h.1.mlp.c_fc"]),
        ("qwen2", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        ("llama", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]),
    ],
)
def test_a_bitfit_upload_gives_the_logits_of_the_base_with_those_biases(name, modules, models, base_of, hooked, ids, tmp_path):
    torch.manual_seed(3)
    biases = {module: torch.randn(base_of(name).modules[module].out_features) for module in modules}
    oracle = copy.deepcopy(models[name])
    for module, bias in biases.items():
        oracle.get_submodule(module).bias = nn.Parameter(bias)
    save_file({f"base_model.model.{m}.bias": b for m, b in biases.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BITFIT"}))

    (part,) = read_parts({path.name: path for path in tmp_path.iterdir()}, base_of(name), Limits())
    served = hooked(name)
    served.put(part, 1)
    logits, alone = served.logits(ids, {"bitfit": [1, 0, 1]}), served.logits(ids, {})

    expected = oracle(ids, use_cache=False).logits.detach()
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], atol=1e-6, rtol=0)
    assert (expected - alone).abs().max() > 0.05


@pytest.mark.parametrize("slots", [[1, 2, 3], [2, 2, 2], [0, 1, 0, 2, 2], [3, 0, 1, 1, 0], [0]])
def test_every_row_gets_its_own_delta(slots):
    op, rows = BitFitOp(3, CPU, torch.float32), rows_of(slots)
    op.grow(4)
    deltas = torch.cat([torch.zeros(1, 3), torch.randn(3, 3)])
    for slot in (1, 2, 3):
        op.put(slot, {"delta": deltas[slot]})
    y = torch.randn(len(slots), 3)

    for _ in range(2):
        torch.testing.assert_close(op.after(y, y.clone(), rows), y + deltas[slots])


def test_rows_of_adapters_that_do_not_name_the_module_pass_it_unchanged():
    op, rows = BitFitOp(3, CPU, torch.float32), rows_of([9, 1, 0, 9])
    op.grow(2)
    op.put(1, {"delta": torch.ones(3)})
    assert op.after(torch.ones(4, 3), torch.zeros(4, 3), rows)[:, 0].tolist() == [0, 1, 0, 0]


def test_nan_in_one_slot_reaches_only_its_own_rows_and_leaves_with_its_adapter():
    op, rows = BitFitOp(3, CPU, torch.float32), rows_of([1, 0, 2, 1])
    op.grow(3)
    op.put(1, {"delta": torch.full((3,), math.nan)})
    assert op.after(torch.ones(4, 3), torch.ones(4, 3), rows).isnan().any(1).tolist() == [True, False, False, True]
    op.clear(1)
    assert not op.after(torch.ones(4, 3), torch.ones(4, 3), rows_of([1, 0, 2, 1])).isnan().any()


def _base() -> BaseShape:
    modules = {
        "layer.q": ModuleShape("linear", 4, 3, bias=torch.full((3,), 0.5)),
        "layer.o": ModuleShape("conv1d", 4, 3),
        "layer.norm": ModuleShape("norm", 4, 4),
        "layer.q_norm": ModuleShape("norm", 2, 2),
        "lm_head": ModuleShape("linear", 4, 9),
    }
    return BaseShape(Digest("0" * 64), "tiny", 4, 1, 2, 2, 2, 9, 32, modules)


def test_a_stored_bias_becomes_a_delta_and_a_stored_delta_stays_one():
    stored = torch.full((3,), 2.0, dtype=torch.bfloat16)
    sites = {"layer.q": {"bias": stored}, "layer.o": {"bias": stored}}
    part = METHODS["bitfit"].read(Checkpoint("bitfit", {}, sites), _base(), Limits())
    assert part.sites["layer.q"]["delta"].tolist() == [1.5] * 3
    assert part.sites["layer.o"]["delta"].tolist() == [2.0] * 3

    part = METHODS["bitfit"].read(Checkpoint("bitfit", {}, {"layer.q": {"delta": stored}}), _base(), Limits())
    assert part.sites["layer.q"]["delta"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"layer.q": {"bias": torch.ones(4)}}, r"layer.q.bias: has shape \[4\], the base model needs \[3\]"),
        ({"layer.z": {"bias": torch.ones(4)}}, "has no module 'layer.z'"),
        ({"layer.q_norm": {"bias": torch.ones(2)}}, "normalises heads"),
        ({"lm_head": {"bias": torch.ones(8)}}, r"lm_head.bias: has shape \[8\], the base model needs \[9\]"),
        ({}, "holds no bias tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(sites, message):
    with pytest.raises(AdapterError, match=message):
        METHODS["bitfit"].read(Checkpoint("bitfit", {}, sites), _base(), Limits())
