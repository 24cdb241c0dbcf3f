"""Recipes: a digest of the content and nothing else, the same in every process, different wherever the result may differ."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.digest import Digest
from server.recipes import Join, Merge, Recipe, Source, Task, digest_of, stored_sources

A, B, C = (Digest.of(name) for name in (b"a", b"b", b"c"))
TIES = Merge((A, B), (1.0, 0.5), "ties", 0.5, "frequency")


def test_a_digest_is_the_same_in_another_process() -> None:
    program = (
        "from server.recipes import *; from adapters_store.digest import Digest; "
        "print(Join((Merge((Digest.of(b'a'), Digest.of(b'b')), (1.0, 0.1)), Task(Digest.of(b'c'), 1))).digest)"
    )
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert Digest(found.stdout.strip()) == Join((Merge((A, B), (1.0, 0.1)), Task(C, 1))).digest


@pytest.mark.parametrize(
    "other",
    [
        replace(TIES, sources=(B, A)),
        replace(TIES, sources=(A, C)),
        replace(TIES, weights=(1.0, 0.51)),
        replace(TIES, strategy="dare_ties"),
        replace(TIES, density=0.6),
        replace(TIES, majority_sign_method="total"),
        Join((A, B)),
        Join((B, A)),
        Join((TIES,)),
        Task(A, 0),
        Task(A, 1),
    ],
)
def test_what_may_differ_has_a_digest_of_its_own(other: Recipe) -> None:
    assert other.digest != TIES.digest
    assert other.digest not in (A, B, C)


def test_fields_a_strategy_does_not_read_do_not_count() -> None:
    linear = Merge((A, B), (1.0, 0.5))
    assert replace(linear, density=0.3, majority_sign_method="frequency").digest == linear.digest
    dare = Merge((A, B), (1.0, 0.5), "dare_linear", 0.5)
    assert replace(dare, majority_sign_method="frequency").digest == dare.digest
    assert replace(dare, density=0.4).digest != dare.digest


def test_a_nested_recipe_counts_as_its_digest() -> None:
    assert Join((TIES, C)).digest == Join((TIES.digest, C)).digest


@pytest.mark.parametrize(
    ("source", "stored"),
    [(A, {A}), (TIES, {A, B}), (Task(A, 2), {A}), (Join((TIES, C, A)), {A, B, C}), (Join((Task(C, 0), A)), {A, C})],
)
def test_the_stored_adapters_behind_a_source(source: Source, stored: set[Digest]) -> None:
    assert stored_sources(source) == stored
    assert isinstance(digest_of(source), Digest)


def test_recipes_are_plain_data() -> None:
    recipe = Join((TIES, Task(C, 1)))
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(recipe) == hash(Join((TIES, Task(C, 1))))
