"""Promise 8: logs carry tenant, adapter and request id; never prompts, tokens, keys, file contents or an upload's paths.
A 500 is opaque and has the request id.

Tracebacks: `tests/test_logs.py`; forged lines: `tests/security/test_names.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.e2e.uploads import lora, packed, tensors
from tests.house import Caller, House
from tests.logged import logged
from tests.security.contents import CONFIG, CONTENTS, WEIGHTS

SECRET = "xyzzy-secret"  # in everything that a client sends and no log may hold


def hostile_session(caller: Caller) -> list[str]:
    """Sound and broken requests with the secret in every place; returns the texts that were generated."""
    caller.upload("logged", lora(81))
    caller.upload("logged-broken", CONTENTS["overflowing lora"])
    answers = [
        caller.generate(SECRET, "logged", stop=[SECRET]),
        caller.generate(SECRET, "logged-broken"),
        caller.generate(SECRET, temperature=-1),
        caller.generate(SECRET, max_new_tokens=10**9),
        caller.post("/v1/chat/completions", {"model": "", "messages": [{"role": SECRET, "content": SECRET}], "max_tokens": 2}),
        caller.post("/v1/completions", {"model": "", "prompt": [SECRET, SECRET], "max_tokens": 2, "echo": True}),
        caller.post("/classify", {"inputs": SECRET}),
        caller.post("/embed", {"inputs": [SECRET]}),
        caller.post("/tokenize", {"inputs": SECRET}),
        caller.ask(
            "POST", "/generate", content=f'{{"inputs": "{SECRET}'.encode(), headers={"content-type": "application/json"}
        ),
        caller.upload("logged", {CONFIG: f'{{"peft_type": "LORA", "{SECRET}"'.encode(), WEIGHTS: SECRET.encode()}),
        caller.upload("logged", packed({f"{SECRET}.{name}": value for name, value in tensors(1).items()})),
        caller.upload("logged", {f"{SECRET}/{SECRET}.py": SECRET.encode()}),
        caller.ask("GET", "/info", headers={"authorization": f"Bearer {SECRET}"}),
        caller.ask("GET", "/info", headers={"authorization": f"Basic {SECRET}", "cookie": SECRET, "x-api-key": SECRET}),
    ]
    return [answer.json()["generated_text"] for answer in answers if "generated_text" in answer.text]


def test_logs_never_hold_prompts_tokens_keys_or_contents(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    caller = house.tenant("logged-tenant")
    key = caller.headers["authorization"].removeprefix("Bearer ")
    with logged(capsys):
        generated = hostile_session(caller)
    written = capsys.readouterr().err
    assert generated
    for forbidden in (SECRET, key, str(house.store_root), *(text for text in generated if len(text) > 3)):
        assert forbidden not in written
        assert json.dumps(forbidden)[1:-1] not in written


def test_every_request_and_management_action_has_a_line_with_its_ids(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    caller = house.tenant("audited")
    with logged(capsys):
        sent = [
            caller.upload("seen", lora(82), headers={"x-request-id": "up-1"}),
            caller.ask("POST", "/generate", json={"inputs": "a", "adapter_id": "seen"}, headers={"x-request-id": "gen-1"}),
            caller.delete("/adapters/seen", headers={"x-request-id": "del-1"}),
            caller.delete("/adapters/seen", headers={"x-request-id": "del-2"}),
        ]
    assert [answer.status_code for answer in sent] == [201, 200, 204, 404]
    lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for id in ("up-1", "gen-1", "del-1", "del-2"):
        assert [line for line in lines if line.get("request_id") == id and line.get("tenant") == "audited"], id


def test_a_500_is_opaque_and_names_the_request(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(house.server.app.state.services.store, "get_user", broken)
    client = TestClient(house.server.app, raise_server_exceptions=False)
    headers = {**house.tenant("unlucky").headers, "x-request-id": "mine-500"}
    response = client.get("/users/ann", headers=headers)
    assert response.status_code == 500
    assert response.json()["error_type"] == "internal"
    assert "mine-500" in response.json()["error"]
    assert SECRET not in response.text
    assert "Traceback" not in response.text
