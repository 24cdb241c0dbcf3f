"""The audit trail: one structured log line for every request that changes something or is answered by the model.

Owns what such a line holds: who, what, on which adapter, how much, how long, how it ended. Never content, a key or a path.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import uuid4

import structlog

_log = structlog.get_logger("adapterd.audit")

SUCCESS = "success"
_NAME = re.compile(r"[A-Za-z0-9._:/+@-]{1,128}")  # what may be called anything at all; other text is content, not a name


@dataclass(slots=True)
class Trail:
    """One HTTP request, filled in by whoever knows: who asks, what about, what the engine did, how it ended.

    Invariant: `close` writes at most one line, and none for a request without an action. Times are seconds.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    action: str | None = None  # None: a request that only looks
    tenant: str | None = None
    key_id: str | None = None
    outcome: str | None = None
    facts: dict[str, object] = field(default_factory=dict)
    runs: int = 0  # of the engine: choices, texts
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue: float | None = None  # the longest of its runs
    first_token: float | None = None  # the earliest of its runs

    def new_run(self) -> str:
        """An id for one run of the engine: no other has it, and whoever reads it knows the request."""
        return f"{self.request_id}.{uuid4().hex}"

    def who(self, tenant: str, key_id: str | None) -> None:
        self.tenant, self.key_id = tenant, key_id

    def about(self, *, adapters: Iterable[str] = (), digests: Iterable[str] = (), **names: str | int | bool | None) -> None:
        """What the request is about: names and ids, as a client spelled them; None says nothing."""
        found: dict[str, object] = {what: _shown(name) for what, name in names.items() if name is not None}
        if named := [_shown(adapter) for adapter in adapters]:
            found["adapters"] = named
        if known := sorted({digest[:12] for digest in digests}):
            found["digests"] = known
        self.facts |= found

    def waited(self, queue: float) -> None:
        self.queue = queue if self.queue is None else max(self.queue, queue)

    def began(self, first_token: float) -> None:
        self.first_token = first_token if self.first_token is None else min(self.first_token, first_token)

    def ran(self, outcome: str, prompt: int, cached: int, generated: int) -> None:
        """One run of the engine has ended, after so many tokens."""
        self.runs += 1
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.generated_tokens += generated
        self.ended(outcome)

    def ended(self, outcome: str) -> None:
        """`outcome` is success, cancelled, timeout or an error's `error_type`; the first that is not success stands."""
        if self.outcome in (None, SUCCESS):
            self.outcome = outcome

    def close(self, status: int | None) -> None:
        """The answer is out, with this HTTP status; None when nobody was there to take it."""
        if self.action is None:
            return
        failed = "cancelled" if status is None else SUCCESS if status < 400 else "error"
        _log.info(
            "audit",
            action=self.action,
            outcome=self.outcome or failed,
            status=status,
            request_id=self.request_id,
            tenant=self.tenant,
            key_id=self.key_id,
            **self.facts,
            **self._work(),
            seconds=round(time.monotonic() - self.started, 6),
        )
        self.action = None

    def _work(self) -> dict[str, object]:
        if not self.runs:
            return {}
        times = {"queue_seconds": self.queue, "first_token_seconds": self.first_token}
        return {
            "runs": self.runs,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            **{name: round(seconds, 6) for name, seconds in times.items() if seconds is not None},
        }


def _shown(name: str | int | bool) -> str | int | bool:
    return name if not isinstance(name, str) or _NAME.fullmatch(name) else "?"
