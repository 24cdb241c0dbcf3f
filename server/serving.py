"""Serving: one process from bind to exit, with a drain in between. Knows uvicorn and signals; no route, no model.

SIGTERM -> readiness 503 -> running requests finish, at most `drain_seconds` -> the rest end with an error -> exit 0
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType

import structlog
import uvicorn
from anyio import to_thread
from fastapi import FastAPI

from adapters_store.errors import StoreError
from adapters_store.store import Store

from .api.context import Readiness
from .engine.engine import Engine
from .errors import AdapterdError
from .settings import Settings

log = structlog.get_logger(__name__)

_POLL = 0.05  # seconds between looks at what still runs while draining
_SWEEP_EVERY = 600  # seconds
_SWEEP_GRACE = 3600  # seconds a deleted adapter's files are kept
_LAST_WORDS = 5  # seconds for the last answers to reach their clients


class ExposedError(AdapterdError):
    """The server would be reachable from other machines although it asks for no keys."""


class AddressError(AdapterdError):
    """The address cannot be listened on: in use, not this machine's, or not an address."""


def check_exposure(settings: Settings) -> None:
    """Raises: ExposedError for an address that is not this machine's own, unless `--insecure` says it is meant."""
    if settings.insecure or settings.host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ExposedError(
            f"--host {settings.host} is reachable from other machines and requests need no key; "
            "bind 127.0.0.1 (the default) behind your own gateway, or say --insecure"
        )


def lifespan(engine: Engine, readiness: Readiness, store: Store) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Starts the engine with the app, sweeps the store while it runs, and stops both after the last request."""

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        sweep = asyncio.create_task(_sweep(store))
        readiness.ready()
        yield
        readiness.stopped()
        sweep.cancel()
        engine.stop()
        store.close()

    return run


async def _sweep(store: Store) -> None:
    """Remove what deleted adapters left behind, long after the last request that could still load them."""
    while True:
        await asyncio.sleep(_SWEEP_EVERY)
        try:
            collected = await to_thread.run_sync(store.gc, _SWEEP_GRACE)
            log.info("swept the store", collected=str(collected))
        except StoreError:
            log.exception("the store could not be swept")


class DrainingServer(uvicorn.Server):
    """uvicorn, except that the first SIGTERM or SIGINT drains and a second one ends the drain."""

    def __init__(self, config: uvicorn.Config, engine: Engine, readiness: Readiness, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._readiness = readiness
        self._drain_seconds = drain_seconds
        self._draining = False
        self._hurry = threading.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. Not passed on to uvicorn: it would end the process with the signal instead of status 0."""
        if self._draining:  # uvicorn's `force_exit` would leave the engine in the middle of a step, and the exit would abort
            self._hurry.set()
            return
        self._draining = True
        self._readiness.draining()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        log.info("draining", seconds=self._drain_seconds, requests=self._engine.pending)
        deadline = time.monotonic() + self._drain_seconds
        while self._engine.pending and time.monotonic() < deadline and not self._hurry.wait(_POLL):
            pass
        if self._engine.pending:
            log.warning("drain time is over", requests=self._engine.pending)
        self._engine.stop()
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """The address, taken but not listened on yet: whoever connects before `serve` is refused. Raises: AddressError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from error
    return listener


def serve(
    app: FastAPI,
    engine: Engine,
    readiness: Readiness,
    listener: socket.socket,
    drain_seconds: float,
    started: Callable[[str], None],
) -> None:
    """Listen until told to stop. `started` is called with the server's URL once connections are taken.

    Raises: AddressError when another process began to listen on the address after `bind`.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS,
        h11_max_incomplete_event_size=1 << 16,
    )
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
    except OSError as error:
        raise _refused(host, port, error) from error
    started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    DrainingServer(config, engine, readiness, drain_seconds).run(sockets=[listener])


def _refused(host: str, port: int, error: OSError) -> AddressError:
    return AddressError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}")
