"""Failures in a running engine: whatever breaks, in a pass, a change or the step itself, costs nobody else anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from adapters_store.digest import Digest
from server.engine.footprint import Footprint
from server.engine.plan import Change, Copy, Evict, Fill, Put, Row
from server.errors import AdapterdError, AdapterError, GenerationError
from server.methods.base import Adapter, Part
from server.requests import Event, FinishReason
from tests.engine.running import ADAPTERS, DIGESTS, PROMPT, Gate, Running, ask, check_events, new_lab
from tests.lab import Lab
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "logs")


def error_of(lab: Lab, id: str) -> str:
    event = lab.ending(id)
    assert event.finish is FinishReason.ERROR
    return f"{type(event.error).__name__}: {event.error}"


# ---- steps that break ----


def poison(lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Row], bool], error: Exception) -> list[int]:
    """Make the forward pass raise as soon as a guilty row is in it; returns the sizes of the batches tried."""
    real, sizes = lab.runner.run, []

    def run(rows: Sequence[Row]) -> Any:
        sizes.append(len(rows))
        if any(guilty(row) for row in rows):
            raise error
        return real(rows)

    monkeypatch.setattr(lab.runner, "run", run)
    return sizes


def is_request(*ids: str) -> Callable[[Row], bool]:
    return lambda row: row.sequence.request is not None and row.sequence.request.id in ids


@pytest.mark.parametrize("culprit", ["base", "a", "kv", "soft"])
def test_a_request_that_breaks_the_step_fails_alone(
    culprit: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab(max_batch_tokens=200)
    sizes = poison(lab, monkeypatch, is_request(culprit), RuntimeError("prompt text that must not get out"))
    ask(lab, *expected)
    lab.run()
    assert error_of(lab, culprit) == "GenerationError: the step failed (RuntimeError)"
    assert {name: lab.tokens(name) for name in expected if name != culprit} == {
        name: tokens for name, tokens in expected.items() if name != culprit
    }
    check_events(lab.events)
    assert 1 in sizes


def test_two_culprits_of_six_are_found_by_halving(expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab(max_batch_tokens=200)
    sizes = poison(lab, monkeypatch, is_request("b0", "base3"), ValueError())
    lab.engine.warm((DIGESTS["b"],))
    for _ in range(3):
        lab.turn()
    for i in range(6):
        ask(lab, "b" if i % 2 == 0 else "base", suffix=f"{i}")
    lab.run()
    assert {event.request_id for event in lab.events if event.finish is FinishReason.ERROR} == {"b0", "base3"}
    assert all(lab.tokens(f"b{i}") == expected["b"] for i in (2, 4))
    assert max(sizes) == 6


def test_an_error_of_the_tree_reaches_the_client_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    poison(lab, monkeypatch, is_request("base"), AdapterError("lora_A", "is odd"))
    ask(lab, "base")
    lab.run()
    assert error_of(lab, "base") == "AdapterError: lora_A: is odd"


def test_a_request_that_breaks_later_keeps_the_tokens_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    poison(lab, monkeypatch, lambda row: row.sequence.generated == 3, RuntimeError())
    ask(lab, "base")
    lab.run()
    assert len(lab.tokens("base")) == 3
    assert lab.ending("base").finish is FinishReason.ERROR


def test_a_soft_prompt_that_breaks_its_run_fails_who_waits_for_it_and_is_tried_again(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    with monkeypatch.context() as patched:
        poison(lab, patched, lambda row: row.sequence.request is None, RuntimeError())
        ask(lab, "soft", "base")
        ask(lab, "soft", suffix=" too")
        lab.run()
    assert {error_of(lab, "soft"), error_of(lab, "soft too")} == {"GenerationError: the step failed (RuntimeError)"}
    assert lab.tokens("base") == expected["base"]
    ask(lab, "soft", suffix=" again")
    lab.run()
    assert lab.tokens("soft again") == expected["soft"]


# ---- changes that break ----


def breaking(lab: Lab, monkeypatch: pytest.MonkeyPatch, guilty: Callable[[Change], bool]) -> None:
    real = lab.runner.apply

    def apply(changes: Sequence[Change], adapters: Any) -> None:
        if any(guilty(change) for change in changes):
            raise torch.OutOfMemoryError("out of memory")
        real(changes, adapters)

    monkeypatch.setattr(lab.runner, "apply", apply)


@pytest.mark.parametrize(("kind", "name"), [(Put, "a"), (Put, "kv"), (Put, "soft"), (Fill, "kv")])
def test_an_adapter_that_the_device_does_not_take_fails_only_who_asked_for_it(
    kind: type, name: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    ask(lab, "base", "b")
    for _ in range(3):
        lab.turn()
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, kind) and change.digest == DIGESTS[name])
        ask(lab, name, "c")
        ask(lab, name, suffix=" too")
        lab.run()
    for id in (name, f"{name} too"):
        assert error_of(lab, id) == "GenerationError: the adapter could not be put on the device (OutOfMemoryError)"
    assert {id: lab.tokens(id) for id in ("base", "b", "c")} == {id: expected[id] for id in ("base", "b", "c")}
    assert lab.engine.residency(DIGESTS[name]) == ("stored", None)
    ask(lab, name, suffix=" again")
    lab.run()
    assert lab.tokens(f"{name} again") == expected[name]
    check_events(lab.events)


def test_a_put_that_fails_half_way_leaves_nothing_for_the_slots_next_owner(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab()
    site = "model.layers.1.mlp.down_proj"
    whole = dict(ADAPTERS["a"].parts[0].sites)
    wrong = Part("bitfit", "bitfit", {**whole, site: {"delta": torch.zeros(31)}})
    lab.adapters[DIGESTS["a"]] = Adapter(DIGESTS["a"], (wrong,))
    with monkeypatch.context() as patched:
        patched.setattr(lab.engine, "_weigh", lambda adapter: Footprint())  # it would have noticed
        ask(lab, "a")
        lab.run()
    assert "could not be put on the device (ValueError)" in error_of(lab, "a")
    assert lab.runner.sites.attached == ()
    only_last = Part("bitfit", "bitfit", {site: ADAPTERS["b"].parts[0].sites[site]})
    small = Adapter(Digest.of(b"small"), (only_last,))
    lab.adapters[small.digest] = small
    lab.submit("small", PROMPT, small.digest)
    lab.run()
    clean = Lab(tiny_model("llama"), {small.digest: small})
    clean.submit("small", PROMPT, small.digest)
    clean.run()
    assert lab.tokens("small") == clean.tokens("small")


@pytest.mark.parametrize("kind", [Evict, Copy])
def test_a_step_that_breaks_half_way_never_leaves_an_adapter_believed_present(
    kind: type, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan puts "a" on the device behind a change that fails: "a" must not answer as the base does."""
    lab = new_lab(slots=2)
    ask(lab, "kv", "c")
    lab.run()
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, kind))
        ask(lab, "kv", "a", suffix=" broken")
        lab.run()
    ask(lab, "a", "kv", suffix=" later")
    lab.run()
    assert lab.tokens("a later") == expected["a"]
    assert lab.tokens("kv later") == expected["kv"]
    check_events(lab.events)


