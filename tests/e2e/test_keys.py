"""Keys and tenants on a real server: strangers let in, kept apart, and turned away."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import Serve
from tests.e2e.uploads import lora
from tests.process import DEADLINE, ServerProcess, run, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "store"


@pytest.fixture(scope="module")
def server(serve: Serve, tiny_base: Path, store: Path) -> ServerProcess:
    """Reachable from anywhere, which is allowed because it asks for keys."""
    flags = ("--require-keys", "--host", "0.0.0.0", "--metrics-port", "0", "--log-format", "json", "--store", str(store))
    return serve("--model", str(tiny_base), *flags)


def key(store: Path, tenant: str, *scopes: str) -> str:
    """A new one, by the command that an operator uses beside the running server."""
    made = run("keys", "create", "--tenant", tenant, "--scopes", ",".join(scopes), "--store", str(store))
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()[-1]


def client(server: ServerProcess, text: str | None = None) -> httpx.Client:
    headers = {} if text is None else {"authorization": f"Bearer {text}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=DEADLINE, headers=headers)


def upload(http: httpx.Client, name: str, seed: int, **params: str) -> httpx.Response:
    parts = [("files", (file, data, "application/octet-stream")) for file, data in lora(seed).items()]
    return http.post("/adapters", data={"adapter_id": name}, files=parts, params=params)


def test_two_tenants_and_an_operator(server: ServerProcess, store: Path) -> None:
    acme, zeta = (client(server, key(store, tenant, "infer", "adapters")) for tenant in ("acme", "zeta"))
    operator, nobody = client(server, key(store, "ops", "admin")), client(server)
    with acme, zeta, operator, nobody:
        assert nobody.post("/generate", json={"inputs": "hello"}).status_code == 401
        assert nobody.get("/health").status_code == 200
        assert upload(acme, "mine", 1).status_code == 201
        assert upload(operator, "polite", 2, shared="true").status_code == 201
        assert upload(zeta, "polite", 3, shared="true").status_code == 403

        asked = {"inputs": "hello", "parameters": {"adapter_id": "mine", "max_new_tokens": 2}}
        assert acme.post("/generate", json=asked).status_code == 200
        foreign = zeta.post("/generate", json=asked, headers={"x-tenant": "acme", "x-user-id": "acme"})
        assert (foreign.status_code, foreign.json()["error"]) == (404, "adapter 'mine' does not exist")
        for http in (acme, zeta):
            answer = http.post(
                "/generate", json={"inputs": "hello", "parameters": {"adapter_id": "polite", "max_new_tokens": 2}}
            )
            assert answer.status_code == 200
        assert [model["id"] for model in zeta.get("/v1/models").json()["data"]][1:] == ["polite"]


def test_openais_client_has_a_key(server: ServerProcess, store: Path) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key=key(store, "acme", "infer"), max_retries=0) as known:
        assert known.completions.create(model="", prompt="hello", max_tokens=2).choices[0].finish_reason == "length"
    with (
        openai.OpenAI(base_url=url, api_key="sk-nonsense", max_retries=0) as unknown,
        pytest.raises(openai.AuthenticationError),
    ):
        unknown.models.list()


def test_a_revoked_key_stops_working_in_a_process_that_was_not_told(server: ServerProcess, store: Path) -> None:
    text = key(store, "leaver", "infer")
    with client(server, text) as http:
        assert http.get("/adapters").status_code == 200
        assert run("keys", "revoke", text.split("_")[1], "--store", str(store)).returncode == 0
        assert until(lambda: http.get("/adapters").status_code == 401)


def test_the_metrics_have_a_port_of_their_own(server: ServerProcess) -> None:
    url = re.search(r'"url": "(http://127\.0\.0\.1:\d+)/metrics"', server.log)
    assert url is not None
    assert "adapterd_requests_total" in httpx.get(f"{url[1]}/metrics").text
    assert httpx.get(f"{url[1]}/adapters").status_code == 404
    with client(server) as nobody:
        assert nobody.get("/metrics").status_code == 401


def test_the_log_has_an_audit_trail_and_no_key(server: ServerProcess, store: Path) -> None:
    text = key(store, "audited", "infer")
    with client(server, text) as http:
        prompt = "a prompt that nobody else should read"
        http.post("/generate", json={"inputs": prompt, "parameters": {"max_new_tokens": 2}}, headers={"x-request-id": "seen"})

    def line() -> dict[str, object] | None:
        found = [json.loads(line) for line in server.log.splitlines() if '"audit"' in line and '"seen"' in line]
        return found[0] if found else None

    said = until(line)
    assert said is not None
    assert (said["action"], said["tenant"], said["key_id"], said["generated_tokens"]) == (
        "generate",
        "audited",
        text.split("_")[1],
        2,
    )
    assert prompt not in server.log
    assert text not in server.log
    assert "adk_" not in server.log
