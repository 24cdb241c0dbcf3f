"""The few system calls by which the store changes its disk, one function each, and the directory lock.

Called as `disk.move(...)` and never imported by name, so that a test can stop the process, or fail, at any one of them.
POSIX only: flock and fsync of a directory have no counterpart elsewhere.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


def create(path: Path) -> FileIO:
    """A new, unbuffered file: what was written is what another reader of the path sees. Raises: FileExistsError."""
    return FileIO(path, "xb")


def write(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sync(file: FileIO) -> None:
    os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Atomic; a file already at `target` is replaced, its open readers keep the old one."""
    source.replace(target)


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` as durable as the files they point to."""
    descriptor = open_directory(directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Its parent must exist. Not yet durable; idempotent."""
    directory.mkdir(exist_ok=True)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def hold(directory: Path) -> int | None:
    """Locks `directory` until the returned descriptor is closed or the process ends, however it ends.

    None when somebody else (another process, or another descriptor of this one) holds it.
    """
    descriptor = open_directory(directory)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Waits for `directory`: any number of shared holders, or one exclusive holder, across threads and processes."""
    descriptor = open_directory(directory)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
