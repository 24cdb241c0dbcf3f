"""AdaLoRA and VeRA: the factors they fold into, and the field or tensor each refusal names."""

from __future__ import annotations

import pytest
import torch

from adapters_store.digest import Digest
from server.checkpoints import peft_folded
from server.checkpoints.peft import read_peft
from server.checkpoints.peft_folded import fold_vera
from server.errors import AdapterError
from server.methods.base import BaseShape, ModuleShape

Q, UP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
q, up = (module.removeprefix("base_model.model.") for module in (Q, UP))


def ada(rank: int = 4, module: str = Q) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A": torch.full((rank, 6), 2.0),
        f"{module}.lora_B": torch.ones(5, rank),
        f"{module}.lora_E": torch.arange(rank).float()[:, None],
    }


def without(tensors: dict[str, torch.Tensor], ending: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}


def read(kind: str, tensors: dict[str, torch.Tensor], **fields: object):
    return read_peft({"peft_type": kind, **({"init_r": 4} if kind == "ADALORA" else {"r": 4}), **fields}, tensors)


def test_adaloras_singular_values_go_into_a_and_its_scale_is_alpha_over_the_first_rank():
    (found,) = read("ADALORA", ada(), lora_alpha=8)
    assert found.method == "lora"
    assert torch.equal(found.sites[q]["A"], torch.full((4, 6), 2.0) * torch.arange(4.0)[:, None])
    assert found.config["scale"][q] == pytest.approx(8 / (4 + 1e-5), rel=1e-7)


def test_an_allocated_rank_keeps_the_first_ranks_scale():
    masks = {f"{q}.lora_E": [True, False, True, False]}
    tensors = ada(2) | ada(4, UP)
    (found,) = read("ADALORA", tensors, rank_pattern=masks, lora_alpha=8)
    assert found.config["scale"][q] == found.config["scale"][up] == pytest.approx(2.0, rel=1e-5)
    (found,) = read("ADALORA", tensors, rank_pattern=masks, lora_alpha=0)
    assert [found.config["scale"][module] for module in (q, up)] == pytest.approx([0.5, 1.0], rel=1e-5)


def test_trained_biases_come_beside_them():
    for kind, tensors, bias in (("ADALORA", ada(), "lora_only"), ("VERA", vera(), "vera_only")):
        _, found = read(kind, {**tensors, f"{Q}.base_layer.bias": torch.ones(5)}, bias=bias)
        assert (found.method, list(found.sites)) == ("bitfit", [q])


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, without(ada(), "lora_E"), f"^{Q}.lora_E: is missing although"),
        ({}, without(ada(), "lora_B"), f"^{Q}.lora_B: is missing although"),
        ({}, ada() | {f"{Q}.lora_E": torch.ones(4)}, f"^{Q}.lora_E: has 1 dimensions"),
        ({}, ada() | {f"{Q}.lora_E": torch.ones(3, 1)}, rf"^{Q}.lora_E: has shape \[3, 1\].*needs \[4, 1\]"),
        ({}, ada(3), f"^{Q}.lora_A: has rank 3, the config says 4"),
        ({"rank_pattern": {f"{q}.lora_E": [True, True, False, False]}}, ada(), f"^{Q}.lora_A: has rank 4, the config says 2"),
        ({"rank_pattern": {f"{q}.lora_E": [True]}}, ada(1), f"^rank_pattern: masks 1 ranks of {q}, init_r is 4"),
        ({"rank_pattern": {"q_proj": 3}}, ada(), "^rank_pattern: .*list"),
        ({"target_modules": ["k_proj"]}, ada(), "^target_modules: does not name"),
        ({"exclude_modules": [q]}, ada(), "^exclude_modules: names"),
        ({"layers_to_transform": [3]}, ada(), "^layers_to_transform: leaves out"),
        ({"use_dora": True}, ada(), "^use_dora: True is not served"),
        ({"init_r": 0}, ada(), "^init_r: "),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 6)}, "lora_A.weight: matches nothing"),
    ],
)
def test_an_adalora_that_is_not_exact_is_refused_by_name(fields, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read("ADALORA", tensors, **fields)


def vera() -> dict[str, torch.Tensor]:
    return {
        "base_model.vera_A": torch.arange(28.0).view(4, 7),
        "base_model.vera_B": torch.arange(20.0).view(5, 4),
        f"{Q}.vera_lambda_b": torch.arange(3.0),
        f"{Q}.vera_lambda_d": torch.arange(4.0),
    }


def base(out: int = 3, into: int = 6) -> BaseShape:
    modules = {q: ModuleShape("linear", into, out)}
    return BaseShape(Digest("0" * 64), "tiny", 6, 1, 2, 2, 3, 9, 32, modules)


def test_veras_projections_are_cut_to_the_module_and_scaled_by_its_lambdas():
    (found,) = read("VERA", vera())
    folded = fold_vera(found, base())
    assert (folded.method, folded.config["scale"]) == ("lora", {q: 1.0})
    assert torch.equal(folded.sites[q]["A"], torch.arange(28.0).view(4, 7)[:, :6] * torch.arange(4.0)[:, None])
    assert torch.equal(folded.sites[q]["B"], torch.arange(20.0).view(5, 4)[:3] * torch.arange(3.0)[:, None])


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, without(vera(), "vera_A"), "^base_model.vera_A: is missing; save with save_projection=True"),
        ({}, without(vera(), "vera_B"), "^base_model.vera_B: is missing; save with save_projection=True"),
        (
            {"save_projection": False},
            without(vera(), "vera_A"),
            "^save_projection: False draws .*on the machine; save with True",
        ),
        ({"save_projection": False}, vera(), "^save_projection: False draws .*although the file holds them"),
        ({"r": 5}, vera(), r"^base_model.vera_A: has shape \[4, 7\], r is 5"),
        ({}, vera() | {"base_model.vera_B": torch.ones(4, 5)}, r"^base_model.vera_B: has shape \[4, 5\], r is 4"),
        ({}, vera() | {"base_model.vera_A": torch.ones(4)}, "^base_model.vera_A: has shape"),
        ({}, without(vera(), "lambda_d"), f"^{Q}.vera_lambda_d: is missing"),
        ({}, vera() | {f"{Q}.vera_lambda_d": torch.ones(3)}, rf"^{Q}.vera_lambda_d: has shape \[3\]"),
        ({"target_modules": ["k_proj"]}, vera(), "^target_modules: does not name"),
        ({"layers_to_transform": 3}, vera(), "^layers_to_transform: leaves out"),
        ({}, vera() | {f"{Q}.base_layer.bias": torch.ones(3)}, f"^{Q}.base_layer.bias: matches nothing"),
    ],
)
def test_a_vera_that_is_not_exact_is_refused_by_name(fields, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read("VERA", tensors, **fields)


def test_a_vera_that_does_not_fit_the_base_is_refused_by_name(monkeypatch):
    (found,) = read("VERA", vera())
    for shape, message in (
        (base(out=4), r"vera_lambda_b: has shape \[3\], the base model needs \[4\]"),
        (base(into=8), r"^base_model.vera_A: and vera_B span \[5, 7\], .* is \[3, 8\]"),
        (BaseShape(Digest("0" * 64), "tiny", 6, 1, 2, 2, 3, 9, 32, {}), "has no module"),
    ):
        with pytest.raises(AdapterError, match=message):
            fold_vera(found, shape)
    monkeypatch.setattr(peft_folded, "MAX_FOLDED_BYTES", 143)
    with pytest.raises(AdapterError, match=r"^r: 4 over 1 modules takes 144 bytes, over the limit of 143"):
        fold_vera(found, base())
