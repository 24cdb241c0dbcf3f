"""What every route needs, as one value. No route, no wire format."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Annotated

from fastapi import Depends, Request

from adapters_store.digest import Digest
from adapters_store.records import JSON
from adapters_store.store import Store

from ..engine.client import EngineClient
from ..metrics import Metrics
from ..model.text import Text
from .keyring import Keyring
from .readiness import Readiness
from .turns import Turns

#: Checks an upload's files against the base. The result is stored with the adapter and must hold "methods", a name per
#: part; "virtual_tokens" (int) counts the positions it puts in front of a text.
#: Raises: AdapterError naming the field or tensor at fault.
Validate = Callable[[Mapping[str, Path], Digest], Mapping[str, JSON]]


#: Told the name of each file that begins to arrive ("file" or "part/file"); the result is given the file's bytes in order,
#: before they are stored. Both raise AdapterError for what can be no file of an adapter.
Inspect = Callable[[str], Callable[[bytes], None]]


def anything(name: str) -> Callable[[bytes], None]:
    """Looks at no file."""
    return lambda data: None


class Names:
    """Which names a digest was asked for by, for metrics: the engine knows digests only. Bounded; any thread."""

    _DIGESTS = 4096

    def __init__(self) -> None:
        self._names: OrderedDict[Digest, str] = OrderedDict()
        self._lock = Lock()

    def note(self, digest: Digest, name: str) -> None:
        with self._lock:
            self._names[digest] = name
            self._names.move_to_end(digest)
            if len(self._names) > self._DIGESTS:
                self._names.popitem(last=False)

    def of(self, digests: Iterable[Digest]) -> list[str]:
        with self._lock:
            return sorted({self._names.get(digest, digest.short) for digest in digests})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; sizes in bytes."""

    max_total_tokens: int
    max_stop_sequences: int = 4
    max_top_n: int = 20
    max_request_bytes: int = 2 << 20
    max_upload_bytes: int = 256 << 20


@dataclass(frozen=True)
class Services:
    """Everything behind the routes. One per app."""

    client: EngineClient
    text: Text
    store: Store
    metrics: Metrics
    limits: Limits
    validate: Validate
    model_name: str
    default_tenant: str
    info: Mapping[str, JSON]
    inspect: Inspect = anything
    validating: Turns = field(default_factory=Turns)
    keyring: Keyring | None = None  # None: nobody needs a key, and everybody is `default_tenant`
    readiness: Readiness = field(default_factory=Readiness)
    names: Names = field(default_factory=Names)
    started_at: int = field(default_factory=lambda: int(time.time()))  # unix time, for OpenAI's `created`


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


# Dependencies are coroutines although they await nothing: FastAPI calls others on a thread, which costs more than they do.


async def _services(request: Request) -> Services:
    return services_of(request)


async def require_ready(request: Request) -> None:
    """A dependency of every route that starts work."""
    services_of(request).readiness.require()


Context = Annotated[Services, Depends(_services)]
