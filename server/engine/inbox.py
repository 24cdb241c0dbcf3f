"""Inbox: how any thread has the engine's own thread do something between steps. Knows no request and no adapter.

Owns the lock, the queue of jobs and whether it is still open. What happens under the lock is short and never waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..errors import UnavailableError

Job = Callable[[], None]


class Inbox:
    """Jobs in the order of their arrival. Invariant: once closed it takes no more, and what it holds is still taken out."""

    def __init__(self) -> None:
        self.lock = threading.Condition()  # reentrant: whoever holds it may `put`
        self.closed = False
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> bool:
        """False when it is closed: the job will never run."""
        with self.lock:
            if not self.closed:
                self._jobs.append(job)
                self.lock.notify()
            return not self.closed

    def check_open(self) -> None:
        """Raises: UnavailableError."""
        if self.closed:
            raise UnavailableError("the server is shutting down")

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify()

    def take(self, wait: float, busy: Callable[[], bool]) -> tuple[deque[Job], bool]:
        """(all jobs, whether it is closed). Waits up to `wait` seconds for one, unless `busy` has other work."""
        with self.lock:
            self.lock.wait_for(lambda: self._jobs or self.closed or busy(), timeout=wait)
            jobs, self._jobs = self._jobs, deque()
            return jobs, self.closed
