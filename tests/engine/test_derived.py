"""Recipes in use, and adapters computed from them in a running engine: computed once, cached, forgotten, refused alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from adapters_store.digest import Digest
from server.engine.derived import Recipes
from server.errors import GenerationError, NotFoundError, ValidationError
from server.methods.base import Adapter, Part, Prefix
from server.recipes import Join, Merge, Recipe, Task
from server.requests import FinishReason, Request, Sampling
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 33, 60, 12]
A, B, C = (Digest.of(name) for name in (b"a", b"b", b"c"))


def request(id: str, *recipes: Recipe) -> Request:
    return Request(id, "t", tuple(recipe.digest for recipe in recipes), (1,), Sampling(1), recipes=recipes)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_a_recipe_is_known_while_a_request_needs_it() -> None:
    recipes, merge, join = Recipes(), Merge((A, B), (1.0, 1.0)), Join((A, C))
    recipes.hold(request("one", merge))
    recipes.hold(request("two", merge, join))
    recipes.hold(request("plain"))
    assert (recipes.get(merge.digest), recipes.get(join.digest), recipes.get(A)) == (merge, join, None)
    recipes.release("one")
    recipes.release("one")
    recipes.release("plain")
    recipes.release("nobody")
    assert (recipes.get(merge.digest), len(recipes)) == (merge, 2)
    recipes.release("two")
    assert (recipes.get(merge.digest), len(recipes)) == (None, 0)


def test_which_recipes_in_use_are_made_from_a_stored_adapter() -> None:
    recipes, nested, other = Recipes(), Join((Merge((A, B), (1.0, 1.0)), C)), Task(B, 1)
    recipes.hold(request("one", nested, other))
    assert recipes.made_from(A) == recipes.made_from(C) == (nested.digest,)
    assert set(recipes.made_from(B)) == {nested.digest, other.digest}
    recipes.release("one")
    assert recipes.made_from(A) == ()


def test_any_thread_may_hold_and_release() -> None:
    recipes = Recipes()
    kept = Join((A, B))
    recipes.hold(request("kept", kept))
    missed: list[str] = []

    def work(number: int) -> None:
        for turn in range(200):
            own = Task(A, turn % 5)
            recipes.hold(request(f"{number}.{turn}", own, kept))
            if recipes.get(own.digest) != own or recipes.get(kept.digest) != kept:
                missed.append(f"{number}.{turn}")
            recipes.release(f"{number}.{turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (missed, len(recipes)) == ([], 1)


# -- in an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def lora(name: str, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    site = {"A": torch.randn(rank, 32, generator=generator) * 0.3, "B": torch.randn(32, rank, generator=generator) * 0.3}
    sites = {f"model.layers.{i}.self_attn.o_proj": site for i in range(2)}
    return Adapter(Digest.of(name.encode()), (Part("lora", "lora:8", sites),))


def biases(name: str, value: float) -> Adapter:
    sites = {"model.layers.1.mlp.down_proj": {"delta": torch.full((32,), value)}}
    return Adapter(Digest.of(name.encode()), (Part("bitfit", "bitfit", sites),))


def tasks(name: str) -> Adapter:
    generator = torch.Generator().manual_seed(4)
    embeddings, columns, rows = (torch.randn(*size, generator=generator) for size in ((3, 32), (2, 3, 1), (2, 1, 32)))
    part = Part("multitask_prompt_tuning", prefix=Prefix(3, embeddings=embeddings, factors=(columns, rows)))
    return Adapter(Digest.of(name.encode()), (part, *biases(name, 0.5).parts))


STORED = {
    adapter.digest: adapter for adapter in (lora("a"), lora("b"), lora("wide", 3), biases("nan", float("nan")), tasks("m"))
}
MERGE = Merge((A, B), (0.5, 0.5), "ties", 0.5)
NAN = Digest.of(b"nan")


class Counting(Lab):
    """Counts what the store was asked for, with a host cache of `cache` bytes."""

    def __init__(self, *, cache: int = 0, **options: Any) -> None:
        self.reads: list[Digest] = []
        super().__init__(tiny_model("llama"), STORED, **options)
        self.engine._cache.limit = cache

    def _load(self, digest: Digest) -> Adapter:
        self.reads.append(digest)
        return super()._load(digest)


def test_a_merge_is_computed_once_and_then_like_any_adapter() -> None:
    lab = Counting()
    for id in ("one", "two"):
        lab.submit(id, PROMPT, MERGE)
    lab.run()
    lab.submit("three", PROMPT, MERGE)
    lab.run()
    assert lab.reads == [A, B]
    assert lab.tokens("one") == lab.tokens("two") == lab.tokens("three")
    assert lab.scheduler.residency.resident == (MERGE.digest,)
    assert len(lab.engine._recipes) == 0
    assert lab.observer.loads == 1


def test_sources_and_results_go_through_the_host_cache() -> None:
    lab = Counting(cache=1 << 20, slots=1)
    lab.submit("a", PROMPT, A)
    lab.submit("merged", PROMPT, MERGE)
    lab.submit("b", PROMPT, B)
    lab.run()
    lab.submit("again", PROMPT, MERGE)
    lab.run()
    assert sorted(lab.reads) == sorted([A, B])
    assert lab.observer.evictions >= 3
    assert lab.tokens("again") == lab.tokens("merged")


def test_an_evicted_merge_is_computed_again_and_is_the_same() -> None:
    lab = Counting(slots=1)
    merge = Merge((A, B), (1.0, 0.7), "dare_ties", 0.4)
    for id, source in (("one", merge), ("a", A), ("two", merge)):
        lab.submit(id, PROMPT, source, tenant=id)
        lab.run()
    assert lab.reads == [A, B, A, A, B]
    assert torch.equal(lab.logits("one"), lab.logits("two"))


def test_nothing_is_left_of_a_merge_once_a_source_is_unloaded() -> None:
    lab = Counting(cache=1 << 20)
    lab.submit("merged", PROMPT, MERGE)
    lab.submit("joined", PROMPT, Join((MERGE, lora("wide").digest)))
    lab.submit("b", PROMPT, B)
    lab.run()
    assert lab.scheduler.residency.used == 3
    lab.engine._unload(A)
    assert lab.scheduler.residency.resident == (B,)
    assert set(lab.engine._cache._adapters) == {B, lora("wide").digest}


def test_a_merge_that_runs_outlives_its_source() -> None:
    alone = Counting()
    alone.submit("merged", PROMPT, MERGE, max_new_tokens=12)
    alone.run()
    lab = Counting()
    lab.submit("merged", PROMPT, MERGE, max_new_tokens=12)
    for _ in range(4):
        lab.turn()
    assert 0 < len(lab.tokens("merged")) < 12
    del lab.adapters[A]
    lab.engine._unload(A)
    lab.run()
    assert lab.finished("merged")
    assert lab.tokens("merged") == alone.tokens("merged")
    lab.engine._unload(A)
    lab.submit("late", PROMPT, MERGE)
    lab.run()
    assert isinstance(lab.ending("late").error, NotFoundError)


def test_a_request_that_is_cancelled_takes_no_recipe_from_another() -> None:
    lab = Counting()
    lab.submit("gone", PROMPT, MERGE)
    lab.submit("stays", PROMPT, MERGE)
    lab.engine.cancel("gone")
    lab.run()
    assert lab.ending("gone").finish is FinishReason.CANCELLED
    assert lab.finished("stays")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Merge((A, lora("wide").digest), (1.0, 1.0)), "different ranks (2, 3) at model.layers.0.self_attn.o_proj"),
        (Merge((A, NAN), (1.0, 1.0)), "`merged_adapters.ids[1]` holds bitfit; only LoRA can be merged"),
        (Merge((A, B), (1e300, 1.0)), "overflow at model.layers.0.self_attn.o_proj"),
    ],
)
def test_what_cannot_be_merged_costs_its_own_request_alone(recipe: Recipe, message: str) -> None:
    lab = Counting()
    lab.submit("bad", PROMPT, recipe)
    lab.submit("good", PROMPT, MERGE)
    lab.run()
    error = lab.ending("bad").error
    assert isinstance(error, ValidationError)
    assert message in str(error)
    assert lab.finished("good")


def test_a_joined_nan_fails_alone() -> None:
    lab = Counting()
    lab.submit("bad", PROMPT, Join((A, NAN)))
    lab.submit("good", PROMPT, Join((A, B)))
    lab.submit("a", PROMPT, A)
    lab.run()
    assert isinstance(lab.ending("bad").error, GenerationError)
    assert lab.finished("good")
    assert lab.finished("a")


def test_each_task_is_an_adapter_of_its_own() -> None:
    lab, alone = Counting(), Counting()
    digest = Digest.of(b"m")
    for task in (0, 1):
        lab.submit(f"{task}", PROMPT, Task(digest, task))
    lab.submit("none", PROMPT, Task(digest, 2))
    lab.run()
    alone.submit("1", PROMPT, Task(digest, 1))
    alone.run()
    assert not torch.equal(lab.logits("0"), lab.logits("1"))
    assert lab.tokens("1") == alone.tokens("1")
    assert "task_id: 2 is none of the adapter's 2 tasks" in str(lab.ending("none").error)


def test_tenants_share_a_merge_but_no_cached_prompt() -> None:
    lab = Counting()
    for tenant in ("one", "two", "one"):
        lab.submit(f"{tenant}{len(lab.events)}", list(range(3, 40)), MERGE, tenant=tenant)
        lab.run()
    cached = [event.cached_tokens for event in lab.events if event.queue_seconds is not None]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0
    assert lab.reads == [A, B]
