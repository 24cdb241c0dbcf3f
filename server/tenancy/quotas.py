"""Admission: which requests are let into the engine, and what each tenant has in it. Decides before any work is done.

Owns the counts of running and waiting requests, of all and per tenant, the buckets of tokens per minute, and who has waited
too long. Constant time per request, whatever the number of tenants. Knows no engine, no adapter and no tensor.

    admit --> waiting --begun--> running --ended--> forgotten, unused tokens given back
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock

from ..errors import ConflictError, OverloadedError, QuotaError
from ..requests import Request
from .policy import OPEN, TenantPolicy
from .rates import MINUTE, DrainRate, TokenBucket, bounded, retry_after


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The server's own limits; a tenant's policy may set lower ones, or another share of the queue."""

    max_running: int  # requests in the batch
    max_waiting: int  # requests in the queue, of all tenants
    max_waiting_per_tenant: int | None = None  # of one tenant whose policy does not say; None = as many as of all
    queue_timeout: float | None = None  # seconds from arrival within which a request must have begun; None = no limit


@dataclass(slots=True)
class _Tenant:
    """What one tenant has in the engine. Invariant: 0 <= begun <= pending."""

    drain: DrainRate
    policy: TenantPolicy = OPEN
    bucket: TokenBucket | None = None
    pending: int = 0  # accepted and not ended
    begun: int = 0  # of these, how many have been computed on
    idle_since: float = 0.0

    @property
    def waiting(self) -> int:
        return self.pending - self.begun


@dataclass(slots=True)
class _Ticket:
    """One accepted request."""

    tenant: str
    charged: int  # tokens taken from its tenant's bucket
    begun: bool = False


