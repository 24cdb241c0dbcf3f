"""Isolation: tenants with equal names and equal files do everything a tenant can do, against an oracle, step by step.

Owns the random walk. The oracle is what each content answers alone, in an engine of its own; the engine under test is
turned by hand, so every failure can be played again. HTTP and keys are `tests/promises`' business.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.digest import Digest
from adapters_store.errors import NotFound
from adapters_store.records import AdapterRecord
from adapters_store.store import Store
from server.api.context import Names
from server.api.resolve import Resolved, resolve
from server.errors import GenerationError
from server.methods.base import Adapter, Limits
from server.methods.read import describe, read_adapter, read_parts
from server.requests import Event, FinishReason
from tests.adapters_store.conftest import in_memory
from tests.lab import Lab
from tests.security.contents import BROKEN, CONTENTS
from tests.tiny import tiny_model

LIMITS = Limits(max_rank=16, max_virtual_tokens=16)
NEW = 6  # tokens per request
PROMPTS: tuple[tuple[int, ...], ...] = (
    (5, 9, 33, 60, 12, 7, 81, 44, 23, 10),
    (5, 9, 33, 60, 12, 7, 81, 44, 90, 3, 17),  # two blocks of four in common with the first
    (70, 2, 8),
)

TENANTS = ("acme", "zeta", "omni")
NAMES = ("support", "org/sales")

tenants = st.sampled_from(TENANTS)
names = st.sampled_from(NAMES)
contents = st.sampled_from(sorted(CONTENTS))


class StoreLab(Lab):
    """A lab that loads from a store, with hardly any room: adapters and pages have to leave for others all the time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        super().__init__(tiny_model("llama"), {}, blocks=14, block_size=4, slots=2, max_batch_tokens=16)

    def unload(self, digest: Digest) -> None:
        """As DELETE and /unload do, without the engine's thread."""
        self.engine._unload(digest)

    def _load(self, digest: Digest) -> Adapter:
        return read_adapter(self._store.files(digest), self.runner.base.shape, LIMITS, digest)


@dataclass
class Asked:
    """One request and what has been heard of it."""

    tenant: str
    content: str | None  # None = the base
    digest: Digest | None
    prompt: tuple[int, ...]
    preemptions: int  # of the engine when it was submitted
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    ending: Event | None = None

    @property
    def key(self) -> tuple[str, Digest | None]:
        return self.tenant, self.digest


