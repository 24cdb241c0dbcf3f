"""From bind to exit: real processes and real signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.serving import AddressError, ExposedError, bind, check_exposure
from server.settings import Settings
from tests.conftest import Serve
from tests.process import DEADLINE, ServerProcess, command, environment, run, streaming, until

LONG = 800  # tokens: a second or more on the tiny base
ENDLESS = 4000  # more than any test waits for


# -- addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machines_own_addresses_need_no_word(host: str) -> None:
    check_exposure(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_any_other_address_does(host: str) -> None:
    with pytest.raises(ExposedError, match=r"is reachable from other machines .* or say --insecure"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, insecure=True))
    check_exposure(Settings(host=host, require_keys=True))


def test_a_free_port_is_taken_for_0() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize(
    ("host", "why"), [("192.0.2.1", "Cannot assign requested address"), ("no such host", "Name or service not known")]
)
def test_an_address_that_cannot_be_had(host: str, why: str) -> None:
    with pytest.raises(AddressError, match=f"cannot listen on --host {host} --port 8080: {why}"):
        bind(host, 8080)


def test_a_server_on_every_address_refuses_to_start_without_keys() -> None:
    done = run("serve", "--host", "0.0.0.0", "--model", "/nonexistent")
    assert done.returncode == 1
    assert done.stderr == (
        "adapterd: --host 0.0.0.0 is reachable from other machines and requests need no key; "
        "say --require-keys, bind 127.0.0.1 (the default) behind your own gateway, or say --insecure\n"
    )


def test_a_port_in_use_is_found_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, "--model", "/nonexistent")
    assert done.returncode == 1
    assert done.stderr == f"adapterd: cannot listen on --host 127.0.0.1 --port {port}: Address already in use\n"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = run("serve", "--port", "0", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"adapterd: model directory {tmp_path} has no config.json (pickled weights, *.bin, are never loaded)"
    )


# -- the beginning


def test_a_server_answers_from_the_first_moment(tiny_base: Path, tmp_path: Path) -> None:
    """While it loads it lives, is not ready and takes no work; the URL it is reached under is in the log."""
    flags = ("--port", "0", "--log-format", "json", "--store", str(tmp_path / "store"), "--model", str(tiny_base))
    with subprocess.Popen(
        command("serve", *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        url = json.loads(next(line for line in process.stderr if '"listening"' in line))["url"]
        assert httpx.get(f"{url}/livez").json() == {"status": "ok"}
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()["phase"]) == (503, "loading"), "it loaded too fast for this test"
        refused = httpx.post(f"{url}/generate", json={"inputs": "hello"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert process.stdout.readline().endswith(f" on {url}\n")
        assert httpx.get(f"{url}/readyz").json() == {"phase": "ready", "percent": 100.0}
        assert httpx.post(f"{url}/generate", json={"inputs": "hello"}, timeout=DEADLINE).status_code == 200
        process.terminate()
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


# -- the end


@pytest.fixture
def server(serve: Serve, tiny_base: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with serve("--model", str(tiny_base), *request.param) as server:
        yield server


def events(lines: Iterator[str]) -> list[Any]:
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("server", [()], indirect=True)
def test_sigterm_lets_running_streams_finish(server: ServerProcess) -> None:
    """Readiness falls at once, on a connection that was open before too; new work is refused; the exit code is 0."""
    whole = server.generate(max_new_tokens=LONG, ignore_eos_token=True).json()["generated_text"]
    with streaming(server, max_new_tokens=LONG) as one, streaming(server, max_new_tokens=LONG) as two:
        next(one), next(two)
        assert server.http.get("/readyz").json() == {"phase": "ready", "percent": 100.0}
        server.terminate()
        until(lambda: server.http.get("/readyz").status_code == 503)
        assert server.http.get("/readyz").json()["phase"] == "draining"
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/livez").status_code == 200
        refused = server.generate()
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        assert server.engine()["running"] == 2, "the streams were over too soon for this test to say anything"
        for stream in (one, two):
            assert events(stream)[-1]["generated_text"] == whole
    assert server.exit_code() == 0
    assert '"level": "error"' not in server.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize("server", [("--drain-seconds", "0.2", "--max-running", "2")], indirect=True)
def test_sigterm_with_too_little_time_ends_the_rest_with_an_error(server: ServerProcess) -> None:
    """Everybody who was accepted gets an answer, those who still waited too, and the exit code is 0."""
    with streaming(server, max_new_tokens=ENDLESS) as one, streaming(server, max_new_tokens=ENDLESS) as two:
        next(one), next(two)
        with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as waiting:
            body = b'{"inputs": "hello"}'
            waiting.sendall(
                b"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            until(lambda: server.engine()["waiting"] == 1)
            server.terminate()
            for stream in (one, two):
                last = events(stream)[-1]
                assert last == {"error": "the server is shutting down", "error_type": "unavailable"}
            answer = waiting.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'{"error":"the server is shutting down","error_type":"unavailable"}' in answer
    assert server.exit_code() == 0
    assert '"level": "error"' not in server.log


@pytest.mark.parametrize("server", [()], indirect=True)
def test_a_second_signal_ends_the_drain(server: ServerProcess) -> None:
    with streaming(server, max_new_tokens=ENDLESS) as stream:
        next(stream)
        server.terminate()
        until(lambda: server.http.get("/readyz").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert events(stream)[-1] == {"error": "the server is shutting down", "error_type": "unavailable"}
    assert server.exit_code() == 0
    assert '"level": "error"' not in server.log


def test_sigterm_while_loading(tiny_base: Path, tmp_path: Path) -> None:
    """There is nothing to drain yet, and nothing has failed."""
    flags = ("--port", "0", "--log-format", "json", "--store", str(tmp_path / "store"), "--model", str(tiny_base))
    with subprocess.Popen(
        command("serve", *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: caught_by(process.pid, signal.SIGTERM))
        process.terminate()
        said, complained = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, complained
    assert "Traceback" not in complained
    assert said == "" or " serves " in said


def caught_by(pid: int, number: int) -> bool:
    """Whether the process has a handler for a signal, by what the kernel says."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
