"""AdapterHub's DoRA and VeRA: what they become, and every refusal by the field or tensor it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.checkpoints.adapterhub import read_adapterhub
from server.errors import AdapterError
from server.methods.base import Checkpoint, no_weight
from tests.checkpoints.golden import base_of, files

Q = "model.layers.0.self_attn.q_proj.loras.golden"
SHARED = "model.shared_parameters.golden"


def read(case: str, changes: dict[str, Tensor | None] | None = None, **fields: Any) -> tuple[Checkpoint, ...]:
    config, tensors, interface = files(case)
    config["config"].update(fields)
    changed = {key: value for key, value in {**tensors, **(changes or {})}.items() if value is not None}
    return read_adapterhub(config, changed, base_of(case.partition("/")[0]), interface)


def refused(case: str, changes: dict[str, Tensor | None] | None = None, **fields: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read(case, changes, **fields)
    return caught.value


def test_dora_is_a_lora_and_then_a_factor_per_output() -> None:
    lora, factors = read("llama/dora")
    assert (lora.method, factors.method) == ("lora", "ia3")
    _, tensors, _ = files("llama/dora")
    module = "model.layers.0.self_attn.q_proj"
    adapted = base_of("llama").weight(module) + tensors[f"{Q}.lora_B"] @ tensors[f"{Q}.lora_A"]  # without the scale
    expected = tensors[f"{Q}.m.weight"].flatten() / adapted.norm(dim=1)
    assert torch.allclose(factors.sites[module]["out"], expected)


def test_an_untrained_dora_is_the_base() -> None:
    """B is zero and m the norm of the weight: factor 1, exactly as far as the division goes."""
    _, tensors, _ = files("llama/dora")
    weight = base_of("llama").weight("model.layers.0.self_attn.q_proj")
    changes = {f"{Q}.lora_B": torch.zeros(32, 3), f"{Q}.m.weight": weight.norm(dim=1)[:, None]}
    factors = read("llama/dora", {**tensors, **changes})[1].sites["model.layers.0.self_attn.q_proj"]["out"]
    assert torch.allclose(factors, torch.ones(32), atol=1e-6)


def test_dora_needs_the_bases_weights() -> None:
    config, tensors, _ = files("llama/dora")
    with pytest.raises(AdapterError, match="is held against the base model's weight"):
        read_adapterhub(config, tensors, replace(base_of("llama"), weight=no_weight))


def test_a_vera_is_a_lora_of_products() -> None:
    (found,) = read("phi/vera")
    _, tensors, _ = files("phi/vera")
    site = found.sites["model.layers.0.self_attn.q_proj"]
    assert torch.equal(site["A"], tensors[f"{Q}.vera_D"] @ tensors[f"{SHARED}.lora_A"])
    assert torch.equal(site["B"], tensors[f"{Q}.vera_B"] @ tensors[f"{SHARED}.lora_B"])
    assert set(found.config["scale"].values()) == {2.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("d", [0.0, 7.5])
def test_what_a_vera_starts_from_changes_nothing(d: float) -> None:
    (one,), (other,) = read("phi/vera"), read("phi/vera", vera_d=d, vera_b=None)
    assert all(torch.equal(one.sites[m][side], other.sites[m][side]) for m in one.sites for side in "AB")


@pytest.mark.parametrize(
    ("case", "changes", "field"),
    [
        ("llama/dora", {f"{Q}.m.weight": None}, f"{Q}.m.weight"),
        ("llama/dora", {f"{Q}.m.weight": torch.ones(32)}, f"{Q}.m.weight"),
        ("llama/lora", {f"{Q}.m.weight": torch.ones(32, 1)}, f"{Q}.m.weight"),
        ("phi/vera", {f"{SHARED}.lora_A": None}, f"{SHARED}.lora_A"),
        ("phi/vera", {f"{SHARED}.lora_B": torch.ones(3)}, f"{SHARED}.lora_B"),
        ("phi/vera", {f"{SHARED}.lora_B": torch.ones(16, 3)}, f"{SHARED}.lora_B"),
        ("phi/vera", {f"{SHARED}.lora_C": torch.ones(3)}, f"{SHARED}.lora_C"),
        ("phi/vera", {f"{SHARED}.lora_A": None, f"{SHARED}.lora_B": None}, "config.vera_d"),
        ("phi/vera", {f"{Q}.vera_D": torch.ones(3)}, f"{Q}.vera_D"),
        ("phi/vera", {f"{Q}.vera_B": torch.full((32, 32), 3e38)}, Q),
        ("phi/lora", {f"{SHARED}.lora_A": torch.ones(3, 32)}, SHARED),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(case: str, changes: dict[str, Tensor | None], field: str) -> None:
    assert refused(case, changes).field == field


def test_a_norm_of_zero_is_named() -> None:
    config, tensors, _ = files("llama/dora")
    lost = replace(base_of("llama"), weight=lambda module: -product(tensors, module))
    with pytest.raises(AdapterError, match=r"m\.weight: divided by the norm of the adapted weight is not finite"):
        read_adapterhub(config, tensors, lost)


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.loras.golden.lora_B"] @ tensors[f"{module}.loras.golden.lora_A"]


def test_fields_of_another_kind_of_lora_are_refused() -> None:
    assert refused("llama/ia3", use_dora=True).field == "config.use_dora"
    assert refused("llama/lora", vera_b=0.5).field == "config.vera_d"
