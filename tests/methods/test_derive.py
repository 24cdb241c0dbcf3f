"""Deriving: each recipe's sources are read in order, nested ones derived in turn, and the result is filed under its digest."""

from __future__ import annotations

import pytest
import torch

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods.base import Adapter, Part, Prefix
from server.methods.derive import derive
from server.recipes import Join, Merge, Recipe, Source, Task

A, B, M = (Digest.of(name) for name in (b"a", b"b", b"m"))


def lora(digest: Digest, value: float) -> Adapter:
    site = {"A": torch.full((2, 6), value), "B": torch.full((5, 2), value)}
    return Adapter(digest, (Part("lora", "lora:8", {"layers.0.x": site}),))


def many(digest: Digest) -> Adapter:
    prefix = Prefix(1, embeddings=torch.ones(1, 4), factors=(torch.tensor([[[1.0]], [[2.0]]]), torch.ones(2, 1, 4)))
    return Adapter(digest, (*lora(digest, 1.0).parts, Part("mpt", prefix=prefix)))


STORED = {A: lora(A, 1.0), B: lora(B, 2.0), M: many(M)}


def make(recipe: Recipe, asked: list[Source] | None = None) -> Adapter:
    def read(source: Source) -> Adapter:
        if asked is not None:
            asked.append(source)
        return STORED[source] if isinstance(source, Digest) else derive(source, read)

    return derive(recipe, read)


def test_sources_are_read_in_order_and_remembered() -> None:
    asked: list[Source] = []
    merge = Merge((B, A), (1.0, 1.0))
    recipe = Join((merge, Task(M, 1)))
    adapter = make(recipe, asked)
    assert asked == [merge, B, A, Task(M, 1), M]
    assert (adapter.digest, adapter.sources) == (recipe.digest, frozenset((A, B, M)))


def test_a_task_keeps_the_adapters_other_parts() -> None:
    adapter = make(Task(M, 1))
    assert adapter.pools == ("lora:8",)
    assert adapter.prefix is not None
    assert adapter.prefix.embeddings is not None
    assert adapter.prefix.embeddings.tolist() == [[2.0] * 4]
    assert adapter.prefix.tasks == 0


def test_a_task_that_is_not_there_is_refused() -> None:
    with pytest.raises(AdapterError, match="task_id: 2 is none of the adapter's 2 tasks"):
        make(Task(M, 2))


def test_an_adapter_without_a_prefix_has_no_tasks() -> None:
    with pytest.raises(AdapterError, match="task_id: the adapter has no tasks"):
        make(Task(A, 0))
