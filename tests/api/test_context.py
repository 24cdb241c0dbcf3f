"""What routes depend on: a dependency that is no coroutine is called on a thread, which costs more than any of ours does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from fastapi.dependencies.models import Dependant

from server.api.document import api_routes
from tests.api.conftest import World


def calls_of(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    for each in dependant.dependencies:
        assert each.call is not None
        yield each.call
        yield from calls_of(each)


async def test_no_dependency_of_a_route_runs_on_a_thread(world: World) -> None:
    calls = {call for route in api_routes(world.app.routes) for call in calls_of(route.dependant)}
    assert {"authorize", "caller_of", "require_ready", "_services"} <= {call.__name__ for call in calls}
    assert [call.__name__ for call in calls if not inspect.iscoroutinefunction(call)] == []
