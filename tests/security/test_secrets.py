"""Keys: never echoed, never guessed from an answer or its time, never in an error, a log, a metric or the document."""

from __future__ import annotations

import ast
import inspect

import pytest

from adapters_store import keys
from server.api import auth, keyring
from tests.house import Caller

SECRET = "sk-xyzzy-0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": SECRET},
        {"authorization": f"Bearer {SECRET} {SECRET}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {SECRET * 2000}"},
        {"x-api-key": SECRET, "cookie": f"key={SECRET}", "proxy-authorization": SECRET},
    ],
    ids=lambda headers: next(iter(headers.values()))[:12],
)
@pytest.mark.parametrize("path", ["/info", "/generate", "/v1/models", "/admin/keys", f"/adapters/x?key={SECRET}"])
def test_secrets_are_not_echoed_in_errors(acme: Caller, headers: dict[str, str], path: str) -> None:
    response = acme.house.http.request("POST" if path == "/generate" else "GET", path, headers=headers)
    assert response.status_code == 401
    assert SECRET not in response.text
    assert SECRET not in str(response.headers)
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_two_keys_at_once_are_refused(acme: Caller) -> None:
    """A proxy may check the first and the server take the second."""
    key = acme.headers["authorization"]
    headers = [("authorization", f"Bearer {SECRET}"), ("authorization", key)]
    assert acme.house.http.request("GET", "/info", headers=headers).status_code == 401
    assert acme.house.http.request("GET", "/info", headers=headers[::-1]).status_code == 401


def test_keys_are_not_in_metrics_nor_in_the_document(acme: Caller) -> None:
    key = acme.headers["authorization"].removeprefix("Bearer ")
    body, _ = acme.house.server.metrics.render()
    assert key.encode() not in body
    assert key not in str(acme.house.server.app.openapi())
    assert key not in acme.get("/info").text


def test_timing_of_key_comparison_a_key_is_only_ever_compared_by_its_hash() -> None:
    """Found by its sha256, an equality of texts tells a guesser nothing about the key: no module compares the text itself."""
    for module in (auth, keyring, keys):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Compare) and any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops):
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                assert not names & {"key", "text", "given", "secret"} or "scheme" in names, ast.unparse(node)
    assert "sha256" in inspect.getsource(keys)
