"""Two server processes, one PostgreSQL, one S3: what is done on one is there on the other with the next request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.conftest import Serve
from tests.e2e.test_lifecycle import LONG, tokens, tokens_of
from tests.e2e.uploads import lora
from tests.process import ServerProcess, run, streaming
from tests.servers import PostgreSQL, SeaweedFS

pytestmark = pytest.mark.slow

PASSWORD = "correct-horse"  # the server trusts everybody; it stands in the URL for the sake of the logs


@pytest.fixture(scope="module")
def s3_server() -> Iterator[SeaweedFS]:
    """One of this module's own: it is stopped under the servers in the end."""
    with servers.seaweedfs() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def flags(s3_server: SeaweedFS, postgresql: PostgreSQL, tiny_base: Path) -> tuple[str, ...]:
    catalog = postgresql.database().replace("postgres:@", f"postgres:{PASSWORD}@")
    return ("--model", str(tiny_base), "--catalog-url", catalog, "--blobs-url", s3_server.place())


@pytest.fixture(scope="module")
def pair(serve: Serve, flags: tuple[str, ...]) -> tuple[ServerProcess, ServerProcess]:
    return serve(*flags), serve(*flags)


def test_what_one_does_the_other_serves(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """No waiting anywhere: the very next request must see it."""
    here, there = pair
    assert here.upload("news", lora(30)).json()["version"] == 1
    first = tokens(here, "news", 20)
    assert tokens(there, "news", 20) == first
    assert there.upload("news", lora(31)).json()["version"] == 2
    second = tokens(there, "news", 20)
    assert tokens(here, "news", 20) == second != first
    assert here.http.put("/users/ann", json={"adapter_id": "news"}).status_code == 200
    bound = there.http.post("/generate", json={"inputs": "hello", "user_id": "ann", "parameters": {"max_new_tokens": 20}})
    named = there.http.post("/generate", json={"inputs": "hello", "adapter_id": "news", "parameters": {"max_new_tokens": 20}})
    assert bound.json() == named.json()
    assert here.http.delete("/adapters/news").status_code == 204
    assert there.generate(adapter="news").status_code == 404
    assert there.http.get("/adapters").json()["adapters"] == []
    assert there.upload("news", lora(32)).json()["version"] == 3


def test_a_delete_elsewhere_leaves_a_running_request_alone(pair: tuple[ServerProcess, ServerProcess]) -> None:
    here, there = pair
    here.upload("doomed", lora(33))
    alone = tokens(there, "doomed", LONG)
    with streaming(there, adapter_id="doomed", max_new_tokens=LONG) as events:
        first = tokens_of(iter([next(events)]))
        assert here.http.delete("/adapters/doomed").status_code == 204
        assert there.generate(adapter="doomed").status_code == 404
        assert first + tokens_of(events) == alone


def test_a_command_works_on_the_same_store(flags: tuple[str, ...], tmp_path: Path) -> None:
    variables = {"ADAPTERD_CATALOG_URL": flags[3], "ADAPTERD_BLOBS_URL": flags[5], "ADAPTERD_STORE": str(tmp_path / "store")}
    done = run("store", "verify", **variables)
    assert (done.returncode, done.stdout.split(",")[1]) == (0, " no damage\n"), done.stderr


def test_without_s3_what_was_loaded_goes_on_and_the_rest_is_refused(
    pair: tuple[ServerProcess, ServerProcess], s3_server: SeaweedFS
) -> None:
    here, there = pair
    here.upload("warm", lora(34))
    here.upload("cold", lora(35))
    before = tokens(there, "warm", 20)
    s3_server.stop()
    assert tokens(there, "warm", 20) == before
    assert there.http.post("/adapters/warm/unload").json()["state"] == "stored"
    assert tokens(there, "warm", 20) == before  # from the local copy
    assert there.generate(adapter="cold").status_code in (424, 503)
    assert tokens(here, "cold", 20)  # who uploaded it has it
    refused = here.upload("new", lora(36))
    assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
    assert there.generate(adapter="new").status_code == 404
    assert there.generate().status_code == 200


def test_no_log_holds_a_password_or_a_key(pair: tuple[ServerProcess, ServerProcess], s3_server: SeaweedFS) -> None:
    """The last test: after everything above, failures included."""
    for server in pair:
        assert server.log
        assert not [word for word in (PASSWORD, *s3_server.keys[1:]) if word in server.log]
