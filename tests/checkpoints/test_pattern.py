"""Patterns: they agree with PEFT's own matching, a hostile one costs nothing, and what RE2 has not is refused by name."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from server.checkpoints.pattern import MAX_KEYS, MAX_LENGTH, first_keys, whole_match
from server.errors import AdapterError

NAMES = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "q_proj", "h.0.q_proj", "h.0.xq_proj", "a.b"]


def expected(keys: list[str], names: list[str]) -> dict[str, str]:
    """PEFT answers with the name itself where no key matches."""
    found = {name: get_pattern_key(keys, name) for name in names}
    return {name: key for name, key in found.items() if key in keys and re.match(rf"(.*\.)?({key})$", name)}


@pytest.mark.parametrize(
    "keys",
    [
        ["up_proj", "q_proj"],
        ["1.mlp.up_proj"],
        [r"layers\.1\.mlp\.up_proj", "up_proj"],
        ["^q_proj", "q_proj$"],
        ["0.q_proj", "mlp", "proj"],
        ["h.0", "h.0.q.proj", "..b"],
        [r".*(1|2)\.mlp.*", ".*"],
        [r"[^.]+\.\d{2,}\.(mlp|x)\.\w+", r"layers\.(0|1)\..*up_proj"],
        ["a)|(q_proj", "(?:h|a).b?"],
        ["(?i:Q_PROJ)", r"\Ah\b.*"],
        [r"(?P<layer>\d+)\.mlp\.up_proj"],
        ["", "q_proj"],
        ["(.|..)+!", "(x+x+)+y", "up_proj"],
    ],
)
def test_the_first_key_that_matches_is_pefts(keys):
    assert first_keys("alpha_pattern", keys, NAMES) == expected(keys, NAMES)


PIECES = [
    "a",
    "b",
    ".",
    r"\.",
    "a*",
    "a*?",
    "b?",
    "0+",
    ".*",
    "(a|b)",
    "(?:ab|.)",
    "[ab.]",
    "[^a]",
    r"\d",
    "^",
    "$",
    "b{1,2}",
    "|",
    r"\b",
]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join), min_size=1, max_size=3, unique=True),
    st.lists(st.text("ab.0", min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
)
def test_any_key_matches_as_in_peft(keys, names):
    assert first_keys("alpha_pattern", keys, names) == expected(keys, names)


@pytest.mark.parametrize("pattern", [r".*\.layers\.1\..*", "q_proj", r"h\.[0-9]\..*q_proj|a", "", r"(a|b|\.)*"])
def test_a_whole_match_is_pythons(pattern):
    matches = whole_match("target_modules", pattern)
    assert [matches(name) for name in NAMES] == [re.fullmatch(pattern, name) is not None for name in NAMES]


def test_a_pattern_that_would_hang_python_is_quick():
    names = [f"model.layers.{i}.{'a' * 200}" for i in range(200)]
    started = time.perf_counter()
    assert first_keys("rank_pattern", ["(.|..)+!", "(a+a+)+y", "((a?){30}){30}!"], names) == {}
    assert not any(map(whole_match("target_modules", "(.|..)+!"), names))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("(a", "is no regular expression that is served: missing"),
        (r"(a)\2", "invalid escape sequence"),
        ("(?=a)b", "invalid perl operator"),
        ("a**", "bad repetition operator"),
        (r"a\Z", "invalid escape sequence"),
        ("a{2000}", "invalid repetition size"),
        ("a{,3}", r"holds '\{,', which is not served; write it out"),
        ("[[:alpha:]]", r"holds '\[\[:', which is not served"),
        ("a" * (MAX_LENGTH + 1), f"holds a pattern of {MAX_LENGTH + 1} characters, over the limit of {MAX_LENGTH}"),
    ],
)
def test_what_re2_has_not_or_reads_otherwise_is_refused_by_name(key, reason):
    with pytest.raises(AdapterError, match=f"^alpha_pattern: .*{reason}"):
        first_keys("alpha_pattern", ["q_proj", key], ["a.q_proj"])
    with pytest.raises(AdapterError, match=f"^target_modules: .*{reason}"):
        whole_match("target_modules", key)


def test_too_many_keys_are_refused():
    assert first_keys("rank_pattern", [], ["a"]) == {}
    with pytest.raises(AdapterError, match=r"^rank_pattern: has 1025 keys, over the limit of 1024"):
        first_keys("rank_pattern", [str(i) for i in range(MAX_KEYS + 1)], ["a"])


@pytest.mark.parametrize("key", [r"(\w|\.){0,900}", "(.{0,30}){0,30}q"])
def test_keys_that_need_too_much_together_are_refused(key, monkeypatch):
    keys = [f"{key}{i}" for i in range(300)]
    with pytest.raises(AdapterError, match=r"^rank_pattern: its keys need more than 150000 RE2 instructions"):
        first_keys("rank_pattern", keys, ["model.layers.0.q_proj"])
    monkeypatch.setattr("server.checkpoints.pattern.MEMORY", 1 << 18)
    with pytest.raises(AdapterError, match=r"^rank_pattern: its keys need more than 262144 bytes to be matched"):
        first_keys("rank_pattern", keys[:3], ["model.layers.0.q_proj"])


def test_a_key_for_every_module_of_a_large_model_is_fine():
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(60) for m in "qkvo"]
    assert first_keys("rank_pattern", names, names) == {name: name for name in names}
