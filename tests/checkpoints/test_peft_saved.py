"""What PEFT stores beside an adapter: which keys it is, which module and field each refusal names."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.checkpoints.peft import read_peft
from server.checkpoints.peft_saved import WHOLE, sort_saved, split_saved
from server.errors import AdapterError
from server.methods.base import BaseShape, Checkpoint, ModuleShape

M = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
MODULES = {
    "model.embed_tokens": ModuleShape("embedding", 9, 6),
    Q: ModuleShape("linear", 6, 5),
    "model.layers.0.mlp.up": ModuleShape("linear", 6, 5),
    "model.layers.0.mlp.down": ModuleShape("linear", 5, 6),
    "model.layers.0.input_norm": ModuleShape("norm", 6, 6, torch.zeros(6)),
    "model.norm": ModuleShape("norm", 6, 6),
    "lm_head": ModuleShape("linear", 6, 9),
}


def base(*, tied: bool = False, head_bias: Tensor | None = None) -> BaseShape:
    modules = {**MODULES, "lm_head": ModuleShape("linear", 6, 9, head_bias)}
    return BaseShape(
        Digest("0" * 64), "tiny", 6, 1, 2, 2, 3, 9, 32, modules, tied_embeddings=tied, embedding="model.embed_tokens"
    )


def split(tensors: Mapping[str, Tensor], kind: str = "IA3", **config: object) -> tuple[list[str], tuple[Checkpoint, ...]]:
    own, found = split_saved({"peft_type": kind, **config}, tensors)
    return list(own), found


def sorted_sites(
    names: list[str] | None, *stored: str, shape: BaseShape | None = None, tie: bool = False
) -> dict[str, list[str]]:
    """method -> modules, for weights (and biases the base has) of these modules."""
    shape = shape or base()
    sites = {
        m: {"weight": torch.ones(1)} | ({"bias": torch.ones(1)} if shape.modules[m].bias is not None else {}) for m in stored
    }
    config = {} if names is None else {"names": names, "tie": tie}
    return {found.method: sorted(found.sites) for found in sort_saved([Checkpoint(WHOLE, config, sites)], shape)}


def test_whole_modules_and_token_rows_are_taken_out_of_an_adapters_tensors():
    one = torch.ones(1)
    keys = [
        f"{M}{Q}.ia3_l",
        f"{M}model.norm.weight",
        f"{M}model.layers.0.input_norm.bias",
        f"{M}lm_head.weight",
        f"{M}lm_head.bias",
    ]
    rows = f"{M}model.embed_tokens.token_adapter.trainable_tokens_delta"
    own, (whole, tokens) = split(
        dict.fromkeys([*keys, rows], one), modules_to_save=["norm", "lm_head"], trainable_token_indices=[3]
    )
    assert own == [f"{M}{Q}.ia3_l", f"{M}model.layers.0.input_norm.bias"]  # a bias alone is a trained bias
    assert (whole.method, whole.config) == (WHOLE, {"names": ["norm", "lm_head"], "tie": False})
    assert {module: list(stored) for module, stored in whole.sites.items()} == {
        "model.norm": ["weight"],
        "lm_head": ["weight", "bias"],
    }
    assert (tokens.method, list(tokens.sites), tokens.config["indices"]) == ("trainable_tokens", ["model.embed_tokens"], [3])


def test_prompt_learning_stores_modules_under_a_shorter_prefix():
    own, (whole,) = split({"base_model.model.norm.weight": torch.ones(1), "prompt_embeddings": torch.ones(1)}, "P_TUNING")
    assert own == ["prompt_embeddings"]
    assert list(whole.sites) == ["model.norm"]


def test_copies_of_biases_that_peft_does_not_read_are_left_out():
    norm = f"{M}model.norm"
    keys = [f"{norm}.weight", f"{norm}.bias", f"{norm}.original_module.bias", f"{norm}.modules_to_save.bias"]
    assert split(dict.fromkeys(keys, torch.ones(1)))[0] == []
    assert split({f"{norm}.original_module.bias": torch.ones(1)})[0] == [f"{norm}.original_module.bias"]


@pytest.mark.parametrize("kind", ["BITFIT", "LORA"])
def test_what_belongs_to_another_reader_is_left_to_it(kind):
    keys = [
        f"{M}score.weight",
        f"{M}{Q}.lora_A.weight",
        f"{M}{Q}.base_layer.weight",
        f"{M}{Q}.bias",
        f"{M}{Q}.ln_tuning_layers.weight",
    ]
    own, found = split(dict.fromkeys(keys, torch.ones(1)), kind)
    assert (own, found) == (keys, ())


def test_the_bases_own_weight_beneath_an_adapter_is_a_whole_module_nobody_named():
    keys = [f"{M}lm_head.base_layer.weight", f"{M}lm_head.base_layer.bias", f"{M}lm_head.ia3_l"]
    own, (whole,) = split(dict.fromkeys(keys, torch.ones(1)))
    assert own == keys[2:]
    assert {module: list(stored) for module, stored in whole.sites.items()} == {"lm_head": ["weight", "bias"]}
    with pytest.raises(AdapterError, match=r"lm_head.weight: is stored twice"):
        split({keys[0]: torch.ones(1), f"{M}lm_head.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": "norm"}, "^modules_to_save: .*list.*got 'norm'"),
        ({"modules_to_save": [1]}, "^modules_to_save: .*string"),
        ({"trainable_token_indices": "5"}, "^trainable_token_indices: "),
        ({"trainable_token_indices": {"embed_tokens": ["5"]}}, "^trainable_token_indices: "),
        ({"ensure_weight_tying": "yes"}, "^ensure_weight_tying: "),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(config, message):
    with pytest.raises(AdapterError, match=message):
        split({}, **config)


@pytest.mark.parametrize("kind", ["BITFIT", "TRAINABLE_TOKENS"])
def test_a_family_that_has_no_modules_to_save_refuses_them(kind):
    with pytest.raises(AdapterError, match=r"^modules_to_save: \['norm'\] is not served"):
        read_peft({"peft_type": kind, "modules_to_save": ["norm"]}, {})


def test_norms_and_matrices_are_told_apart_by_the_base():
    assert sorted_sites(["norm", "lm_head"], "model.norm", "lm_head", "model.layers.0.input_norm") == {
        "ln_tuning": ["model.layers.0.input_norm", "model.norm"],
        "full": ["lm_head"],
    }
    assert sorted_sites(None, "model.norm", Q) == {"ln_tuning": ["model.norm"], "full": [Q]}


def test_a_container_names_all_that_is_in_it():
    assert sorted_sites(["mlp"], "model.layers.0.mlp.up", "model.layers.0.mlp.down")["full"]
    with pytest.raises(AdapterError, match=r"^modules_to_save: names model.layers.0.mlp.down, for which the upload holds no"):
        sorted_sites(["mlp"], "model.layers.0.mlp.up")


def test_names_are_endings_as_in_peft():
    with pytest.raises(AdapterError, match=r"names model.layers.0.input_norm, for which"):
        sorted_sites(["norm"], "model.norm")
    assert sorted_sites(["score"], shape=base()) == {}  # the base has none: a classifier's, read elsewhere


def test_a_module_the_base_has_not_is_refused():
    with pytest.raises(AdapterError, match=r"^model.nothing.weight: the base model \(tiny\) has no module 'model.nothing'"):
        sort_saved([Checkpoint(WHOLE, {"names": []}, {"model.nothing": {"weight": torch.ones(1)}})], base())


@pytest.mark.parametrize("stored", ["lm_head", "model.embed_tokens"])
def test_a_weight_loaded_over_the_base_is_shared_where_the_bases_is(stored):
    assert sorted_sites([], stored) == {"full": [stored]}
    bias = torch.full((9,), 2.0)
    assert sorted_sites([], stored, shape=base(tied=True, head_bias=bias)) == {"full": ["lm_head", "model.embed_tokens"]}
    assert sorted_sites([stored.rpartition(".")[2]], stored, shape=base(tied=True)) == {"full": [stored]}
    (found,) = sort_saved(
        [Checkpoint(WHOLE, {"names": [], "tie": False}, {stored: {"weight": torch.ones(1)}})], base(tied=True, head_bias=bias)
    )
    assert found.sites["lm_head"]["bias"] is bias


def test_tied_weights_that_are_stored_must_agree():
    names = ["model.embed_tokens"]
    both = ("lm_head", "model.embed_tokens")
    assert sorted_sites(names, *both, shape=base(tied=True), tie=True) == {"full": ["lm_head", "model.embed_tokens"]}
    with pytest.raises(AdapterError, match=r"^lm_head.weight: is missing although ensure_weight_tying"):
        sorted_sites(names, "model.embed_tokens", shape=base(tied=True), tie=True)
    sites = {module: {"weight": torch.full((1,), i)} for i, module in enumerate(both)}
    for tie, given in ((True, names), (False, [])):
        with pytest.raises(AdapterError, match=r"^lm_head.weight: differs from model.embed_tokens.weight"):
            sort_saved([Checkpoint(WHOLE, {"names": given, "tie": tie}, sites)], base(tied=True))
    sort_saved([Checkpoint(WHOLE, {"names": ["lm_head", "embed_tokens"], "tie": False}, sites)], base(tied=True))


def test_only_names_that_peft_takes_for_embeddings_are_tied():
    for names, tied in ((["embed_tokens"], True), (["wte"], False), (None, False)):
        _, found = split({f"{M}lm_head.weight": torch.ones(1)}, ensure_weight_tying=True, modules_to_save=names)
        assert found[0].config["tie"] is tied
