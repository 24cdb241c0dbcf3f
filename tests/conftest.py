"""Fixtures for tests that need a whole server: base models as directories, and real server processes over them.

Everything heavy is imported inside the fixtures, so that tests which need none of it start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.process import ServerProcess
    from tests.servers import PostgreSQL, SeaweedFS

Serve = Callable[..., "ServerProcess"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the real base model, fetched and converted on first use."""
    from server.model.pull import resolve
    from server.settings import Settings, default_home

    return resolve(Settings.model_fields["model"].default, default_home())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama with a byte-level tokenizer, as a directory that `--model` takes."""
    from tests.tiny import save_servable

    return save_servable(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts `adapterd serve` with the given flags, in a directory and with a store of its own; killed at the end."""
    from tests.process import ServerProcess

    with ExitStack() as running:

        def start(*flags: str) -> ServerProcess:
            return running.enter_context(ServerProcess(tmp_path_factory.mktemp("server"), *flags))

        yield start


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real PostgreSQL for the whole run of this process; each test takes a database of its own from it."""
    from tests import servers

    with servers.postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedFS]:
    """A real S3 server for the whole run of this process."""
    from tests import servers

    with servers.seaweedfs() as server:
        yield server


@pytest.fixture
def s3(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> SeaweedFS:
    """The same, with the AWS_* variables that lead there; each test takes a bucket of its own from it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def tiny_server(serve: Serve, tiny_base: Path) -> ServerProcess:
    """One server on the tiny base for all tests that need no flags; each uses names of its own and leaves it idle."""
    return serve("--model", str(tiny_base))
