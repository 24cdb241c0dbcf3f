"""What a plan changes on the device, where the device runs out of memory: idle adapters leave, and it is tried once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.engine.leaving import GRACE
from server.engine.plan import Change, Copy, Evict, Fill, Put
from server.methods.base import Adapter, Part, Prefix
from server.recipes import Join, Source
from server.requests import FinishReason
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 33, 60, 12]
EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory.")


def delta(name: str) -> Adapter:
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(ord(name)))
    sites = {f"model.layers.{i}.mlp.down_proj": {"delta": vector} for i in range(2)}
    return Adapter(Digest.of(name.encode()), (Part("bitfit", "bitfit", sites),))


def prefix() -> Adapter:
    keys, values = torch.randn(2, 2, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    return Adapter(Digest.of(b"kv"), (Part("prefix_tuning", prefix=Prefix(5, keys, values)),))


ADAPTERS = {"a": delta("a"), "b": delta("b"), "c": delta("c"), "kv": prefix()}
KNOWN = {adapter.digest: adapter for adapter in ADAPTERS.values()}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with capture_logs():
        yield


@pytest.fixture
def lab() -> Lab:
    return Lab(tiny_model("llama"), KNOWN, slots=4)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    found = {}
    for name, adapter in ADAPTERS.items():
        alone = Lab(tiny_model("llama"), KNOWN)
        alone.submit(name, PROMPT, adapter.digest)
        alone.run()
        found[name] = alone.tokens(name)
    return found


def ask(lab: Lab, name: str, **more: Any) -> None:
    lab.submit(name, PROMPT, ADAPTERS[name].digest, **more)


def failing(lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Change], bool]) -> list[Change]:
    """Let the device run out of memory at guilty changes; returns all that were tried."""
    real, tried = lab.runner.apply, list[Change]()

    def apply(changes: Sequence[Change], adapters: Any) -> None:
        tried.extend(changes)
        if any(guilty(change) for change in changes):
            raise EXHAUSTED
        real(changes, adapters)

    monkeypatch.setattr(lab.runner, "apply", apply)
    return tried


@pytest.mark.parametrize(("kind", "name"), [(Put, "c"), (Put, "kv"), (Fill, "kv"), (Copy, "kv")])
def test_a_change_that_does_not_fit_is_tried_again_once_idle_adapters_have_left(
    kind: type, name: str, lab: Lab, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = lab.scheduler.residency
    ask(lab, "a")
    lab.run()
    ask(lab, "b", max_new_tokens=30)
    for _ in range(3):
        lab.turn()
    a, b = ADAPTERS["a"].digest, ADAPTERS["b"].digest
    tried = failing(lab, monkeypatch, lambda change: isinstance(change, kind) and resident.is_resident(a))
    ask(lab, name)
    lab.run()
    assert {event.finish for event in lab.events if event.finish} == {FinishReason.LENGTH}
    assert lab.tokens(name) == expected[name]
    assert lab.tokens("b")[:6] == expected["b"]
    assert set(resident.resident) == {b, ADAPTERS[name].digest}  # who runs and who is being served stay
    assert sum(isinstance(change, kind) for change in tried) == 2


def test_an_adapter_put_half_way_is_taken_off_before_it_is_put_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = ADAPTERS["c"].digest
    once = iter([True])
    tried = failing(lab, monkeypatch, lambda change: isinstance(change, Put) and next(once, False))
    ask(lab, "c")
    lab.run()
    assert [type(change) for change in tried] == [Put, Evict, Put]
    assert all(isinstance(change, Evict | Put) and change.digest == digest for change in tried)
    assert lab.finished("c")


def test_what_fits_neither_time_fails_who_asked_for_it_and_only_them(
    lab: Lab, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(lab, "b", max_new_tokens=12)
    for _ in range(3):
        lab.turn()
    tried = failing(lab, monkeypatch, lambda change: isinstance(change, Put) and change.digest == ADAPTERS["c"].digest)
    ask(lab, "c")
    lab.run()
    assert "could not be put on the device (OutOfMemoryError)" in str(lab.ending("c").error)
    assert lab.tokens("b")[:6] == expected["b"]
    assert sum(isinstance(change, Put) for change in tried) == 2


def test_no_memory_for_a_change_that_is_a_defect_is_tried_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Change] = []

    def apply(changes: Sequence[Change], adapters: Any) -> None:
        tried.extend(changes)
        if isinstance(changes[0], Put):
            raise ValueError("a defect")

    monkeypatch.setattr(lab.runner, "apply", apply)
    ask(lab, "c")
    lab.run()
    assert sum(isinstance(change, Put) for change in tried) == 1
    assert "could not be put on the device (ValueError)" in str(lab.ending("c").error)


# -- unloading: at once, or once nothing needs it any more -----------------------------------------------------------


class Slow(Lab):
    """A lab with a host cache, whose loads arrive when `arrive` is called."""

    def __init__(self, known: Mapping[Digest, Adapter] = KNOWN, **options: Any) -> None:
        super().__init__(tiny_model("llama"), known, **options)
        self.engine._cache.limit = 1 << 20
        self.started: list[Source] = []
        loading = self.engine._loading
        loading.start = lambda digest: self.started.append(loading._source(digest))  # type: ignore[method-assign]

    def arrive(self) -> None:
        while self.started:
            self.engine._loading._run(self.started.pop(0))

    @property
    def resident(self) -> tuple[Digest, ...]:
        return self.scheduler.residency.resident

    @property
    def cached(self) -> set[Digest]:
        return set(self.engine._cache._adapters)

    def idle(self) -> None:
        """An idle engine's turns, each of which a real one makes within a second."""
        for _ in range(3):
            self.turn()


