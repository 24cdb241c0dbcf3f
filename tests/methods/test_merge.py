"""Merging, value by value; whole merges are held against PEFT in tests/parity/test_derived.py."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.errors import ValidationError
from server.methods.base import Adapter, Part
from server.methods.lora import pooled
from server.methods.merge import keep_largest, majority_sign, merge, random_mask
from server.recipes import Merge, Strategy

A, B = Digest.of(b"a"), Digest.of(b"b")
X, Y = "layers.0.x", "layers.0.y"


def adapter(digest: Digest, part: Part) -> Adapter:
    return Adapter(digest, (part,))


def lora(digest: Digest, *modules: str, rank: int = 2, scale: float = 1.0, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sites = {
        module: {"A": torch.randn(rank, 6, generator=generator), "B": torch.randn(5, rank, generator=generator) * scale}
        for module in modules
    }
    part = pooled(sites)
    return adapter(digest, Part("lora", part.pool, part.sites, scale=dict.fromkeys(modules, scale)))


def delta(part: Part, module: str) -> Tensor:
    site = part.sites[module]
    return site["B"].float() @ site["A"].float()


def test_only_the_largest_values_are_kept() -> None:
    values = torch.tensor([[1.0, -5.0, 0.5], [4.0, -2.0, 0.0]])
    assert keep_largest(values, 0.5).tolist() == [[0, -5, 0], [4, -2, 0]]
    assert keep_largest(values, 0.1).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert torch.equal(keep_largest(values, 1.0), values)


def test_the_majority_is_of_sizes_or_of_heads() -> None:
    stack = torch.tensor([[3.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    assert majority_sign(stack, "total").tolist() == [1, 1, 1]
    assert majority_sign(stack, "frequency").tolist() == [-1, 1, 1]


def test_random_masks_depend_on_the_recipe_and_the_place_alone() -> None:
    recipe = Merge((A, B), (1.0, 1.0), "dare_linear", 0.3)
    zeros = torch.zeros(200, 50)
    mask = random_mask(recipe, "x.A", 0, zeros)
    torch.manual_seed(1)
    assert torch.equal(random_mask(recipe, "x.A", 0, zeros), mask)
    assert set(mask.flatten().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.3, abs=0.02)
    other = Merge((A, B), (1.0, 0.9), "dare_linear", 0.3)
    for found in (
        random_mask(recipe, "x.B", 0, zeros),
        random_mask(recipe, "x.A", 1, zeros),
        random_mask(other, "x.A", 0, zeros),
    ):
        assert not torch.equal(found, mask)


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_merge_is_the_same_every_time(strategy: Strategy) -> None:
    recipe = Merge((A, B), (1.0, 0.5), strategy, 0.5)
    sources = [lora(A, X, Y, seed=1), lora(B, X, Y, seed=2, scale=0.7)]
    first, second = merge(recipe, sources), merge(recipe, sources)
    assert all(torch.equal(first.sites[m][side], second.sites[m][side]) for m in (X, Y) for side in "AB")


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.375, -1.5])
def test_one_adapter_of_weight_one_is_itself(scale: float) -> None:
    source = lora(A, X, scale=scale)
    merged = merge(Merge((A,), (1.0,), "ties", 0.5), [source])
    assert torch.allclose(delta(merged, X), delta(source.parts[0], X), atol=1e-5)
    assert merged.pool == "lora:8"


def test_a_module_of_one_source_is_merged_over_that_one() -> None:
    one, two = lora(A, X, Y, seed=1), lora(B, X, seed=2)
    merged = merge(Merge((A, B), (0.25, 3.0)), [one, two])
    assert torch.allclose(delta(merged, Y), 0.25 * delta(one.parts[0], Y), atol=1e-5)
    assert list(merged.sites) == [X, Y]


def test_a_source_may_be_named_twice() -> None:
    source = lora(A, X)
    merged = merge(Merge((A, A), (0.5, 0.5)), [source, source])
    assert torch.allclose(delta(merged, X), 2 * delta(source.parts[0], X), atol=1e-5)  # sqrt(1/2) twice, of A and of B


def test_sources_stay_as_they_are() -> None:
    sources = [lora(A, X, seed=1), lora(B, X, seed=2)]
    before = [{side: site[side].clone() for side in "AB"} for s in sources for site in s.parts[0].sites.values()]
    for strategy in get_args(Strategy):
        merge(Merge((A, B), (1.0, 2.0), strategy, 0.4), sources)
    after = [site for s in sources for site in s.parts[0].sites.values()]
    assert all(torch.equal(b[side], a[side]) for b, a in zip(before, after, strict=True) for side in "AB")


def test_several_lora_parts_of_one_source_are_all_merged() -> None:
    two_pools = Adapter(A, (*lora(A, X).parts, *lora(A, Y, rank=12).parts))
    merged = merge(Merge((A,), (1.0,)), [two_pools])
    assert (list(merged.sites), merged.pool) == ([X, Y], "lora:16")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("ia3", "ia3", {X: {"out": torch.ones(5)}}), "`merged_adapters.ids[1]` holds ia3; only LoRA can be merged"),
        (
            Part("lora", "lora:8", {X: {"A": torch.ones(2, 6), "B": torch.ones(5, 2), "bias": torch.ones(5)}}),
            "`merged_adapters.ids[1]` has a LoRA bias at layers.0.x, which merging would lose",
        ),
        (
            Part("dora", "dora:8", {X: {"A": torch.ones(2, 6), "B": torch.ones(5, 2), "factor": torch.ones(5)}}),
            "`merged_adapters.ids[1]` holds dora; only LoRA can be merged",
        ),
        (
            Part("lora", "lora:8", {X: {"A": torch.ones(2, 6), "B": torch.zeros(5, 2)}}, scale={X: 0.0}),
            "`merged_adapters.ids[1]` has a LoRA scale (alpha) of 0 at layers.0.x",
        ),
        (
            Part("lora", "lora:8", {X: {"A": torch.ones(3, 6), "B": torch.ones(5, 3)}}),
            "`merged_adapters` have different ranks (2, 3) at layers.0.x",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(part: Part, message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        merge(Merge((A, B), (1.0, 1.0)), [lora(A, X), adapter(B, part)])
    assert str(refused.value) == f"Input validation error: {message}"


def test_a_merge_that_overflows_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"`merged_adapters` overflow at layers\.0\.x; use smaller weights"):
        merge(Merge((A, B), (1e300, 1.0)), [lora(A, X), lora(B, X)])
