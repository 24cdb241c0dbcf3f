"""What a plan changes on the device, where the device runs out of memory: idle adapters leave, and it is tried once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from adapters_store.digest import Digest
from server.engine.plan import Change, Copy, Evict, Fill, Put
from server.methods.base import Adapter, Part, Prefix
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