def test_who_is_unloaded_while_it_runs_goes_with_the_last_who_needs_it(expected: dict[str, list[int]]) -> None:
    lab = Slow()
    for name in ("one", "two"):
        lab.submit(name, PROMPT, ADAPTERS["kv"].digest, max_new_tokens=6 if name == "one" else 12)
    lab.turn()
    lab.arrive()
    lab.turn()
    assert lab.engine._unload(ADAPTERS["kv"].digest) is False
    lab.submit("later", PROMPT, ADAPTERS["kv"].digest)
    while not lab.scheduler.idle:
        assert lab.resident == (ADAPTERS["kv"].digest,)
        lab.turn()
    lab.idle()
    assert lab.tokens("one") == lab.tokens("later") == lab.tokens("two")[:6] == expected["kv"]
    assert (lab.resident, lab.cached, lab.started, lab.scheduler.pages.used) == ((), set(), [], 0)


@pytest.mark.parametrize("cancelled", [True, False])
def test_who_is_unloaded_while_it_loads_does_not_stay(cancelled: bool, expected: dict[str, list[int]]) -> None:
    lab = Slow()
    ask(lab, "a")
    lab.turn()
    assert lab.engine._unload(ADAPTERS["a"].digest) is False
    if cancelled:
        lab.engine.cancel("a")
        lab.turn()
    lab.arrive()
    assert lab.cached == {ADAPTERS["a"].digest}, "the load did not know"
    lab.run()
    lab.idle()
    assert lab.tokens("a") == ([] if cancelled else expected["a"])
    assert (lab.resident, lab.cached) == ((), set())


def test_who_is_unloaded_while_it_waits_for_a_slot_runs_and_goes(expected: dict[str, list[int]]) -> None:
    lab = Slow(slots=1)
    for name in ("a", "b"):
        ask(lab, name)
        lab.turn()
        lab.arrive()
        lab.turn()
    assert lab.scheduler.residency.loaded_only == (ADAPTERS["b"].digest,)
    assert lab.engine._unload(ADAPTERS["b"].digest) is False
    lab.run()
    lab.idle()
    assert (lab.tokens("a"), lab.tokens("b")) == (expected["a"], expected["b"])
    assert (lab.resident, lab.cached) == ((), {ADAPTERS["a"].digest})