def test_a_slot_that_could_not_be_cleared_is_used_by_nobody_until_it_is(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = new_lab(slots=1)
    ask(lab, "a")
    lab.run()
    steps = []
    with monkeypatch.context() as patched:
        breaking(lab, patched, lambda change: isinstance(change, Evict))
        patched.setattr(lab.runner, "run", lambda rows: steps.append(rows))
        ask(lab, "b")
        for _ in range(6):
            lab.turn()
    assert steps == []
    lab.run()
    ask(lab, "b", "a", suffix=" later")
    lab.run()
    assert [lab.tokens("b later"), lab.tokens("a later")] == [expected["b"], expected["a"]]
    check_events(lab.events)


def test_warming_what_the_device_does_not_take_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()
    breaking(lab, monkeypatch, lambda change: isinstance(change, Put))
    future = lab.engine.warm((DIGESTS["a"],))
    for _ in range(4):
        lab.turn()
    with pytest.raises(GenerationError, match="could not be put on the device"):
        future.result(0)


# ---- what breaks outside of passes and changes ----


def test_a_defect_in_the_step_itself_fails_who_runs_and_the_engine_goes_on(
    run: Callable[..., Running], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()
    real, broken = running.scheduler.advance, threading.Event()

    def advance(*args: Any) -> None:
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError
        real(*args)

    monkeypatch.setattr(running.scheduler, "advance", advance)
    running.submit("a", "a")
    assert str(running.ending("a").error) == "the step failed (ZeroDivisionError)"
    running.submit("b", "b")
    assert running.tokens("b") == expected["b"]


def test_events_that_cannot_be_published_do_not_stop_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab()

    def publish(events: list[Event]) -> None:
        raise RuntimeError("the loop is closed")

    with monkeypatch.context() as patched:
        patched.setattr(lab.engine, "_publish", publish)
        ask(lab, "base")
        lab.run()
    assert lab.engine.pending == 0
    ask(lab, "a")
    lab.run()
    assert lab.finished("a")


def test_a_leak_is_reported_once_the_engine_is_idle(logs: list[Any]) -> None:
    lab = new_lab()
    lab.scheduler.pages.allocate(1)
    ask(lab, "base")
    for _ in range(20):
        lab.turn()
    assert "the engine is idle and something is still held" in {line["event"] for line in logs}
    assert lab.finished("base")


def test_errors_of_the_engine_are_of_the_tree(run: Callable[..., Running]) -> None:
    """What reaches a client is never a bare exception."""
    gate = Gate()
    gate.error = KeyError("x")
    gate.open.set()
    running = run(gate)
    running.submit("a", "a")
    assert isinstance(running.ending("a").error, AdapterdError)
