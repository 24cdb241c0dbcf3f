"""DoRA: PEFT's own logits for every variant that is served, the op against the formula, refusals by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Checkpoint, Limits, ModuleShape, no_weight
from server.methods.dora import DoraOp
from server.methods.grouped import rows_of
from server.methods.lora import LoraOp
from tests.lab import Lab
from tests.tiny import tiny_model

CPU = torch.device("cpu")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "llama, every linear": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": LINEARS}),
    "biases in the base": ("qwen2", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases trained beside it": ("gpt2", {"r": 4, "bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rsLoRA and patterns": ("llama", {"r": 9, "use_rslora": True, "rank_pattern": {"layers.1": 2, r".*\.1\..*": 3}}),
    "embedding and head": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "lm_head"]}),
    "embedding that is scaled": ("gemma", {"r": 4, "target_modules": ["embed_tokens", "o_proj"]}),
    "head that shares the embedding's weight": ("gemma", {"r": 4, "target_modules": ["lm_head"]}),
}


@pytest.fixture
def dora(trained):
    """dora(model, **fields) -> the saved adapter, its magnitudes near those of the base as after a training."""

    def make(name, **fields):
        saved = trained(name, LoraConfig(use_dora=True, **{"target_modules": ["q_proj", "up_proj"]} | fields))
        assert any("magnitude" in key for key, _ in saved.oracle.named_parameters())
        return saved

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_dora_gives_pefts_logits(variant, dora, hooked, ids):
    name, fields = VARIANTS[variant]
    adapter, served = dora(name, **fields), hooked(name)
    parts = adapter.parts()
    for part in parts:
        served.put(part, 2)
    slots = {part.pool: [2, 0, 2] for part in parts}

    logits, alone = served.logits(ids, slots), served.logits(ids, {})

    assert parts[0].pool.startswith("dora:")
    expected = adapter.logits(ids)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], atol=1e-6, rtol=0)
    assert (expected - alone).abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_one_batch_with_other_families(name, dora, trained, kernels):
    targets = ["q_proj", "down_proj", "lm_head"] if name == "llama" else ["c_attn", "wte", "lm_head"]
    linear = targets[0]
    saved = [
        dora(name, r=4, target_modules=targets),
        trained(name, LoraConfig(r=4, target_modules=[linear])),
        dora(name, r=5, target_modules=[linear], lora_alpha=3),
        trained(name, IA3Config(target_modules=[linear], feedforward_modules=[])),
    ]
    adapters = {Digest(f"{i}" * 64): Adapter(Digest(f"{i}" * 64), each.parts()) for i, each in enumerate(saved)}
    lab = Lab(tiny_model(name), adapters, max_batch_tokens=9, kernels=kernels)
    for i, digest in enumerate(adapters):
        lab.submit(f"r{i}", range(3 + i, 15 + 2 * i), digest)
        lab.turn()
    lab.run()

    for i, each in enumerate(saved):
        prompt, tokens = list(range(3 + i, 15 + 2 * i)), lab.tokens(f"r{i}")
        expected = each.logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(lab.logits(f"r{i}"), expected, atol=1e-3, rtol=0)
        assert expected.argmax(-1).tolist() == tokens


# --- the op ---------------------------------------------------------------------------------------------------------


def _op() -> DoraOp:
    op = DoraOp(LoraOp(8, 6, 5, CPU, torch.float32), 5, CPU)
    op.grow(4)
    return op


def _site(rank: int, *, shift: bool = False) -> dict[str, torch.Tensor]:
    site = {"A": torch.randn(rank, 6), "B": torch.randn(5, rank), "factor": torch.rand(5)}
    return {**site, "shift": torch.randn(5)} if shift else site


@pytest.mark.parametrize("slots", [[1, 2, 3], [1, 1, 1, 1, 1, 2], [0, 2, 0, 2, 1], [3], [0, 0], [7, 1, 7]])
def test_each_row_is_scaled_and_shifted_by_its_own_adapter(slots):
    torch.manual_seed(0)
    op, sites = _op(), {1: _site(2), 2: _site(8, shift=True), 3: _site(1)}
    for slot, site in sites.items():
        op.put(slot, site)
    x, y = torch.randn(len(slots), 6), torch.randn(len(slots), 5)
    expected = y.clone()
    for at, site in ((at, sites[slot]) for at, slot in enumerate(slots) if slot in sites):
        expected[at] = y[at] * site["factor"] + site.get("shift", 0) + site["B"] @ site["A"] @ x[at]

    torch.testing.assert_close(op.after(x, y.clone(), rows_of(slots)), expected, atol=1e-5, rtol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_batch_mates(kernels):
    if kernels.lora is None:
        pytest.skip("torch's batched products may round differently with the number of rows")
    torch.manual_seed(0)
    op = DoraOp(LoraOp(8, 33, 47, CPU, torch.float32, kernels.lora), 47, CPU)
    op.grow(4)
    for slot in (1, 2, 3):
        vectors = {"factor": torch.rand(47), "shift": torch.randn(47)}
        op.put(slot, {"A": torch.randn(5, 33), "B": torch.randn(47, 5), **vectors})
    slots = [2, 0, 1, 1, 1, 1, 1, 3, 3]
    x, y = torch.randn(len(slots), 33), torch.randn(len(slots), 47)

    together = op.after(x, y.clone(), rows_of(slots))

    for at, slot in enumerate(slots):
        alone = op.after(x[at : at + 1], y[at : at + 1].clone(), rows_of([slot]))
        assert torch.equal(alone[0], together[at])


def test_nan_and_what_a_slot_held_before_stay_where_they_are():
    op, x, y = _op(), torch.randn(3, 6), torch.randn(3, 5)
    op.put(1, {name: torch.full_like(tensor, math.nan) for name, tensor in _site(8, shift=True).items()})
    op.put(2, _site(2))
    assert op.after(x, y.clone(), rows_of([1, 2, 0])).isnan().any(-1).tolist() == [True, False, False]

    plain = _site(1)
    op.put(1, plain)
    expected = y[:1] * plain["factor"] + x[:1] @ plain["A"].T @ plain["B"].T
    torch.testing.assert_close(op.after(x, y.clone(), rows_of([1, 2, 0]))[:1], expected)
    op.clear(1)
    assert torch.equal(op.after(x, y.clone(), rows_of([1, 1, 1])), y)
    assert op.nbytes == 4 * 4 * (6 * 8 + 8 * 5 + 5 + 5)


# --- reading --------------------------------------------------------------------------------------------------------

WEIGHT = torch.arange(30.0).view(5, 6) / 7
BIAS = torch.arange(5.0)


def _base(weight: torch.Tensor = WEIGHT) -> BaseShape:
    modules = {"layer.q": ModuleShape("linear", 6, 5, BIAS), "layer.k": ModuleShape("linear", 6, 5)}
    read = {"layer.q": weight, "layer.k": weight}
    return BaseShape(Digest("0" * 64), "tiny", 6, 1, 2, 2, 3, 9, 32, modules, weight=lambda name: read[name].clone())


def _checkpoint(module: str = "layer.q", **tensors: torch.Tensor | None) -> Checkpoint:
    stored = {"A": torch.ones(2, 6), "B": torch.ones(5, 2), "magnitude": torch.arange(1.0, 6.0)} | tensors
    return Checkpoint("dora", {"scale": {module: 0.5}}, {module: {k: v for k, v in stored.items() if v is not None}})


def test_the_factor_is_worked_out_against_the_bases_weight():
    part = METHODS["dora"].read(_checkpoint(), _base(), Limits())

    factor = torch.arange(1.0, 6.0) / (WEIGHT + 1.0).norm(dim=1)
    site = part.sites["layer.q"]
    assert part.pool == "dora:8"
    torch.testing.assert_close(site["factor"], factor)
    torch.testing.assert_close(site["B"], 0.5 * factor[:, None].expand(5, 2))
    torch.testing.assert_close(site["shift"], (1 - factor) * BIAS)
    assert "shift" not in METHODS["dora"].read(_checkpoint("layer.k"), _base(), Limits()).sites["layer.k"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (_checkpoint(magnitude=None), "layer.q.lora_magnitude_vector: is missing"),
        (_checkpoint(magnitude=torch.ones(6)), r"layer.q.lora_magnitude_vector: has shape \[6\], the base model needs \[5\]"),
        (_checkpoint(A=torch.ones(65, 6), B=torch.ones(5, 65)), "rank 65 is over this server's limit of 64"),
        (_checkpoint("layer.x"), "has no module 'layer.x'"),
        (Checkpoint("dora", {"scale": {}}), "the upload holds no DoRA tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(checkpoint, message):
    with pytest.raises(AdapterError, match=message):
        METHODS["dora"].read(checkpoint, _base(), Limits(max_rank=64))


def test_an_output_feature_of_length_zero_is_refused():
    with pytest.raises(AdapterError, match=r"layer.q.lora_magnitude_vector: cannot be reached: .* has length 0"):
        METHODS["dora"].read(_checkpoint(), _base(torch.full((5, 6), -1.0)), Limits())


def test_a_base_without_weights_is_named():
    with pytest.raises(AdapterError, match=r"layer.q: is held against the base model's weight"):
        METHODS["dora"].read(_checkpoint(), replace(_base(), weight=no_weight), Limits())
