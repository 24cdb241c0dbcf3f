"""PEFT's small families: which tensors are read, and the field or tensor each refusal names."""

from __future__ import annotations

import pytest
import torch

from server.checkpoints.peft import read_peft
from server.checkpoints.peft_saved import WHOLE
from server.errors import AdapterError

Q, UP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
q, up = (module.removeprefix("base_model.model.") for module in (Q, UP))
EMBED = "base_model.model.model.embed_tokens"


def read(kind, tensors, **fields):
    return read_peft({"peft_type": kind, **fields}, tensors)


@pytest.mark.parametrize("feedforward", [["up_proj"], ["j"], r".*\.up_proj", r"model\.layers\.\d\.mlp\..*", None])
def test_ia3_takes_its_side_from_the_shape_and_holds_it_against_the_config(feedforward):
    if feedforward == ["j"]:  # an ending of both names
        with pytest.raises(AdapterError, match=f"^feedforward_modules: names {q}, whose tensor scales its output"):
            read("IA3", {f"{Q}.ia3_l": torch.ones(5, 1)}, feedforward_modules=feedforward)
        return
    tensors = {f"{Q}.ia3_l": torch.ones(5, 1), f"{UP}.ia3_l": torch.ones(1, 6)}
    (found,) = read("IA3", tensors, feedforward_modules=feedforward, target_modules=r".*(q|up)_proj")
    assert {module: list(sides) for module, sides in found.sites.items()} == {q: ["out"], up: ["in"]}


def test_beft_is_a_delta_of_biases():
    (found,) = read("BEFT", {f"{Q}.beft_bias": torch.full((1, 5), 2.0)}, target_modules=["q_proj"])
    assert found.method == "bitfit"
    assert found.sites[q]["delta"].tolist() == [2.0] * 5


def test_ln_tuning_brings_modules_whole():
    tensors = {f"{Q}.ln_tuning_layers.weight": torch.ones(5), f"{Q}.ln_tuning_layers.bias": torch.ones(5)}
    (found,) = read("LN_TUNING", tensors, target_modules=r".*q_proj")
    assert (found.method, list(found.sites), sorted(found.sites[q])) == (WHOLE, [q], ["bias", "weight"])


@pytest.mark.parametrize(
    ("target", "targeted"), [(None, None), (["embed_tokens"], [True]), (r".*\.embed_\w+", [True]), (["wte"], [])]
)
def test_trainable_tokens_say_which_modules_are_targeted(target, targeted):
    tensors = {f"{EMBED}.trainable_tokens_delta": torch.ones(2, 6)}
    (found,) = read("TRAINABLE_TOKENS", tensors, token_indices=[3, 4], target_modules=target)
    assert found.config["indices"] == [3, 4]
    assert found.config["targeted"] == (targeted and ["model.embed_tokens"] if targeted is not None else None)


@pytest.mark.parametrize(
    ("kind", "fields", "tensors", "message"),
    [
        ("IA3", {"target_modules": ["k_proj"]}, {f"{Q}.ia3_l": torch.ones(5, 1)}, f"^target_modules: does not name {q}"),
        ("IA3", {"target_modules": ".*k_proj"}, {f"{Q}.ia3_l": torch.ones(5, 1)}, f"^target_modules: does not name {q}"),
        ("IA3", {"exclude_modules": ".*q_proj"}, {f"{Q}.ia3_l": torch.ones(5, 1)}, f"^exclude_modules: names {q}"),
        (
            "IA3",
            {"feedforward_modules": ".*q_proj"},
            {f"{Q}.ia3_l": torch.ones(5, 1)},
            f"^feedforward_modules: names {q}, whose tensor scales its output",
        ),
        (
            "IA3",
            {"feedforward_modules": "up_proj"},  # a pattern is held against the whole name
            {f"{UP}.ia3_l": torch.ones(1, 6)},
            f"^feedforward_modules: leaves out {up}, whose tensor scales its input",
        ),
        ("IA3", {"feedforward_modules": "(a"}, {f"{Q}.ia3_l": torch.ones(5, 1)}, r"^feedforward_modules: '\(a' is no regular"),
        ("BEFT", {"target_modules": ["v_proj"]}, {f"{Q}.beft_bias": torch.ones(1, 5)}, f"^target_modules: does not name {q}"),
        ("BEFT", {}, {f"{Q}.beft_bias": torch.ones(5)}, rf"^{Q}.beft_bias: has shape \[5\], BEFT needs \[1, out\]"),
        ("BEFT", {}, {f"{Q}.ia3_l": torch.ones(5, 1)}, f"^{Q}.ia3_l: matches nothing"),
        (
            "LN_TUNING",
            {"target_modules": ["norm"]},
            {f"{Q}.ln_tuning_layers.weight": torch.ones(5)},
            f"^target_modules: does not name {q}",
        ),
        (
            "LN_TUNING",
            {"exclude_modules": ["q_proj"]},
            {f"{Q}.ln_tuning_layers.weight": torch.ones(5)},
            f"^exclude_modules: names {q}",
        ),
        ("LN_TUNING", {}, {}, "^ln_tuning: the upload holds no ln_tuning_layers"),
        ("LN_TUNING", {"modules_to_save": "norm"}, {}, "^modules_to_save: .*list"),
        ("TRAINABLE_TOKENS", {"token_indices": "3"}, {}, "^token_indices: .*list"),
        ("TRAINABLE_TOKENS", {"token_indices": [1.5]}, {}, "^token_indices: "),
        ("TRAINABLE_TOKENS", {}, {f"{EMBED}.weight.delta": torch.ones(1, 6)}, "matches nothing"),
        ("BITFIT", {}, {f"{Q}.weight": torch.ones(5, 5)}, f"^{Q}.weight: matches nothing"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(kind, fields, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read(kind, tensors, **fields)
