"""Single trained rows of embeddings: whose ids they are, what follows a shared weight, refusals by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, ModuleShape, Op, Part
from server.methods.grouped import rows_of

CPU = torch.device("cpu")
E = "model.embed_tokens"
MODULES = {
    E: ModuleShape("embedding", 9, 4),
    "model.positions": ModuleShape("embedding", 32, 4, gain=None),
    "model.q": ModuleShape("linear", 4, 4),
    "model.norm": ModuleShape("norm", 4, 4),
    "lm_head": ModuleShape("linear", 4, 9),
}


def base(*, tied: bool = False, **modules: ModuleShape) -> BaseShape:
    known = {**MODULES, **{name.replace("__", "."): shape for name, shape in modules.items()}}
    return BaseShape(Digest("0" * 64), "tiny", 4, 1, 2, 2, 2, 9, 32, known, tied_embeddings=tied, embedding=E)


def read(
    indices: object, shape: BaseShape | None = None, limits: Limits | None = None, *, targeted: object = None, **rows: Tensor
) -> Part:
    sites = {name.replace("__", "."): {"rows": tensor} for name, tensor in rows.items()}
    config = {"field": "token_indices", "indices": indices, "targeted": targeted}
    return METHODS["trainable_tokens"].read(Checkpoint("trainable_tokens", config, sites), shape or base(), limits or Limits())


def ids_of(part: Part) -> Mapping[str, list[int]]:
    return {module: tensors["ids"].tolist() for module, tensors in part.sites.items()}


def op(part: Part, module: str, *slots: int) -> Op:
    made = METHODS["trainable_tokens"].op(part, module, base(), CPU, torch.float32)
    made.grow(4)
    for slot in slots:
        made.put(slot, part.sites[module])
    return made


def test_rows_are_kept_in_the_order_of_their_ids():
    rows = torch.arange(12.0).view(3, 4)
    part = read([7, 2, 5], model__embed_tokens=rows.to(torch.bfloat16))
    assert (part.pool, ids_of(part)) == ("tokens", {E: [2, 5, 7]})
    assert torch.equal(part.sites[E]["rows"], rows[[1, 2, 0]])


def test_trained_ids_give_their_rows_and_others_the_bases():
    rows = torch.randn(3, 4)
    made = op(read([7, 2, 5], model__embed_tokens=rows), E, 1)
    ids, y = torch.tensor([7, 7, 0, 2, 8, 5]), torch.randn(6, 4)
    got = made.after(ids, y.clone(), rows_of([1, 0, 1, 1, 1, 1]))
    assert torch.equal(got, torch.stack([rows[0], y[1], y[2], rows[1], y[4], rows[2]]))


def test_the_gain_of_an_embedding_is_folded_in_and_the_head_that_follows_has_none():
    shape = base(tied=True, model__embed_tokens=ModuleShape("embedding", 9, 4, gain=3.0))
    part = read([2], shape, model__embed_tokens=torch.ones(1, 4))
    assert part.sites[E]["rows"].tolist() == [[3.0] * 4]
    assert part.sites["lm_head"]["rows"].tolist() == [[1.0] * 4]


def test_a_heads_trained_rows_are_the_logits_of_their_ids():
    rows = torch.randn(2, 4)
    made = op(read({"lm_head": [8, 3]}, lm_head=rows), "lm_head", 1, 2)
    x, y = torch.randn(3, 4), torch.randn(3, 9)
    got = made.after(x, y.clone(), rows_of([1, 0, 2]))
    expected = y.clone()
    for t in (0, 2):
        expected[t, 8], expected[t, 3] = x[t] @ rows[0], x[t] @ rows[1]
    torch.testing.assert_close(got, expected)
    assert made.nbytes == 2 * (2 * 4 * 4 + 2 * 8)


@pytest.mark.parametrize(
    ("indices", "stored", "tied", "found"),
    [
        ([3], (E,), False, {E: [3]}),
        ([3], (E,), True, {E: [3], "lm_head": [3]}),
        ([3], (E, "lm_head"), True, {E: [3], "lm_head": [3]}),
        ({"embed_tokens": [3]}, (E,), True, {E: [3], "lm_head": [3]}),
        ({"embed_tokens": [3], "lm_head": [4]}, (E, "lm_head"), True, {E: [3], "lm_head": [4]}),
        ({"embed_tokens": [3], "lm_head": [3]}, (E,), True, {E: [3], "lm_head": [3]}),
        ({"lm_head": [3]}, ("lm_head",), True, {"lm_head": [3]}),
        ({"tokens": [3], E: [3]}, (E,), False, {E: [3]}),
    ],
)
def test_a_head_follows_the_embedding_it_shares_a_weight_with(indices, stored, tied, found):
    rows = {module.replace(".", "__"): torch.ones(1, 4) for module in stored}
    assert ids_of(read(indices, base(tied=tied), **rows)) == found


ONE = {"model__embed_tokens": torch.ones(1, 4)}


@pytest.mark.parametrize(
    ("indices", "rows", "message"),
    [
        ([3, 4], ONE, rf"^{E}.trainable_tokens_delta: has shape \[1, 4\], the base model needs \[2, 4\]"),
        ([9], ONE, rf"^{E}.trainable_tokens_delta: trains id 9, '{E}' has 0 to 8"),
        ([-1], ONE, rf"^{E}.trainable_tokens_delta: trains id -1"),
        ([3, 3], {"model__embed_tokens": torch.ones(2, 4)}, r"trainable_tokens_delta: trains an id twice"),
        ([], ONE, r"^token_indices: names no ids, but the upload holds rows"),
        ([3], {}, r"^token_indices: names ids, but the upload holds no rows"),
        ({"wte": [3]}, ONE, rf"^token_indices: does not name {E}"),
        ({"embed_tokens": [3], "tokens": [4]}, ONE, rf"^token_indices: names {E} twice, with different ids"),
        ({"embed_tokens": [3], "lm_head": [3]}, ONE, r"^token_indices: names 'lm_head', for which the upload holds no rows"),
        ([3], {"lm_head": torch.ones(1, 4)}, r"^token_indices: does not name lm_head"),
        ({"q": [3]}, {"model__q": torch.ones(1, 4)}, r"^model.q.trainable_.*neither an embedding nor the output head"),
        ({"positions": [3]}, {"model__positions": torch.ones(1, 4)}, r"^model.positions.trainable_.*not a plain table"),
        ({"norm": [3]}, {"model__norm": torch.ones(1, 4)}, r"^model.norm.trainable_.*kind norm"),
        ({"x": [3]}, {"model__x": torch.ones(1, 4)}, r"^model.x.trainable_.*has no module"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(indices, rows, message):
    with pytest.raises(AdapterError, match=message):
        read(indices, **rows)


def test_shared_weights_that_cannot_be_served_exactly_are_refused():
    tied = base(tied=True)
    other = {**ONE, "lm_head": torch.zeros(1, 4)}
    with pytest.raises(AdapterError, match=rf"^lm_head.trainable_tokens_delta: differs from that of {E}"):
        read([3], tied, **other)
    with pytest.raises(AdapterError, match=r"^token_indices: names 'lm_head' with ids that its shared weight does not have"):
        read({"embed_tokens": [3], "lm_head": [4]}, tied, **ONE)
    biased = replace(tied, modules={**tied.modules, "lm_head": ModuleShape("linear", 4, 9, torch.zeros(9))})
    with pytest.raises(AdapterError, match=r"'lm_head' shares the weight and has a bias, which PEFT would drop"):
        read([3], biased, **ONE)
    with pytest.raises(AdapterError, match=r"^lm_head.trainable_tokens_delta: .*not a plain table"):
        read({"lm_head": [3]}, biased, lm_head=torch.ones(1, 4))


def test_only_targeted_modules_and_what_is_tied_to_them_bring_rows():
    assert ids_of(read([3], targeted=["lm_head"], lm_head=torch.ones(1, 4))) == {"lm_head": [3]}
    both = {**ONE, "lm_head": torch.ones(1, 4)}
    assert ids_of(read([3], base(tied=True), targeted=[E], **both)) == {E: [3], "lm_head": [3]}
    with pytest.raises(AdapterError, match=r"^target_modules: does not name lm_head"):
        read([3], targeted=[E], **both)


def test_rows_count_against_the_limit_on_whole_matrices():
    with pytest.raises(AdapterError, match=rf"^{E}.trainable_tokens_delta: brings .* to 24 bytes, over the limit of 23"):
        read([3], limits=Limits(max_full_bytes=23), **ONE)


@pytest.mark.parametrize("module", [E, "lm_head"])
def test_nan_stays_in_its_own_rows_and_leaves_with_its_adapter(module):
    part = read([3], base(tied=True), **ONE)
    made = op(part, module, 2)
    made.put(1, {"ids": torch.tensor([3]), "rows": torch.full((1, 4), math.nan)})
    x = torch.full((4,), 3) if module == E else torch.ones(4, 4)
    y = torch.ones(4, 4 if module == E else 9)
    assert made.after(x, y.clone(), rows_of([1, 0, 2, 1])).isnan().any(1).tolist() == [True, False, False, True]
    made.clear(1)
    assert not made.after(x, y.clone(), rows_of([1, 0, 2, 1])).isnan().any()
