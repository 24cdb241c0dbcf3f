"""The inbox: jobs arrive in order, and once it is closed nothing is lost and nothing is taken any more."""

from __future__ import annotations

import threading

import pytest

from server.engine.inbox import Inbox
from server.errors import UnavailableError


def test_jobs_are_taken_all_at_once_and_in_order() -> None:
    inbox, done = Inbox(), list[int]()
    for i in range(3):
        assert inbox.put(lambda i=i: done.append(i))  # type: ignore[misc]
    assert len(inbox) == 3
    jobs, closed = inbox.take(0, lambda: False)
    for job in jobs:
        job()
    assert (done, closed, len(inbox)) == ([0, 1, 2], False, 0)
    assert not inbox.take(0, lambda: True)[0]


def test_a_closed_inbox_gives_what_it_holds_and_takes_nothing() -> None:
    inbox = Inbox()
    inbox.check_open()
    inbox.put(lambda: None)
    inbox.close()
    assert not inbox.put(lambda: None)
    with pytest.raises(UnavailableError, match="shutting down"):
        inbox.check_open()
    jobs, closed = inbox.take(60, lambda: False)  # does not wait
    assert (len(jobs), closed) == (1, True)


@pytest.mark.parametrize("how", ["a job", "the end"])
def test_whoever_waits_is_woken(how: str) -> None:
    inbox, found = Inbox(), list[tuple[int, bool]]()

    def wait() -> None:
        jobs, closed = inbox.take(60, lambda: False)
        found.append((len(jobs), closed))

    waiting = threading.Thread(target=wait)
    waiting.start()
    inbox.put(lambda: None) if how == "a job" else inbox.close()
    waiting.join(30)
    assert found == [(1, False) if how == "a job" else (0, True)]


def test_under_the_lock_a_check_and_a_put_are_one() -> None:
    inbox = Inbox()
    with inbox.lock:
        inbox.check_open()
        closer = threading.Thread(target=inbox.close)
        closer.start()
        assert inbox.put(lambda: None)
    closer.join(30)
    assert inbox.closed
    assert len(inbox) == 1
