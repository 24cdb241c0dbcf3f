"""Names: keys sorted by module, and the config's lists of modules held against them; LoRA's readers try the rest."""

from __future__ import annotations

import pytest
import torch

from server.checkpoints.peft_names import by_module, check_layer, check_targeted
from server.errors import AdapterError

ONE = torch.ones(1)
SUFFIXES = {".base_layer.bias": "bias", ".bias": "bias"}


def test_keys_become_module_suffix_and_neutral_name():
    tensors = {"base_model.model.a.b.bias": ONE, "base_model.model.c.base_layer.bias": ONE}
    found = [(module, suffix, name) for module, suffix, name, _ in by_module(tensors, SUFFIXES)]
    assert found == [("a.b", ".bias", "bias"), ("c", ".base_layer.bias", "bias")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a.bias"], r"^a.bias: matches nothing that is served; expected: base_model.model.<module>\{.base_layer.bias,.bias\}"),
        (["base_model.model.a.weight"], "^base_model.model.a.weight: matches nothing"),
        (["base_model.model.bias"], "matches nothing"),
        (["base_model.model.a.bias", "base_model.model.a.base_layer.bias"], "is stored twice, with and without base_layer"),
    ],
)
def test_a_key_that_fits_nothing_is_refused_by_name(keys, message):
    with pytest.raises(AdapterError, match=message):
        list(by_module(dict.fromkeys(keys, ONE), SUFFIXES))


def test_lists_go_by_suffix_and_strings_are_patterns_of_the_whole_name():
    for target in (None, frozenset({"q"}), frozenset({"a.q"}), "a.q", r"\w\.[qv]", "ALL-linear"):
        check_targeted("a.q", target, None)
    for target in (frozenset({"xq"}), frozenset[str](), "q", "", r"a\.Q"):
        with pytest.raises(AdapterError, match=r"^target_modules: does not name a\.q"):
            check_targeted("a.q", target, None)
    with pytest.raises(AdapterError, match=r"^target_modules: does not name lm_head"):
        check_targeted("lm_head", "all-linear", None)
    with pytest.raises(AdapterError, match=r"^exclude_modules: names a\.q"):
        check_targeted("a.q", None, "a.*")


def test_layers_are_numbers_behind_a_pattern():
    check_layer("model.h.3.q", None, [3, 4], None)
    check_layer("h.3.q", None, 3, "h")
    check_layer("h.3.q", frozenset({"h.3.q"}), 4, None)
    for module, pattern in (("h.3.q", None), ("h.3.q", "x"), ("q", "h"), ("model.h.q", None)):
        with pytest.raises(AdapterError, match=f"^layers_to_transform: leaves out {module}"):
            check_layer(module, frozenset({"z"}), 3, pattern)
