"""`--metrics-port`: the metrics alone, on a listener of their own, for a scraper that has no key and reaches nothing else."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .metrics import Metrics

log = structlog.get_logger(__name__)

_LAST_WORDS = 1  # seconds for the last scrape to be answered


class MetricsPort:
    """Answers `GET /metrics` on a thread of its own while the context is open.

    Usage:
        with bind(settings.metrics_host, settings.metrics_port) as listener, MetricsPort(listener, metrics):
            ...
    """

    def __init__(self, listener: socket.socket, metrics: Metrics) -> None:
        """`listener` is bound."""
        self._listener = listener
        app = Starlette(routes=[Route("/metrics", _Scrape(metrics).answer)])
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._listener.listen()
        self._thread.start()
        host, port = self._listener.getsockname()[:2]
        log.info("metrics", url=f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except Exception:
            log.exception("the metrics listener ended")


class _Scrape:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def answer(self, request: Request) -> Response:
        """In a worker thread, as it is no coroutine."""
        body, content_type = self._metrics.render()
        return Response(body, headers={"content-type": content_type})
