"""Whether the server takes work, and what it answers to those who ask. Needs nothing that takes long to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from starlette.responses import JSONResponse, Response

from ..errors import UnavailableError

Phase = Literal["loading", "ready", "draining", "stopped"]
_UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}  # LoRAX's and TGI's words


class Readiness:
    """Which phase of its life the server is in; written by the lifespan, read by every request."""

    def __init__(self, phase: Phase = "ready") -> None:
        self.phase: Phase = phase
        self.percent = 100.0 if phase == "ready" else 0.0
        self._stalled: Callable[[], bool] = lambda: False

    def watch(self, stalled: Callable[[], bool]) -> None:
        """`stalled` says whether the engine has stopped coming round; asked each time that somebody asks here."""
        self._stalled = stalled

    def loading(self, percent: float) -> None:
        self.phase, self.percent = "loading", percent

    def ready(self) -> None:
        self.phase, self.percent = "ready", 100.0

    def draining(self) -> None:
        self.phase = "draining"

    def stopped(self) -> None:
        self.phase = "stopped"

    def require(self) -> None:
        """Raises: UnavailableError unless new work is welcome."""
        if self.phase != "ready":
            raise UnavailableError(f"the server is {self.phase}")

    def health(self) -> Response:
        """`GET /health`."""
        if self.phase != "ready" or self._stalled():
            return JSONResponse(_UNHEALTHY, UnavailableError.status)
        return JSONResponse({"status": "ok"})

    def alive(self) -> Response:
        """`GET /livez`: 503 asks whoever supervises the process to start it again."""
        return JSONResponse(_UNHEALTHY, UnavailableError.status) if self._stalled() else JSONResponse({"status": "ok"})

    def report(self) -> Response:
        """`GET /readyz`."""
        status = 200 if self.phase == "ready" and not self._stalled() else UnavailableError.status
        return JSONResponse({"phase": self.phase, "percent": round(self.percent, 1)}, status)
