"""Mailbox: how a step's events get from the engine's thread to the event loop. Events: those of one request, waiting there.

Owns the hand-over between the two. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from threading import Lock

from ..requests import Event


class Events:
    """What the engine says of one request, to the last; None: the request's time is over. One task reads it.

    Unlike with asyncio's queues, one task can wait for several of them.
    """

    __slots__ = ("_items", "arrived")

    def __init__(self) -> None:
        self.arrived = asyncio.Event()  # something was put since somebody looked; may be that of several requests
        self._items: deque[Event | None] = deque()

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, event: Event | None) -> None:
        self._items.append(event)
        self.arrived.set()

    def take(self) -> Event | None:
        """Raises: IndexError when there is none."""
        return self._items.popleft()

    async def wait(self) -> None:
        """Until there is one."""
        while not self._items:
            self.arrived.clear()
            await self.arrived.wait()


class Mailbox:
    """Where the engine leaves a step's events for the event loop: one wake-up per step, however many requests.

    `publish` is given to the engine's constructor; `attach` is called once by the event loop that serves.
    """

    def __init__(self) -> None:
        self._steps: deque[list[Event]] = deque()
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Callable[[Event], None] | None = None

    def publish(self, events: list[Event]) -> None:
        """Engine's thread. Events published before a loop is attached are kept; after it closed, dropped."""
        with self._lock:
            self._steps.append(events)
            loop = self._loop
        if loop is not None:
            self._wake(loop)

    def attach(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Event], None]) -> None:
        """`deliver` is called on `loop` for every event, in the order of publication."""
        with self._lock:
            self._loop, self._deliver = loop, deliver
        self._wake(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop has closed: nobody is left to be told
            self._steps.clear()

    def _drain(self) -> None:
        while self._steps and self._deliver is not None:
            for event in self._steps.popleft():
                self._deliver(event)
