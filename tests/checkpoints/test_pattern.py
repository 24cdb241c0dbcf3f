"""Patterns: the plain-name keys agree with PEFT's own matching, the others are never run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from server.checkpoints.pattern import MAX_KEYS, Pattern
from server.errors import AdapterError

NAMES = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "q_proj", "h.0.q_proj", "h.0.xq_proj", "a.b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "keys",
    [
        ["up_proj", "q_proj"],
        ["1.mlp.up_proj"],
        [r"layers\.1\.mlp\.up_proj", "up_proj"],
        ["^q_proj", "q_proj$"],
        [r"^model.layers.1\.mlp.up_proj$"],
        ["0.q_proj", "mlp", "proj"],
        ["h.0", "h.0.q.proj"],
        [r"h\.0\.q\.proj", "a.b"],
        ["..b", "..q_proj"],
        [r"\.q_proj", ".q_proj"],
    ],
)
def test_plain_names_match_as_in_peft(name, keys):
    pattern = Pattern("alpha_pattern", {key: float(i) for i, key in enumerate(keys)})
    expected = dict(zip(keys, map(float, range(len(keys))), strict=True)).get(get_pattern_key(keys, name), -1.0)
    assert not pattern.regular
    assert pattern.get(name, -1.0) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("a.b\\", min_size=1, max_size=5), min_size=1, max_size=3, unique=True),
    st.text("a.b", min_size=1, max_size=8),
)
def test_whatever_is_taken_for_plain_matches_as_in_peft(keys, name):
    pattern = Pattern("alpha_pattern", {key: float(i) for i, key in enumerate(keys)})
    if not pattern.regular:
        expected = keys.index(key) if (key := get_pattern_key(keys, name)) in keys else -1
        assert pattern.get(name, -1.0) == expected


@pytest.mark.parametrize("key", ["(.|..)+!", ".*q_proj", "[0-9]", "a|b", r"\d", "q_proj\\", "a^b", "a$b", "", "^", "x?", "a\0"])
def test_a_regular_expression_is_listed_and_not_run(key):
    pattern = Pattern("alpha_pattern", {key: 1.0, "q_proj": 2.0})
    assert pattern.regular == (key,)
    assert pattern.get("a" * 200 + ".q_proj", 0.0) == 2.0


def test_too_many_keys_are_refused():
    with pytest.raises(AdapterError, match="rank_pattern: has 1025 keys, over the limit of 1024"):
        Pattern("rank_pattern", {str(i): 1.0 for i in range(MAX_KEYS + 1)})
