"""Serving: one process from bind to exit, with a drain in between. Knows uvicorn and signals; no route, no model.

bind -> listen -> /livez 200, /readyz 503 with a percentage while the base is loaded -> open -> requests
SIGTERM -> readiness 503 -> running requests finish, at most `drain_seconds` -> the rest end with an error -> exit 0
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

import structlog
import uvicorn
from anyio import to_thread
from fastapi import FastAPI

from adapters_store.errors import StoreError
from adapters_store.store import Store

from .api.gate import Gate
from .api.readiness import Readiness
from .errors import AdapterdError
from .settings import Settings

if TYPE_CHECKING:  # it takes long to import, and the port is to open before
    from .engine.engine import Engine

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
    """Raises: ExposedError for an address that is not this machine's own, unless requests need a key or `--insecure` says it
    is meant.
    """
    if settings.require_keys or settings.insecure or settings.host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ExposedError(
            f"--host {settings.host} is reachable from other machines and requests need no key; "
            "say --require-keys, bind 127.0.0.1 (the default) behind your own gateway, or say --insecure"
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


class Front:
    """Listens and answers on a thread of its own from the first moment; `open` puts the application behind it.

    The main thread loads meanwhile, so that a signal ends a load at once; later it only waits for signals.

    Usage:
        with Front(listener, readiness) as front:
            server = assemble(...)
            front.open(server.app, server.engine, drain_seconds)
            front.wait()
    """

    def __init__(self, listener: socket.socket, readiness: Readiness) -> None:
        """`listener` is bound (see `bind`)."""
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._listener = listener
        self._readiness = readiness
        self._gate = Gate(readiness)
        self._server = uvicorn.Server(_config(self._gate))
        self._thread = threading.Thread(target=self._serve, name="http")
        self._failure: BaseException | None = None
        self._drain: Drain | None = None

    def __enter__(self) -> Self:
        """Begin to listen. Raises: AddressError when another process began to listen on the address after `bind`."""
        host, port = self._listener.getsockname()[:2]
        try:
            self._listener.listen(2048)
        except OSError as error:
            raise _refused(host, port, error) from error
        self._thread.start()
        while not self._gate.started.wait(_POLL):
            if not self._thread.is_alive():
                self.wait()
        log.info("listening", url=self.url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()

    def open(self, app: FastAPI, engine: Engine, drain_seconds: float) -> None:
        """Let requests through to `app`; from now on the first SIGTERM or SIGINT drains, and a second one ends the drain."""
        self._drain = Drain(engine, drain_seconds, self._end)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._gate.open(app)

    def wait(self) -> None:
        """Until the server has ended. Raises: what ended it, if nobody asked it to."""
        while self._thread.is_alive():
            self._thread.join(1)  # the handler of a signal that another thread was given runs within this time
        if self._failure is not None:
            raise self._failure

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._drain is not None:
            self._readiness.draining()
            self._drain.signalled()

    def _end(self) -> None:
        self._server.should_exit = True

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:
            self._failure = error


class Drain:
    """The end of a server: running requests finish, at most `seconds`, and a second signal ends the wait."""

    def __init__(self, engine: Engine, seconds: float, done: Callable[[], None]) -> None:
        """`done` is called when the engine has stopped."""
        self._engine = engine
        self._seconds = seconds
        self._done = done
        self._begun = False
        self._hurry = threading.Event()

    def signalled(self) -> None:
        """Returns at once. Never ends the process: the engine would be in the middle of a step, and the exit would abort."""
        if self._begun:
            self._hurry.set()
            return
        self._begun = True
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def _run(self) -> None:
        log.info("draining", seconds=self._seconds, requests=self._engine.pending)
        deadline = time.monotonic() + self._seconds
        while self._engine.pending and time.monotonic() < deadline and not self._hurry.wait(_POLL):
            pass
        if self._engine.pending:
            log.warning("drain time is over", requests=self._engine.pending)
        self._engine.stop()
        self._done()


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


def _config(app: Gate) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS,
        h11_max_incomplete_event_size=1 << 16,
    )


def _refused(host: str, port: int, error: OSError) -> AddressError:
    return AddressError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}")
