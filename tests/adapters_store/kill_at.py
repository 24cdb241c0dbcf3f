"""Runs one change of a store again and again, killed at a later point each time, until it gets through.

    python kill_at.py ACTION DIRECTORY

For run n, `DIRECTORY/n` becomes a prepared store, and a child process that runs ACTION on it is killed by SIGKILL at its
n-th point: before or after any call in `disk` and any database transaction. Prints the points' names as JSON.
A script of its own, single-threaded, so that fork is safe and the imports are paid once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import event

from adapters_store import disk
from adapters_store.store import Store

CALLS = ("create", "write", "sync", "move", "sync_directory", "remove")


def upload(store: Store, version: int) -> None:
    with store.stage() as staged:
        staged.write("config", [b"shared by every version"])
        staged.write("weights", [b"weights of ", b"version %d" % version])
        store.publish(staged, tenant="acme", name="support", method="lora", parts=(), details={})


def delete(store: Store) -> None:
    store.delete("acme", "support")


ACTIONS: dict[str, tuple[Callable[[Store], object], Callable[[Store], object]]] = {  # before, and while being killed
    "publish": (lambda store: upload(store, 1), lambda store: upload(store, 2)),
    "delete": (lambda store: upload(store, 1), delete),
    "collect": (lambda store: (upload(store, 1), delete(store)), lambda store: store.gc(0)),
}


class Countdown:
    """Kills this process at the n-th point it passes, after telling the parent that point's name."""

    def __init__(self, points: int, report: int) -> None:
        self._left = points
        self._report = report

    def passing(self, point: str) -> None:
        self._left -= 1
        if self._left == 0:
            os.write(self._report, point.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str) -> None:
        real = getattr(disk, name)

        def call(*arguments: object) -> object:
            self.passing(f"before {name}")
            result = real(*arguments)
            self.passing(f"after {name}")
            return result

        setattr(disk, name, call)


def run(action: Callable[[Store], object], root: Path, points: int, report: int) -> None:
    store = Store.open(root)
    countdown = Countdown(points, report)
    for name in CALLS:
        countdown.around(name)
    engine = store._catalog._engine
    event.listen(engine, "begin", lambda _: countdown.passing("in transaction"))
    event.listen(engine, "commit", lambda _: countdown.passing("before commit"))
    event.listen(engine, "checkin", lambda *_: countdown.passing("after transaction"))
    action(store)
    store.close()


def killed_at(action: Callable[[Store], object], root: Path, points: int) -> str | None:
    """The name of the point at which the child died; None when it got through."""
    receive, report = os.pipe()
    child = os.fork()
    if child == 0:
        run(action, root, points, report)
        os._exit(0)
    os.close(report)
    _, status = os.waitpid(child, 0)
    point = os.read(receive, 100).decode()
    os.close(receive)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"run {points} ended with status {status}")
    return point or None


def main(action: str, directory: Path) -> None:
    prepare, change = ACTIONS[action]
    points: list[str] = []
    with Store.open(directory / "prepared") as store:
        prepare(store)
    while True:
        root = directory / str(len(points))
        shutil.copytree(directory / "prepared", root)
        point = killed_at(change, root, len(points) + 1)
        if point is None:
            break
        points.append(point)
    json.dump(points, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
