"""A store in a temporary directory, a clock that can be put forward, and an upload in one call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters_store.records import AdapterRecord
from adapters_store.store import Store

from .places import FAST, SLOW, Place, new_place


class HandClock:
    """Real time, ahead by what it was advanced; no two readings are equal, so no two records have the same age."""

    def __init__(self) -> None:
        self.ahead = timedelta()
        self.last = datetime.now(UTC)

    def __call__(self) -> datetime:
        self.last = max(self.last + timedelta(microseconds=1), datetime.now(UTC) + self.ahead)
        return self.last

    def advance(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)


Upload = Callable[..., tuple[AdapterRecord, bool]]
Content = Callable[[Store, AdapterRecord], dict[str, bytes]]


def in_memory() -> str | None:
    """Where a sync costs nothing. What is tested is the order of operations, which no file system changes."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=in_memory()) as path:
        yield Path(path)


@pytest.fixture
def root(directory: Path) -> Path:
    return directory / "store"


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that says `EVERYWHERE = True` has its tests run on every kind of place; `files_only` excepts a test."""
    if "place" in metafunc.fixturenames and getattr(metafunc.module, "EVERYWHERE", False):
        slow = [pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW]
        kinds = [FAST[0]] if "files_only" in metafunc.fixturenames else [*FAST, *slow]
        metafunc.parametrize("place", kinds, indirect=True)


@pytest.fixture
def files_only() -> None:
    """For tests of what only files do."""


@pytest.fixture
def place(root: Path, request: pytest.FixtureRequest) -> Place:
    """Where `store` is: a directory, unless the module's tests run everywhere."""
    kind = getattr(request, "param", FAST[0])
    return new_place(kind, root, lambda: request.getfixturevalue("postgresql"), lambda: request.getfixturevalue("s3"))


@pytest.fixture
def store(place: Place, clock: HandClock) -> Iterator[Store]:
    with place.open(clock=clock) as opened:
        yield opened


@pytest.fixture
def upload() -> Upload:
    def _upload(store: Store, tenant: str, name: str, **files: bytes) -> tuple[AdapterRecord, bool]:
        with store.stage() as staged:
            for file_name, data in files.items():
                staged.write(file_name, [data])
            return store.publish(staged, tenant=tenant, name=name, method="lora", parts=("lora",), details={"rank": 8})

    return _upload


@pytest.fixture
def content() -> Content:
    def _content(store: Store, record: AdapterRecord) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in store.files(record.digest).items()}

    return _content


@pytest.fixture
def blob_files(store: Store) -> Callable[[], int]:
    """How many blobs there are, referenced or not."""
    return lambda: len(list(store._blobs))
