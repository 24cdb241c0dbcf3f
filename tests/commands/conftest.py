"""What the tests of commands share: the tiny server to talk to, a directory to upload, no settings from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.commands.invoke import Command, invoke
from tests.e2e.uploads import Files
from tests.process import ServerProcess


@pytest.fixture
def ask(tiny_server: ServerProcess) -> Command:
    """A command that talks to the tiny server."""
    return lambda *arguments: invoke(*arguments, "--url", tiny_server.url)


@pytest.fixture
def directory(tmp_path: Path) -> Callable[[Files], Path]:
    """An upload's files in a directory; "part/file" in one below."""

    def write(files: Files) -> Path:
        path = tmp_path / "adapter"
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    return write


@pytest.fixture(autouse=True, scope="module")
def _no_settings_in_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(f"ADAPTERD_{name.upper()}", raising=False)
        yield
