"""The phases of a server's life, and what each answers."""

from __future__ import annotations

import json

import pytest

from server.api.readiness import Readiness
from server.errors import UnavailableError


def test_a_server_is_ready_or_says_how_far_it_is() -> None:
    readiness = Readiness("loading")
    readiness.loading(12.34)
    assert json.loads(bytes(readiness.report().body)) == {"phase": "loading", "percent": 12.3}
    assert (readiness.report().status_code, readiness.health().status_code) == (503, 503)
    readiness.ready()
    assert (readiness.report().status_code, readiness.health().status_code) == (200, 200)
    readiness.require()
    readiness.stopped()
    with pytest.raises(UnavailableError, match="the server is stopped"):
        readiness.require()


def test_an_engine_that_hangs_turns_every_answer_red_and_back() -> None:
    readiness, stalled = Readiness(), [False]
    readiness.watch(lambda: stalled[0])

    def statuses() -> list[int]:
        return [answer.status_code for answer in (readiness.alive(), readiness.health(), readiness.report())]

    assert statuses() == [200, 200, 200]
    stalled[0] = True
    assert statuses() == [503, 503, 503]
    stalled[0] = False
    assert statuses() == [200, 200, 200]
    readiness.draining()
    assert statuses() == [200, 503, 503]  # a process that drains lives
