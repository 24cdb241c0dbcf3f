"""Promise 10: bound to this machine by default; elsewhere only with keys or `--insecure`; every route has its level.

The start of a real process: `tests/test_serving.py`.
"""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute

from server.api.auth import declared, level_of
from server.api.document import api_routes
from server.serving import ExposedError, check_exposure
from server.settings import Settings
from tests.house import Caller, House

#: What needs no key: is it alive, is it ready.
PUBLIC = {"/health", "/livez", "/readyz"}
#: What a tenant's key with every scope but admin must not reach.
OPERATORS = ("/admin", "/metrics", "/debug")


def routes(house: House) -> list[APIRoute]:
    found = [route for route in api_routes(house.server.app.routes) if route.include_in_schema]
    assert len(found) > 20
    return found


def plain(route: APIRoute) -> str:
    """An address of it."""
    return route.path_format.replace("{", "").replace("}", "")


def test_the_default_is_this_machine_and_any_other_address_needs_keys() -> None:
    assert Settings().host == "127.0.0.1"
    check_exposure(Settings())
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ExposedError, match="reachable from other machines"):
            check_exposure(Settings(host=host))
        check_exposure(Settings(host=host, require_keys=True))
        check_exposure(Settings(host=host, insecure=True))


def test_every_route_declares_its_level(house: House) -> None:
    assert [route.path for route in routes(house) if not declared(route.endpoint)] == []
    assert {route.path for route in routes(house) if level_of(route.endpoint).public} == PUBLIC


def test_every_route_but_the_public_ones_is_401_without_a_key(house: House) -> None:
    for route in routes(house):
        for method in route.methods:
            response = house.anyone.ask(method, plain(route))
            assert (response.status_code == 401) is (route.path not in PUBLIC), (method, route.path, response.status_code)


def test_operators_routes_are_403_for_a_tenants_key(house: House, acme: Caller) -> None:
    for route in routes(house):
        if route.path.startswith(OPERATORS):
            for method in route.methods:
                response = acme.ask(method, plain(route))
                assert response.status_code == 403, (method, route.path)


def test_a_key_that_may_infer_may_change_nothing(house: House) -> None:
    reader = house.tenant("read-only", "infer")
    assert reader.generate(max_new_tokens=1).status_code == 200
    assert reader.upload("x", {"a": b""}).status_code == 403
    assert reader.delete("/adapters/x").status_code == 403
    assert reader.put("/users/ann", {"adapter_id": "x"}).status_code == 403
