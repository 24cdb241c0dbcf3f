"""Promise: whenever the process is killed, every catalog row has its bytes and nothing half-written is visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adapters_store
from adapters_store.records import AdapterRecord
from adapters_store.store import Store

Content = Callable[[Store, AdapterRecord], dict[str, bytes]]

PUBLISHING = {f"{when} {call}" for when in ("before", "after") for call in ("create", "write", "sync", "move")}
TRANSACTION = {"in transaction", "before commit", "after transaction"}


def kill_everywhere(action: str, directory: Path) -> list[str]:
    script = Path(__file__).with_name("kill_at.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(adapters_store.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), action, str(directory)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("action", "must_pass"),
    [
        ("publish", PUBLISHING | TRANSACTION | {"before sync_directory", "after sync_directory"}),
        ("delete", TRANSACTION),
        ("collect", TRANSACTION | {"before remove", "after remove"}),
    ],
)
def test_killed_at_any_point_the_store_is_whole(action: str, must_pass: set[str], directory: Path, content: Content) -> None:
    points = kill_everywhere(action, directory)
    assert must_pass <= set(points)
    for number, point in enumerate(points):
        root = directory / str(number)
        with Store.open(root) as store:
            records = store.versions("acme", "support") if store.count("acme") else ()
            for record in records:
                weights = b"weights of version %d" % record.version
                assert content(store, record) == {"config": b"shared by every version", "weights": weights}, point
            assert [record.version for record in records] == expected(action, "before commit" in points[:number]), point
            assert store.verify() == (), point
            assert len(list((root / "staging").iterdir())) == 1, point  # this store's own
            works_on(store, root, content)


def expected(action: str, committed: bool) -> list[int]:
    """Version numbers, newest first."""
    return {"publish": ([1], [2, 1]), "delete": ([1], []), "collect": ([], [])}[action][committed]


def works_on(store: Store, root: Path, content: Content) -> None:
    """After the crash: a new version can be published, and collecting leaves exactly what its files need."""
    with store.stage() as staged:
        staged.write("weights", [b"new"])
        record, created = store.publish(staged, tenant="acme", name="support", method="lora", parts=(), details={})
    assert created
    for older in store.versions("acme", "support")[1:]:
        store.delete("acme", "support", older.version)
    store.gc(0)
    assert content(store, record) == {"weights": b"new"}
    assert sum(path.is_file() for path in (root / "blobs").rglob("*")) == 2
