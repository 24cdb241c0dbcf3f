"""Talking to a server: where it is, when there is none, and the key it is shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.commands.invoke import done
from tests.process import ServerProcess, run


def test_no_server_is_one_clear_line() -> None:
    said = run("adapters", "list", "--url", "http://127.0.0.1:1")
    assert said.returncode == 1
    assert said.stderr == "adapterd: http://127.0.0.1:1/adapters: [Errno 111] Connection refused\n"


def test_the_url_may_come_from_the_environment(tiny_server: ServerProcess) -> None:
    assert run("adapters", "list", ADAPTERD_URL=tiny_server.url).returncode == 0


def test_a_url_that_is_none() -> None:
    said = run("adapters", "list", "--url", "localhost")
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str | None]]]:
    """A server's URL, and the Authorization headers that it was sent."""
    seen: list[str | None] = []

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["authorization"])
            body = b'{"users": [], "next_cursor": null}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Listing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def test_the_key_is_shown_from_a_flag_or_the_environment(
    asked: tuple[str, list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = asked
    done("users", "list", "--url", url)
    done("users", "list", "--url", f"{url}/", "--api-key", "k1")
    monkeypatch.setenv("ADAPTERD_API_KEY", "k2")
    done("users", "list", "--url", url)
    assert seen == [None, "Bearer k1", "Bearer k2"]
