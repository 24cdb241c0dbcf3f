"""Turns: whose upload is looked at next, where looking takes memory that there is once. Knows nothing of uploads.

One at a time in all, and of one tenant at most one waits for it while its others queue behind: who sends a hundred uploads at
once delays the next tenant's by one.
"""

from __future__ import annotations

from asyncio import Lock
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Turns:
    """Used on one event loop. Both queues are served first come, first served."""

    def __init__(self) -> None:
        self._all = Lock()
        self._own: WeakValueDictionary[str, Lock] = WeakValueDictionary()  # a tenant's, while somebody holds or awaits it

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        own = self._own.setdefault(tenant, Lock())
        async with own, self._all:
            yield
