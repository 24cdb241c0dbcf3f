"""The store against a dict: whatever is done in whatever order, through two Store objects, it answers as the model does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapters_store.digest import Digest
from adapters_store.errors import NotFound
from adapters_store.store import Store

from .conftest import HandClock, in_memory
from .places import FAST, SLOW, Place, new_place

tenants = st.sampled_from(["acme", "zeta"])
names = st.sampled_from(["support", "org/sales", "x"])
users = st.sampled_from(["ann", "bob@example.org"])
contents = st.sampled_from([{"a": b"1"}, {"a": b"2"}, {"a": b"1", "b": b"2"}, {"b": b"1"}, {"c": b"", "a": b"2"}])
grace = st.sampled_from([0, 100])


class Version(NamedTuple):
    number: int
    files: dict[str, bytes]
    order: int  # of publication, over all names


class Content(NamedTuple):
    tenant: str
    files: dict[str, bytes]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, new: Callable[[Path], Place]) -> None:
        super().__init__()
        self.new = new

    @initialize()
    def start(self) -> None:
        self.place = self.new(Path(tempfile.mkdtemp(dir=in_memory())))
        self.clock = HandClock()
        self.stores = [self.place.open(clock=self.clock) for _ in range(2)]
        self.live: dict[tuple[str, str], list[Version]] = {}  # newest last
        self.last: dict[tuple[str, str], int] = {}
        self.bound: dict[tuple[str, str], str] = {}
        self.published = 0
        self.digests: dict[Digest, Content] = {}
        self.touched = ("acme", "x")  # what the last rule changed

    def teardown(self) -> None:
        self.check_files()
        assert self.store.verify() == ()
        for store in self.stores:
            store.close()
        shutil.rmtree(self.place.root)

    @property
    def store(self) -> Store:
        """The two take turns, so that each has to see what the other did."""
        self.stores.reverse()
        return self.stores[0]

    @rule(tenant=tenants, name=names, files=contents)
    def publish(self, tenant: str, name: str, files: dict[str, bytes]) -> None:
        self.touched = (tenant, name)
        store, key = self.store, (tenant, name)
        with store.stage() as staged:
            for file_name, data in files.items():
                staged.write(file_name, [data])
            record, created = store.publish(staged, tenant=tenant, name=name, method="lora", parts=(), details={})
        history = self.live.setdefault(key, [])
        assert created == (not history or history[-1].files != files)
        if created:
            self.published += 1
            self.last[key] = self.last.get(key, 0) + 1
            history.append(Version(self.last[key], files, self.published))
        assert record.version == history[-1].number
        assert self.digests.setdefault(record.digest, Content(tenant, files)) == (tenant, files)

    @rule(tenant=tenants, files=contents)
    def abandon(self, tenant: str, files: dict[str, bytes]) -> None:
        with self.store.stage() as staged:
            for file_name, data in files.items():
                staged.write(file_name, [data])

    @rule(tenant=tenants, name=names, version=st.none() | st.integers(0, 4))
    def delete(self, tenant: str, name: str, version: int | None) -> None:
        self.touched = (tenant, name)
        history = self.live.get((tenant, name), [])
        kept = [] if version is None else [v for v in history if v.number != version]
        if kept == history:
            with pytest.raises(NotFound):
                self.store.delete(tenant, name, version)
        else:
            self.store.delete(tenant, name, version)
            self.live[tenant, name] = kept

    @rule(tenant=tenants, user=users, name=names)
    def bind(self, tenant: str, user: str, name: str) -> None:
        self.touched = (tenant, name)
        if self.live.get((tenant, name)):
            self.store.bind_user(tenant, user, name)
            self.bound[tenant, user] = name
        else:
            with pytest.raises(NotFound):
                self.store.bind_user(tenant, user, name)

    @rule(tenant=tenants, user=users)
    def unbind(self, tenant: str, user: str) -> None:
        if self.bound.pop((tenant, user), None):
            self.store.delete_user(tenant, user)
        else:
            with pytest.raises(NotFound):
                self.store.delete_user(tenant, user)

    @rule(grace=grace)
    def collect(self, grace: int) -> None:
        self.store.gc(grace)
        self.check_files()
        if grace == 0:
            needed = {digest for digest in self.digests if self.is_live(digest)}
            blobs = {Digest.of(data) for digest in needed for data in self.digests[digest].files.values()}
            assert set(self.store._blobs) == needed | blobs

    @rule(seconds=st.sampled_from([1, 99, 1000]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def reopen(self) -> None:
        self.stores[0].close()
        self.stores[0] = self.place.open(clock=self.clock)

    @invariant()
    def both_stores_answer_as_the_model_does(self) -> None:
        tenant, name = self.touched
        history = list(reversed(self.live.get(self.touched, [])))
        if not history:
            with pytest.raises(NotFound):
                self.store.get(tenant, name)
        else:
            found = self.store.versions(tenant, name)
            assert [(r.version, self.digests[r.digest].files) for r in found] == [(v.number, v.files) for v in history]
            assert self.store.get(tenant, name) == found[0]
        newest = sorted((h[-1].order, name) for (owner, name), h in self.live.items() if owner == tenant and h)
        assert self.walk(tenant) == [name for _, name in reversed(newest)]
        assert self.store.count(tenant) == len(newest)
        bound = {user: name for (owner, user), name in self.bound.items() if owner == tenant}
        assert {b.user_id: b.adapter_id for b in self.store.list_users(tenant)[0]} == bound

    def check_files(self) -> None:
        """What is live reads as it was uploaded; what is not may still be there, whole, or be gone."""
        for digest, content in self.digests.items():
            try:
                assert {name: path.read_bytes() for name, path in self.store.files(digest).items()} == content.files
            except NotFound:
                assert not self.is_live(digest)

    def walk(self, tenant: str) -> list[str]:
        """All names, two per page."""
        found, cursor = [], None
        while True:
            records, cursor = self.store.list(tenant, limit=2, cursor=cursor)
            found += [record.name for record in records]
            if cursor is None:
                return found

    def is_live(self, digest: Digest) -> bool:
        tenant, files = self.digests[digest]
        return any(version.files == files for (owner, _), held in self.live.items() if owner == tenant for version in held)


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_store_against_a_dict(kind: str, request: pytest.FixtureRequest) -> None:
    def new(root: Path) -> Place:
        return new_place(kind, root, lambda: request.getfixturevalue("postgresql"), lambda: request.getfixturevalue("s3"))

    run_state_machine_as_test(
        lambda: StoreMachine(new),
        settings=settings(max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)),
    )