class Admission:
    """Invariant: every request that `admit` let in counts until `ended`, once; the tenants' counts add up to the totals.

    Any thread may call any method.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = Lock()
        self._drain = DrainRate(clock())
        self._tickets: dict[str, _Ticket] = {}
        self._queue: OrderedDict[str, float] = OrderedDict()  # waiting ids -> by when they must have begun; oldest first
        self._tenants: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # tenants without requests, longest idle first

    @property
    def pending(self) -> int:
        """Accepted requests that have not ended yet."""
        with self._lock:
            return len(self._tickets)

    def admit(self, request: Request) -> None:
        """Count a request in.

        Raises: OverloadedError naming the limit that is reached, with the time after which it should not be; QuotaError
            when its tenant's policy can never let it run; ConflictError when its id is counted already.
        """
        with self._tenant_of(request) as (tenant, now):
            if request.id in self._tickets:
                raise ConflictError(f"request {request.id} is accepted already")
            self._check_queue(now)
            self._check_share(tenant, now)
            charged = self._charge(tenant, request, now)
            self._count_in(tenant, now)
            self._tickets[request.id] = _Ticket(request.tenant, charged)
            self._queue[request.id] = now + (self.limits.queue_timeout or math.inf)

    def begun(self, request_ids: Iterable[str]) -> None:
        """The first tokens of these are computed; ids that had begun, or that are unknown, are ignored."""
        with self._lock:
            for request_id in request_ids:
                if self._queue.pop(request_id, None) is not None:
                    ticket = self._tickets[request_id]
                    ticket.begun = True
                    self._tenants[ticket.tenant].begun += 1

    def ended(self, request_id: str, computed: int) -> None:
        """Count a request out; of what it was charged, all but `computed` tokens are given back. Unknown ids are ignored."""
        with self._lock:
            ticket = self._tickets.pop(request_id, None)
            if ticket is None:
                return
            now, tenant = self._clock(), self._tenants[ticket.tenant]
            self._queue.pop(request_id, None)
            tenant.pending -= 1
            tenant.begun -= ticket.begun
            if tenant.bucket is not None:
                tenant.bucket.give_back(max(0, ticket.charged - computed), now)
            if ticket.begun:  # what was ended in the queue drained nothing
                self._drain.ended(now)
                tenant.drain.ended(now)
            if not tenant.pending:
                tenant.idle_since = now
                self._idle[ticket.tenant] = None

    def overdue(self) -> list[tuple[str, OverloadedError]]:
        """Requests that have waited longer than they may, and what each is to be told. They count until `ended`."""
        timeout = self.limits.queue_timeout
        if timeout is None:
            return []
        with self._lock:
            now = self._clock()
            late = takewhile(lambda item: item[1] <= now, self._queue.items())
            return [(request_id, self._too_late(timeout, now)) for request_id, _ in late]

    def waiting(self) -> dict[str, int]:
        """Waiting requests of each tenant that has any."""
        with self._lock:
            return {name: tenant.waiting for name, tenant in self._tenants.items() if tenant.waiting}

    def check(self) -> None:
        """Raises: RuntimeError when the counts contradict each other."""
        with self._lock:
            if sum(tenant.pending for tenant in self._tenants.values()) != len(self._tickets):
                raise RuntimeError("the tenants' requests do not add up to all that were accepted")
            if any(not 0 <= tenant.begun <= tenant.pending for tenant in self._tenants.values()):
                raise RuntimeError("a tenant's running requests are more than it has, or fewer than none")

    # -- with the lock held ------------------------------------------------------------------------------------------

    @contextmanager
    def _tenant_of(self, request: Request) -> Iterator[tuple[_Tenant, float]]:
        """The request's tenant under its newest policy, and the time. A tenant left without requests is idle again."""
        with self._lock:
            now, name = self._clock(), request.tenant
            self._forget_idle(now)
            tenant = self._tenants.get(name)
            if tenant is None:
                tenant = self._tenants[name] = _Tenant(DrainRate(now))
            self._idle.pop(name, None)
            _adopt(tenant, request.policy, now)
            try:
                yield tenant, now
            finally:
                if not tenant.pending:
                    tenant.idle_since = now
                    self._idle[name] = None

    def _count_in(self, tenant: _Tenant, now: float) -> None:
        """Times without requests are no part of a drain rate."""
        if not self._tickets:
            self._drain.idle_until(now)
        if not tenant.pending:
            tenant.drain.idle_until(now)
        tenant.pending += 1

    def _forget_idle(self, now: float) -> None:
        """Drop tenants that have had no request for a minute: a bucket that nobody uses is full by then."""
        while self._idle:
            name = next(iter(self._idle))
            if now - self._tenants[name].idle_since < MINUTE:
                return
            del self._idle[name], self._tenants[name]

    def _check_queue(self, now: float) -> None:
        limits, pending = self.limits, len(self._tickets)
        if pending >= limits.max_running + limits.max_waiting:
            wait = retry_after(len(self._queue), self._drain.per_second(now))
            allowed = f"max_running {limits.max_running} and max_waiting {limits.max_waiting} allow"
            raise _overloaded(f"{pending} requests are accepted, the most that {allowed}", wait, "max_waiting")

    def _check_share(self, tenant: _Tenant, now: float) -> None:
        """A tenant may wait with `max_queued` requests beyond those for which the batch has room now."""
        if tenant.policy.max_running == 0:
            raise QuotaError("max_running is 0: no request of yours can run", "max_running")
        name, most = self._share(tenant.policy)
        if tenant.waiting < most + self._room(tenant):
            return
        own = tenant.drain.per_second(now)
        wait = retry_after(tenant.waiting, own or self._drain.per_second(now))
        raise _overloaded(f"{tenant.waiting} of your requests are waiting, {name} is {most}", wait, name)

    def _share(self, policy: TenantPolicy) -> tuple[str, int]:
        """(the limit's name, its value) of one tenant's part of the queue."""
        if policy.max_queued is not None:
            return "max_queued", policy.max_queued
        share = self.limits.max_waiting_per_tenant
        return "max_waiting_per_tenant", self.limits.max_waiting if share is None else share

    def _room(self, tenant: _Tenant) -> int:
        """Requests of this tenant that the batch could begin at once."""
        places = self.limits.max_running - (len(self._tickets) - len(self._queue))
        most = tenant.policy.max_running
        return max(0, places if most is None else min(places, most - tenant.begun))

    def _charge(self, tenant: _Tenant, request: Request, now: float) -> int:
        """Take the most that the request may cost from its tenant's bucket, if there is one."""
        if tenant.bucket is None:
            return 0
        cost, most = len(request.prompt) + request.sampling.max_new_tokens, tenant.bucket.per_minute
        if cost > most:
            raise QuotaError(
                f"tokens_per_minute is {most}: a request of {len(request.prompt)} prompt tokens and up to "
                f"{request.sampling.max_new_tokens} new ones can never pass",
                "tokens_per_minute",
            )
        wait = tenant.bucket.wait(cost, now)
        if wait > 0:
            left = int(tenant.bucket.level(now))
            told = f"tokens_per_minute is {most}: {left} tokens are left, the request may take {cost}"
            raise OverloadedError(told, bounded(wait), "tokens_per_minute")
        tenant.bucket.take(cost, now)
        return cost

    def _too_late(self, timeout: float, now: float) -> OverloadedError:
        wait = retry_after(len(self._queue), self._drain.per_second(now))
        return _overloaded(f"not begun within queue_timeout of {timeout:g} seconds", wait, "queue_timeout")


def _overloaded(reason: str, wait: float, limit: str) -> OverloadedError:
    """LoRAX's words, then ours."""
    return OverloadedError(f"Model is overloaded: {reason}", wait, limit)


def _adopt(tenant: _Tenant, policy: TenantPolicy, now: float) -> None:
    """The newest policy counts, also for requests that are charged already."""
    rate = policy.tokens_per_minute
    if rate is None:
        tenant.bucket = None
    elif tenant.bucket is None:
        tenant.bucket = TokenBucket(rate, now)
    elif tenant.bucket.per_minute != rate:
        tenant.bucket.resize(rate, now)
    tenant.policy = policy
