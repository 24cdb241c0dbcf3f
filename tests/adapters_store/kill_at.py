"""Kills a process in the middle of a change to a store, at every point there is or at those of one name.

    python -m tests.adapters_store.kill_at every CHANGE      at each point in turn, until the change gets through
    python -m tests.adapters_store.kill_at named TIMES       at each name TIMES times, in random changes to random stores

A point is before or after any call in `disk` and any database transaction; the child that makes the change is ended by SIGKILL
when it passes it. Then everything is looked at. Prints how often it was killed at each name, as JSON.
A script of its own, single-threaded, so that fork is safe and the imports are paid once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from sqlalchemy import Engine, event

from adapters_store import disk
from adapters_store.store import Store

from .changes import CHANGES, Seen, archive, before_and_after, check_goes_on, check_whole, past, seen
from .conftest import in_memory

CALLS = ("create", "write", "sync", "make_directory", "move", "sync_directory", "remove")
NAMES = tuple(f"{when} {call}" for call in CALLS for when in ("before", "after"))
NAMES += ("in transaction", "before commit", "after transaction")


class Countdown:
    """Kills this process at the n-th point it passes (of one name, or of any), after telling the parent that point's name."""

    def __init__(self, points: int, name: str | None, report: int) -> None:
        self._left = points
        self._name = name
        self._report = report

    def passing(self, point: str) -> None:
        self._left -= self._name in (None, point)
        if self._left == 0:
            os.write(self._report, point.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        for name in CALLS:
            self._around(name)
        event.listen(Engine, "begin", lambda _: self.passing("in transaction"))
        event.listen(Engine, "commit", lambda _: self.passing("before commit"))
        event.listen(Engine, "checkin", lambda *_: self.passing("after transaction"))

    def _around(self, name: str) -> None:
        real = getattr(disk, name)

        def call(*arguments: object) -> object:
            self.passing(f"before {name}")
            result = real(*arguments)
            self.passing(f"after {name}")
            return result

        setattr(disk, name, call)


def killed_at(change: str, root: Path, points: int, name: str | None) -> str | None:
    """The name of the point at which the child died; None when it got through."""
    receive, report = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store.open(root)
        Countdown(points, name, report).install()
        CHANGES[change](store)
        store.close()
        os._exit(0)
    os.close(report)
    _, status = os.waitpid(child, 0)
    point = os.read(receive, 100).decode()
    os.close(receive)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"{change} at {points}. {name or 'point'} ended with status {status}")
    return point or None


class Trial:
    """One prepared store, a copy of which is changed and killed as often as one likes."""

    def __init__(self, directory: Path, change: str, random: Random) -> None:
        self._change = change
        self._prepared = directory / "prepared"
        self._copy = directory / "copy"
        past(self._prepared, random)
        self._before, self._after = before_and_after(self._prepared, change)
        self.found: Seen = self._before

    def killed(self, points: int, name: str | None = None) -> str | None:
        """Where it was killed, after a look at what is left; None when it got through."""
        shutil.copytree(self._prepared, self._copy)
        point = killed_at(self._change, self._copy, points, name)
        with Store.open(self._copy) as store:
            self.found = seen(store)
            assert self.found in (self._before, self._after), (point, self.found)
            assert point is not None or self.found == self._after
            check_whole(store, self._copy)
            check_goes_on(store, self._change, self._before, self._after)
            assert store.verify() == ()
        shutil.rmtree(self._copy)
        return point


def every(directory: Path, change: str) -> Counter[str]:
    """From the point at which the change is seen it stays seen."""
    trial = Trial(directory, change, Random(0))
    points: list[str] = []
    seen_after = False
    while (point := trial.killed(len(points) + 1)) is not None:
        assert not seen_after or trial.found == trial._after, point
        seen_after = trial.found == trial._after
        points.append(point)
    return Counter(points)


def named(directory: Path, times: int) -> Counter[str]:
    return Counter({name: sum(_killed_at(directory, name, number) for number in range(times)) for name in NAMES})


def _killed_at(directory: Path, name: str, number: int) -> bool:
    """Changes are tried until one passes that name."""
    random = Random(f"{name} {number}")
    for change in random.sample(list(CHANGES), len(CHANGES)):
        with tempfile.TemporaryDirectory(dir=directory) as path:
            trial = Trial(Path(path), change, random)
            if trial.killed(random.randint(1, 4), name) or trial.killed(1, name):
                return True
    return False


def main(mode: str, argument: str) -> None:
    archive()
    with tempfile.TemporaryDirectory(dir=in_memory()) as path:
        points = every(Path(path), argument) if mode == "every" else named(Path(path), int(argument))
    json.dump(points, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
