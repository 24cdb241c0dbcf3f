"""What every request gets, whoever answers it."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from server.api.scope import RequestScope


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError("secret")


async def broken_midway(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise KeyError("secret")


def client(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(RequestScope(app)), base_url="http://test")  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False), ("", False)])
async def test_a_stray_exception_is_an_answer_with_a_request_id(given: str, kept: bool) -> None:
    response = await client(broken).get("/", headers={"x-request-id": given})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert (response.headers["x-request-id"] == given) is kept


async def test_an_answer_that_has_begun_cannot_be_taken_back() -> None:
    with pytest.raises(KeyError):
        await client(broken_midway).get("/")