class Isolation(RuleBasedStateMachine):
    """`seen` counts what has happened over all runs of a test, so that it can demand that the walk met it."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=in_memory()))
        self.versions: dict[tuple[str, str], list[tuple[int, str]]] = {}  # newest last: (number, content)
        self.owners: dict[Digest, tuple[str, str]] = {}  # tenant and content
        self.numbers = 0
        self._open()

    @initialize(first=st.lists(contents, min_size=6, max_size=6))
    def begin(self, first: list[str]) -> None:
        """Equal names from the start, and often equal files."""
        for (tenant, name), content in zip(itertools.product(TENANTS, NAMES), first, strict=True):
            self.upload(tenant, name, content)

    def teardown(self) -> None:
        self.finish()
        self.seen["preemptions"] += self.lab.observer.preemptions
        self.seen["evictions"] += self.lab.observer.evictions
        self.store.close()
        shutil.rmtree(self.root)

    # -- what tenants do

    @rule(tenant=tenants, name=names, content=contents)
    def upload(self, tenant: str, name: str, content: str) -> None:
        record, created = publish(self.store, self.lab, tenant, name, content)
        history = self.versions.setdefault((tenant, name), [])
        assert created == (not history or history[-1][1] != content)
        if created:
            self.seen["replaced"] += bool(history)
            history.append((record.version, content))
        assert self.owners.setdefault(record.digest, (tenant, content)) == (tenant, content), "a digest is one tenant's"

    @rule(tenant=tenants, name=names, version=st.none() | st.integers(1, 3))
    def delete(self, tenant: str, name: str, version: int | None) -> None:
        """Requests in flight must finish; see `invariant`."""
        history = self.versions.get((tenant, name), [])
        gone = [number for number, _ in history if version in (None, number)]
        if not gone:
            with pytest.raises(NotFound):
                self.store.delete(tenant, name, version)
            return
        records = [self.store.get(tenant, name, number) for number in gone]
        self.store.delete(tenant, name, version)
        for record in records:
            self.lab.unload(record.digest)
        self.versions[tenant, name] = [entry for entry in history if entry[0] not in gone]
        self.seen["deleted"] += 1

    @rule(
        wishes=st.lists(st.tuples(tenants, st.none() | names, st.sampled_from(PROMPTS)), min_size=2, max_size=5),
        turns=st.integers(0, 4),
    )
    def ask(self, wishes: list[tuple[str, str | None, tuple[int, ...]]], turns: int) -> None:
        """Several at once, so that they share steps and compete for slots and pages."""
        for tenant, name, prompt in wishes:
            self._ask(tenant, name, prompt)
        self.turn(turns)

    def _ask(self, tenant: str, name: str | None, prompt: tuple[int, ...]) -> None:
        history = self.versions.get((tenant, name or ""), [])
        if name is not None and not history:
            assert refusal(self.store, tenant, name) == refusal(self.store, tenant, "never/was").replace("never/was", name)
            self.seen["foreign"] += any(other == name and kept for (_, other), kept in self.versions.items())
            return
        digests = resolved(self.store, tenant, name).digests
        asked = Asked(tenant, history[-1][1] if name else None, next(iter(digests), None), prompt, self._preemptions)
        assert asked.digest is None or self.owners[asked.digest] == (tenant, asked.content)
        self.numbers += 1
        self.requests[str(self.numbers)] = asked
        self.lab.submit(str(self.numbers), prompt, *digests, tenant=tenant, max_new_tokens=NEW)

    @rule(tenant=tenants, name=names)
    def evict(self, tenant: str, name: str) -> None:
        for digest, owner in self.owners.items():
            if owner[0] == tenant and self.versions.get((tenant, name)):
                self.lab.unload(digest)

    @precondition(lambda self: any(not asked.ending for asked in self.requests.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        running = [id for id, asked in self.requests.items() if not asked.ending]
        id = data.draw(st.sampled_from(running))
        self.requests[id].cancelled = True
        self.lab.engine.cancel(id)
        self.lab.turn()
        self._listen()
        assert self.requests[id].ending is not None, "cancelled within one step"
        self.seen["cancelled"] += 1

    @rule(turns=st.integers(1, 8))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.lab.turn()

    @rule()
    def finish(self) -> None:
        """Everything comes to an end, and nothing is held afterwards (`Lab.run` checks pages and slots)."""
        self.lab.run()
        self._listen()
        assert [id for id, asked in self.requests.items() if not asked.ending] == []

    @rule()
    def restart(self) -> None:
        """The process died: requests are lost, the store is not."""
        self.seen["evictions"] += self.lab.observer.evictions
        self.seen["preemptions"] += self.lab.observer.preemptions
        self.store.close()
        self._open()

    # -- what must hold after every step

    @invariant()
    def every_answer_is_its_own_tenants_and_versions(self) -> None:
        self.seen["steps"] += 1
        self._listen()
        for asked in self.requests.values():
            if asked.content in BROKEN:
                assert asked.tokens == []
                continue
            alone = answer(asked.content, asked.prompt)
            assert asked.tokens == list(alone[: len(asked.tokens)]), (asked, alone)
            assert asked.ending is None or asked.cancelled or len(asked.tokens) == NEW, asked.ending

    @invariant()
    def the_catalog_is_the_models(self) -> None:
        for tenant in TENANTS:
            kept = {name for (owner, name), history in self.versions.items() if owner == tenant and history}
            assert {record.name for record in self.store.list(tenant)[0]} == kept

    # -- inside

    def _open(self) -> None:
        self.store = Store.open(self.root / "store")
        self.lab = StoreLab(self.store)
        self.requests: dict[str, Asked] = {}

    @property
    def _preemptions(self) -> int:
        return self.lab.observer.preemptions

    def _listen(self) -> None:
        events, self.lab.events[:] = list(self.lab.events), []
        for event in events:
            asked = self.requests[event.request_id]
            assert asked.ending is None, "nothing follows the end of a request"
            self._check_cache(asked, event.cached_tokens, self.requests)
            asked.tokens += [token.id for token in event.tokens]
            if event.finish is not None:
                asked.ending = event
                self._check_ending(asked, event)

    def _check_ending(self, asked: Asked, event: Event) -> None:
        if event.finish is FinishReason.CANCELLED:
            assert asked.cancelled
        elif asked.content in BROKEN:
            assert event.finish is FinishReason.ERROR
            assert isinstance(event.error, GenerationError)
            self.seen[f"{asked.content} broke"] += 1
        else:
            assert event.finish is FinishReason.LENGTH, event.error
            self.seen["answered"] += 1

    def _check_cache(self, asked: Asked, cached: int, requests: dict[str, Asked]) -> None:
        """Cached positions are those of an earlier request of the same tenant through the same content."""
        if not cached:
            return
        others = [other for other in requests.values() if other is not asked and other.key == asked.key]
        texts = [(*other.prompt, *other.tokens) for other in others]
        preempted = self._preemptions > asked.preemptions  # then it may meet its own blocks again
        assert preempted or cached <= max((common(asked.prompt, text) for text in texts), default=0), asked
        self.seen["cached"] += 1


def publish(store: Store, lab: Lab, tenant: str, name: str, content: str) -> tuple[AdapterRecord, bool]:
    """As POST /adapters does it: validated by the reader that loads it, then published."""
    with store.stage() as staged:
        for file, data in CONTENTS[content].items():
            staged.write(file, [data])
        details = describe(read_parts(staged.paths, lab.runner.base.shape, LIMITS))
        return store.publish(staged, tenant=tenant, name=name, method="any", parts=("any",), details=details)


def resolved(store: Store, tenant: str, name: str | None) -> Resolved:
    return asyncio.run(resolve(store, Names(), tenant, adapter_id=name, user_id=None, compose=False))


def refusal(store: Store, tenant: str, name: str) -> str:
    with pytest.raises(NotFound) as refused:
        resolved(store, tenant, name)
    return str(refused.value)


@functools.cache
def answer(content: str | None, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What a content answers alone: nobody before it, nobody beside it, and room for everything."""
    lab = Lab(tiny_model("llama"), {})
    if content is not None:
        lab.adapters[ALONE] = alone(content, lab)
    lab.submit("alone", prompt, *([] if content is None else [ALONE]), max_new_tokens=NEW)
    lab.run()
    return tuple(lab.tokens("alone"))


ALONE = Digest.of(b"alone")


def alone(content: str, lab: Lab, digest: Digest = ALONE) -> Adapter:
    with tempfile.TemporaryDirectory(dir=in_memory()) as directory:
        paths = {name: Path(directory) / name for name in CONTENTS[content]}
        for name, path in paths.items():
            path.write_bytes(CONTENTS[content][name])
        return read_adapter(paths, lab.runner.base.shape, LIMITS, digest)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
