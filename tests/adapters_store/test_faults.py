"""Promise: a full or failing disk fails only what it touches. The n-th operation of a change fails, for n = 1, 2, 3... until
the change gets through: every system call by which the store changes its disk, every statement and commit of its database.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import Engine, event

from adapters_store import disk
from adapters_store.store import Store

from .changes import CHANGES, before_and_after, check_goes_on, check_whole, past, raised, seen
from .kill_at import CALLS

STATEMENTS = ("do_execute", "do_executemany", "do_execute_no_params")
SQLITE = {errno.ENOSPC: "database or disk is full", errno.EIO: "disk I/O error"}
LEAST = {"publish": 30, "delete": 3, "bind": 4, "unbind": 3, "collect": 4, "import": 40}


class Fault:
    """The n-th operation fails, once. `met` says which one it was, or stays None."""

    def __init__(self, number: int, code: int) -> None:
        self._left = number
        self._code = code
        self.met: str | None = None

    def reached(self, operation: str) -> bool:
        self._left -= 1
        if self._left == 0:
            self.met = operation
        return self._left == 0

    def disk_call(self, name: str) -> Callable[..., object]:
        real = getattr(disk, name)

        def call(*arguments: object) -> object:
            if self.reached(name):
                raise OSError(self._code, os.strerror(self._code), "/secret/path")
            return real(*arguments)

        return call

    def statement(self, *arguments: object) -> None:
        if self.reached("statement"):
            raise sqlite3.OperationalError(SQLITE[self._code])

    def committing(self, engine: Engine) -> Callable[[Any], None]:
        real = engine.dialect.do_commit

        def commit(connection: Any) -> None:
            if self.reached("commit"):
                raise sqlite3.OperationalError(SQLITE[self._code])
            real(connection)

        return commit


@contextmanager
def failing(store: Store, number: int, code: int) -> Iterator[Fault]:
    fault, engine = Fault(number, code), store._catalog._database.engine
    for name in STATEMENTS:
        event.listen(engine, name, fault.statement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.dialect, "do_commit", fault.committing(engine))
        for name in CALLS:
            patch.setattr(disk, name, fault.disk_call(name))
        yield fault
    for name in STATEMENTS:
        event.remove(engine, name, fault.statement)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("change", CHANGES)
def test_any_operation_of_a_change_may_fail(change: str, code: int, directory: Path) -> None:
    past(directory / "prepared", Random(1))
    before, after = before_and_after(directory / "prepared", change)
    number = 1
    while fails(Path(shutil.copytree(directory / "prepared", directory / str(number))), change, number, code, before, after):
        shutil.rmtree(directory / str(number))
        number += 1
    assert number > LEAST[change]


def fails(root: Path, change: str, number: int, code: int, before: list[Any], after: list[Any]) -> bool:
    """Whether the change had so many operations. The same store goes on afterwards, as a server's would."""
    with Store.open(root) as store:
        with failing(store, number, code) as fault:
            failure = raised(lambda: CHANGES[change](store))
        assert failure is None or "secret" not in str(failure)
        assert seen(store) in (before, after)
        assert failure is not None or seen(store) == after  # what was promised is there
        assert (failure is not None) or fault.met in (None, "remove")  # a draft that stays is no failure: it is swept
        check_whole_again(store, root)
        check_goes_on(store, change, before, after)
        assert store.verify() == ()
    return fault.met is not None


def check_whole_again(store: Store, root: Path) -> None:
    """A draft that could not be removed stays while its process lives; it is gone with it, whatever else happens."""
    for draft in [path for path in (root / "staging").rglob("*") if path.is_file()]:
        draft.unlink()
    check_whole(store, root)
