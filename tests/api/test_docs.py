"""The page for people needs nothing that this server does not serve."""

from __future__ import annotations

import re

from .conftest import World


async def test_the_page_and_all_it_loads_come_from_here(world: World) -> None:
    page = await world.http.get("/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href|url)(?:=|: )["\']([^"\']+)["\']', page.text)
    assert {"/openapi.json", "/docs/static/swagger-ui-bundle.js", "/docs/static/swagger-ui.css"} <= set(links)
    for link in links:
        assert link.startswith("/")
        found = await world.http.get(link)
        assert (found.status_code, len(found.content) > 1000) == (200, True)
    assert "http" not in re.sub(r"<!--.*?-->", "", page.text.replace("http-equiv", ""), flags=re.S)


async def test_there_is_one_page(world: World) -> None:
    assert (await world.http.get("/redoc")).status_code == 404
    assert (await world.http.get("/docs/static/../../app.py")).status_code == 404
