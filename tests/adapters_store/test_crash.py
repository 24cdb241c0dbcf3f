"""Promise: whenever the process is killed, every catalog row has its bytes and nothing half-written is visible."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.process import ROOT

from .kill_at import NAMES

CALLS = ("create", "write", "sync", "make_directory", "move")
PUBLISHING = {f"{when} {call}" for when in ("before", "after") for call in CALLS}
SYNCING = {"before sync_directory", "after sync_directory"}
REMOVING = {"before remove", "after remove"}
TRANSACTION = {"in transaction", "before commit", "after transaction"}


def ran(module: str, *arguments: str) -> dict[str, int]:
    """What a script of these tests prints; it ends with status 0 only if all it looked at was well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.adapters_store.{module}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        pytest.param("publish", PUBLISHING | SYNCING | REMOVING | TRANSACTION, marks=pytest.mark.slow),
        ("delete", TRANSACTION),
        ("bind", TRANSACTION),
        ("unbind", TRANSACTION),
        ("collect", TRANSACTION | REMOVING),
        pytest.param("import", PUBLISHING | SYNCING | REMOVING | TRANSACTION, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_point_of_a_change_the_store_is_whole(change: str, passes: set[str]) -> None:
    assert passes <= set(ran("kill_at", "every", change))


@pytest.mark.slow
def test_killed_at_each_named_point_20_times_the_store_is_whole() -> None:
    assert ran("kill_at", "named", "20") == dict.fromkeys(NAMES, 20)


@pytest.mark.slow
def test_killed_200_times_at_random_the_store_is_whole() -> None:
    found = ran("kill_loop", "200")
    assert found["changes"] > 200
    assert found["hits"] > 100