def test_who_is_warmed_after_it_was_unloaded_stays(expected: dict[str, list[int]]) -> None:
    lab = Slow()
    ask(lab, "a")
    lab.turn()
    lab.arrive()
    lab.turn()
    assert lab.engine._unload(ADAPTERS["a"].digest) is False
    warmed = lab.engine.warm((ADAPTERS["a"].digest,))
    lab.run()
    lab.idle()
    assert lab.tokens("a") == expected["a"]
    assert warmed.done()
    assert lab.resident == (ADAPTERS["a"].digest,)


@pytest.mark.parametrize("moment", ["while it loads", "while it runs"])
def test_what_is_made_from_the_unloaded_goes_when_nothing_needs_it(moment: str) -> None:
    lab = Slow()
    joined = Join((ADAPTERS["a"].digest, ADAPTERS["kv"].digest))
    lab.submit("both", PROMPT, joined)
    lab.turn()
    if moment == "while it runs":
        lab.arrive()
        lab.turn()
    assert lab.engine._unload(ADAPTERS["a"].digest) is False
    lab.arrive()
    lab.turn()
    assert lab.resident == (joined.digest,)
    lab.run()
    lab.idle()
    assert lab.finished("both")
    assert (lab.resident, lab.cached) == ((), {ADAPTERS["kv"].digest})


@pytest.mark.parametrize("what", ["adapter", "made from it"])
def test_a_request_that_found_an_adapter_before_it_was_deleted_runs_and_leaves_nothing(
    what: str, expected: dict[str, list[int]]
) -> None:
    lab, now = Slow(), [0.0]
    lab.engine._placing._leaving._clock = lambda: now[0]
    deleted, other = ADAPTERS["a"].digest, ADAPTERS["kv"].digest
    lab.engine._unload(deleted, GRACE)
    for late in ("at once", "late"):
        now[0] = GRACE * 0.9 * (late == "late")
        lab.submit(late, PROMPT, deleted if what == "adapter" else Join((deleted, other)))
        lab.turn()
        lab.arrive()
        lab.run()
        lab.idle()
        assert (lab.resident, lab.cached) == ((), set() if what == "adapter" else {other})
    assert lab.tokens("at once") == lab.tokens("late") != []
    assert what != "adapter" or lab.tokens("late") == expected["a"]
    now[0] = GRACE
    lab.idle()
    assert len(lab.engine._placing._leaving) == 0


def test_who_comes_back_after_it_was_unloaded_but_not_deleted_stays() -> None:
    lab = Slow()
    lab.engine._unload(ADAPTERS["a"].digest)
    ask(lab, "a")
    lab.turn()
    lab.arrive()
    lab.run()
    lab.idle()
    assert lab.resident == (ADAPTERS["a"].digest,)


def test_who_is_uploaded_again_after_it_was_deleted_stays() -> None:
    lab = Slow()
    lab.engine._unload(ADAPTERS["a"].digest, GRACE)
    lab.engine.keep(ADAPTERS["a"])
    ask(lab, "a")
    lab.turn()
    lab.arrive()
    lab.run()
    lab.idle()
    assert (lab.resident, lab.cached) == ((ADAPTERS["a"].digest,), {ADAPTERS["a"].digest})


def test_who_is_unloaded_while_a_request_waits_for_its_load_to_begin_goes_behind_it(expected: dict[str, list[int]]) -> None:
    lab = Slow()
    lab.scheduler._slots._prefetch = 1
    for name in ("b", "a"):
        ask(lab, name)
    lab.turn()
    assert lab.scheduler.residency.state(ADAPTERS["a"].digest) == ("stored", None)
    lab.engine._unload(ADAPTERS["a"].digest)
    for _ in range(30):
        lab.arrive()
        lab.turn()
    assert (lab.tokens("a"), lab.tokens("b")) == (expected["a"], expected["b"])
    assert (lab.resident, lab.cached) == ((ADAPTERS["b"].digest,), {ADAPTERS["b"].digest})
