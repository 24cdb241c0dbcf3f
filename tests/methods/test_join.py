"""Joining: what two adapters of one family mean together, and what is refused because it means nothing exact."""

from __future__ import annotations

import pytest
import torch

from adapters_store.digest import Digest
from server.errors import ValidationError
from server.methods.base import Adapter, Head, Part, Prefix
from server.methods.join import join

X, Y = "layers.0.x", "layers.0.y"
BF16 = torch.bfloat16


def adapter(*parts: Part) -> Adapter:
    return Adapter(Digest.of(repr(parts).encode()), parts)


def lora(rank: int, *modules: str, pool: str | None = None, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Part:
    generator = torch.Generator().manual_seed(rank)
    sites = {
        module: {
            "A": torch.randn(rank, 6, generator=generator).to(dtype),
            "B": torch.randn(5, rank, generator=generator).to(dtype),
            **more,
        }
        for module in modules
    }
    return Part("lora", pool or f"lora:{max(8, 1 << (rank - 1).bit_length())}", sites, scale=dict.fromkeys(modules, 2.0))


def vectors(method: str, **tensors: torch.Tensor) -> Part:
    return Part(method, method, {X: tensors})


def test_ranks_add_up_and_so_do_the_deltas() -> None:
    one, two = lora(3, X), lora(4, X, Y)
    (joined,) = join([adapter(one), adapter(two)])
    assert joined.pool == "lora:8"
    site = joined.sites[X]
    assert site["A"].shape == (7, 6)
    expected = sum(part.sites[X]["B"] @ part.sites[X]["A"] for part in (one, two))
    assert torch.allclose(site["B"] @ site["A"], torch.as_tensor(expected), atol=1e-5)
    assert joined.sites[Y] is two.sites[Y]
    assert joined.scale == {}  # nobody may take the sum's B for B times a scale


def test_a_sum_moves_to_the_pool_of_its_rank_and_joins_what_is_there() -> None:
    (part,) = join([adapter(lora(7, X)), adapter(lora(8, X), lora(12, Y))])
    assert part.pool == "lora:16"
    assert {module: len(site["A"]) for module, site in part.sites.items()} == {X: 15, Y: 12}


def test_pools_that_differ_stay_apart() -> None:
    parts = join([adapter(lora(8, X)), adapter(lora(8, X, pool="lora:8:bf16", dtype=BF16)), adapter(lora(20, X))])
    assert [part.pool for part in parts] == ["lora:8", "lora:8:bf16", "lora:32"]


def test_exact_bf16_stays_bf16() -> None:
    (joined,) = join([adapter(lora(r, X, pool="lora:8:bf16", dtype=BF16)) for r in (2, 3)])
    assert (joined.pool, joined.sites[X]["A"].dtype) == ("lora:8:bf16", BF16)


def test_lora_biases_add_up_where_either_has_one() -> None:
    with_bias = lora(2, X, bias=torch.arange(5.0))
    (both,) = join([adapter(with_bias), adapter(with_bias)])
    assert both.sites[X]["bias"].tolist() == [0, 2, 4, 6, 8]
    (one,) = join([adapter(lora(2, X)), adapter(with_bias)])
    assert one.sites[X]["bias"].tolist() == [0, 1, 2, 3, 4]


def test_ia3_multiplies_side_by_side_and_deltas_add_up() -> None:
    one = adapter(vectors("ia3", out=torch.tensor([2.0, 3.0])), vectors("bitfit", delta=torch.tensor([1.0])))
    two = adapter(
        vectors("ia3", **{"out": torch.tensor([5.0, 0.5]), "in": torch.tensor([7.0])}),
        vectors("bitfit", delta=torch.tensor([0.25], dtype=torch.float16)),
    )
    ia3, bitfit = join([one, two])
    assert {side: vector.tolist() for side, vector in ia3.sites[X].items()} == {"out": [10, 1.5], "in": [7]}
    assert bitfit.sites[X]["delta"].tolist() == [1.25]


def test_families_that_do_not_meet_are_kept_as_they_are() -> None:
    parts = (lora(2, X), vectors("ia3", out=torch.ones(2)))
    assert [part.sites for part in join([adapter(parts[0]), adapter(parts[1])])] == [part.sites for part in parts]


@pytest.mark.parametrize(
    "pools", [("bottleneck:8:relu:output:0", "bottleneck:8:relu:output:0"), ("bottleneck:8", "bottleneck:16")]
)
def test_two_bottlenecks_share_an_adapter_but_no_sublayer(pools: tuple[str, str]) -> None:
    tensors = {"down": torch.ones(8, 4)}
    at = [[adapter(Part("bottleneck", pool, {module: tensors})) for module in (X, Y)] for pool in pools]
    joined = join([at[0][0], at[1][1]])
    assert sorted(module for part in joined for module in part.sites) == [X, Y]
    with pytest.raises(ValidationError, match=r"`compose` cannot apply two bottleneck adapters to layers\.0\.x"):
        join([at[0][0], at[1][0]])


def test_dora_has_its_module_to_itself() -> None:
    one, two = (
        adapter(Part("dora", "dora:8", {module: {"A": torch.ones(2, 6), "B": torch.ones(5, 2), "factor": torch.ones(5)}}))
        for module in (X, Y)
    )
    assert [(part.pool, [*part.sites]) for part in join([one, two])] == [("dora:8", [X, Y])]
    assert [part.pool for part in join([one, adapter(lora(2, X))])] == ["dora:8", "lora:8"]
    with pytest.raises(ValidationError, match=r"`compose` cannot apply two dora adapters to layers\.0\.x"):
        join([one, one])


def test_two_heads_are_refused() -> None:
    head = Head("SEQ_CLS", "last", ("a", "b"), {"score.weight": torch.ones(2, 4)})
    part = Part("head", "head", head=head)
    assert join([adapter(part), adapter(lora(2, X))])[0].head is head
    with pytest.raises(ValidationError, match="`compose` cannot apply two head adapters to one request"):
        join([adapter(part), adapter(part)])


# -- prefixes --------------------------------------------------------------------------------------------------------


def stored(length: int, positions: int | None = None) -> Prefix:
    return Prefix(length, torch.full((2, length, 1, 4), float(length)), torch.zeros(2, length, 1, 4), positions=positions)


def soft(length: int) -> Prefix:
    return Prefix(length, embeddings=torch.full((length, 4), float(length)))


def tokens(*ids: int) -> Prefix:
    return Prefix(len(ids), ids=torch.tensor(ids))


def several_tasks() -> Prefix:
    return Prefix(2, embeddings=torch.ones(2, 4), factors=(torch.ones(3, 2, 1), torch.ones(3, 1, 4)))


def joined(*prefixes: Prefix) -> Prefix:
    (part,) = join([adapter(Part("prompt", prefix=prefix)) for prefix in prefixes])
    assert part.prefix is not None
    return part.prefix


def test_the_first_prefix_comes_first() -> None:
    keys = joined(stored(2), stored(3)).keys
    assert keys is not None
    assert keys[0, :, 0, 0].tolist() == [2, 2, 3, 3, 3]
    embeddings = joined(soft(2), soft(1)).embeddings
    assert embeddings is not None
    assert embeddings[:, 0].tolist() == [2, 2, 1]
    ids = joined(tokens(7, 8), tokens(9)).ids
    assert ids is not None
    assert ids.tolist() == [7, 8, 9]


@pytest.mark.parametrize(("first", "second", "moved"), [(None, None, 5), (0, None, 3), (None, 0, 2), (0, 0, 0)])
def test_the_text_moves_by_what_each_moves_it(first: int | None, second: int | None, moved: int) -> None:
    prefix = joined(stored(2, first), stored(3, second))
    assert (prefix.length, prefix.length - prefix.shift) == (5, moved)


@pytest.mark.parametrize(
    ("one", "two", "kinds"),
    [
        (stored(2), soft(3), "keys and values and embeddings"),
        (tokens(1), soft(3), "tokens and embeddings"),
        (tokens(1), stored(3), "tokens and keys and values"),
        (several_tasks(), soft(2), "a prompt of several tasks and embeddings"),
    ],
)
def test_prefixes_of_two_kinds_are_refused(one: Prefix, two: Prefix, kinds: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot put prompt and prompt in front of one text: {kinds}"):
        joined(one, two)


def test_one_prefix_stays_as_it_is() -> None:
    prefix = soft(3)
    parts = join([adapter(lora(2, X)), adapter(Part("prompt", prefix=prefix)), adapter(lora(2, X))])
    assert [part.prefix for part in parts] == [None, prefix]
