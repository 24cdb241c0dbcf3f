"""The memory for keys: how long it lasts, how much it holds, and that it never blocks the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.store import Store
from server.api.keyring import SIZE, TTL, Keyring


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def lookups(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that asked the store."""
    asked: list[str] = []
    find = store.find_key

    def counted(text: str) -> object:
        asked.append(threading.current_thread().name)
        return find(text)

    monkeypatch.setattr(store, "find_key", counted)
    return asked


def test_a_revoked_key_lasts_less_than_two_seconds() -> None:
    assert TTL < 2


async def test_a_key_is_believed_for_a_moment_and_then_asked_for_again(store: Store, lookups: list[str]) -> None:
    clock = Clock()
    keyring, made = Keyring(store, clock), store.add_key("acme", ("infer",))
    first = await keyring.principal(made.text)
    assert first is not None
    assert (first.tenant, first.scopes, first.key_id) == ("acme", frozenset({"infer"}), made.record.id)
    store.revoke_key(made.record.id)  # as another process would
    clock.now += TTL - 0.01
    assert await keyring.principal(made.text) == first
    assert len(lookups) == 1
    clock.now += 0.02
    assert await keyring.principal(made.text) is None
    assert len(lookups) == 2


async def test_a_change_through_this_process_counts_at_once(store: Store) -> None:
    keyring, made = Keyring(store, Clock()), store.add_key("acme", ("infer",))
    assert await keyring.principal(made.text) is not None
    store.revoke_key(made.record.id)
    keyring.forget()
    assert await keyring.principal(made.text) is None


async def test_an_unknown_key_is_not_remembered_so_a_new_one_works_at_once(
    store: Store, lookups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring, made = Keyring(store, Clock()), store.add_key("acme", ("infer",))
    with monkeypatch.context() as hidden:
        hidden.setattr(store, "find_key", lambda text: None)
        assert await keyring.principal(made.text) is None
    assert await keyring.principal(made.text) is not None


async def test_the_store_is_asked_off_the_event_loop(store: Store, lookups: list[str]) -> None:
    keyring = Keyring(store, Clock())
    await keyring.principal(store.add_key("acme", ("infer",)).text)
    assert threading.current_thread().name not in lookups


async def test_the_memory_is_bounded_and_holds_no_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.keyring.SIZE", 3)
    keyring = Keyring(store, Clock())
    texts = [store.add_key("acme", ("infer",)).text for _ in range(5)]
    for text in texts:
        assert await keyring.principal(text) is not None
    assert len(keyring._known) == 3
    assert SIZE <= 1 << 16
    assert not any(text in repr(keyring._known) for text in texts)


async def test_what_no_header_should_hold(store: Store) -> None:
    keyring = Keyring(store, Clock())
    for text in ("", "\udcff", "ÿ" * 100, "\x00"):
        assert await keyring.principal(text) is None
