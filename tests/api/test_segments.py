"""A path that holds an odd id gets the answer of its route, never that of a path that is none."""

from __future__ import annotations

import pytest

from .conftest import World


@pytest.mark.parametrize("odd", ["a%0Ab", "%0A", "a%0D%0Ab/c", "a%E2%80%A8b"])
async def test_a_line_break_in_an_id_is_a_wrong_id_and_no_unknown_path(world: World, odd: str) -> None:
    tenant = await world.http.put(f"/admin/tenants/{odd}", json={"weight": 2})
    user = await world.http.put(f"/users/{odd}", json={"adapter_id": "a"})
    assert (tenant.status_code, tenant.json()["error_type"]) == (422, "validation"), tenant.text
    assert (user.status_code, user.json()["error_type"]) == (422, "validation"), user.text
    for path in (f"/adapters/{odd}", f"/users/{odd}", f"/admin/tenants/{odd}", f"/v1/models/{odd}"):
        response = await world.http.get(path)
        assert response.status_code in (404, 422), response.text
        assert "Not Found" not in response.text, path
