"""Below the API: requests smuggled in headers, forms without end, and uploads that never finish, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.uploads import lora
from tests.process import ServerProcess, until

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
JSON = b'{"inputs": "a"}'
HEAD = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(autouse=True)
def _unharmed(tiny_server: ServerProcess) -> Iterator[None]:
    errors = tiny_server.log.count('"level": "error"')
    yield
    until(tiny_server.idle)
    assert tiny_server.generate().status_code == 200
    assert tiny_server.log.count('"level": "error"') == errors


def exchange(server: ServerProcess, sent: bytes) -> bytes:
    """Everything the server says until it closes the connection; our side of it is closed once all is sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(JSON), JSON)


@pytest.mark.parametrize(
    "request_",
    [
        b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n%s" % (len(CHUNKED + SMUGGLED), CHUNKED),
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED,
        b"content-length: %d\r\ncontent-length: 0\r\n\r\n%s" % (len(JSON), JSON),
        b"content-length: 0\r\ncontent-length: %d\r\n\r\n%s" % (len(JSON + SMUGGLED), JSON),
        b"content-length: +%d\r\n\r\n%s" % (len(JSON), JSON),
        b"content-length: -1\r\n\r\n" + JSON,
        b"content-length: 0x0f\r\n\r\n" + JSON,
        b"content-length: 18446744073709551631\r\n\r\n" + JSON,
        b"transfer-encoding: xchunked\r\n\r\n" + CHUNKED,
        b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKED,
        b"transfer-encoding: identity, chunked, chunked\r\n\r\n" + CHUNKED,
        b"transfer-encoding : chunked\r\n\r\n" + CHUNKED,
        b"transfer-encoding:\x0bchunked\r\n\r\n" + CHUNKED,
        b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + JSON,
        b"transfer-encoding: chunked\r\n\r\n-1\r\n" + JSON,
        b"x: a\r\n content-length: 999\r\ncontent-length: %d\r\n\r\n%s" % (len(JSON), JSON),
        b"x: a\x00b\r\ncontent-length: %d\r\n\r\n%s" % (len(JSON), JSON),
        b"x: a\nx-injected: b\r\ncontent-length: %d\r\n\r\n%s" % (len(JSON), JSON),
    ],
    ids=lambda sent: repr(sent.partition(b"\r\n\r\n")[0])[:60],
)
def test_header_smuggling_never_makes_two_requests_of_one(tiny_server: ServerProcess, request_: bytes) -> None:
    """Refused, or read so that what follows is the client's next request: never both a body and a request of its own."""
    said = exchange(tiny_server, HEAD + request_)
    assert said.count(b"HTTP/1.1 ") <= 1
    assert b" 5" not in said[:12]
    followed = exchange(tiny_server, HEAD + request_ + SMUGGLED)
    statuses = [part[:3] for part in followed.split(b"HTTP/1.1 ")[1:]]
    assert len(statuses) <= 2
    assert statuses[0] in (b"200", b"400", b"413", b"422")
    assert statuses[0] == b"200" or statuses[1:] == [], "after a refusal the connection is closed, not read on"


def test_headers_without_end_are_cut_off(tiny_server: ServerProcess) -> None:
    endless = b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"a" * (1 << 20)
    try:
        said = exchange(tiny_server, endless)
    except (ConnectionResetError, BrokenPipeError):
        said = b""
    assert b" 200 " not in said


def part(name: str, data: bytes, filename: str | None = None, *, more: bytes = b"") -> bytes:
    shown = f'; filename="{filename}"' if filename else ""
    return f'--x\r\ncontent-disposition: form-data; name="{name}"{shown}\r\n'.encode() + more + b"\r\n" + data + b"\r\n"


FORMS: dict[str, tuple[str, bytes]] = {
    "too many parts": ("boundary=x", part("files", b"1", "a.json") * 2000 + b"--x--\r\n"),
    "a header without end": ("boundary=x", part("files", b"1", "a.json", more=b"x: " + b"a" * 100_000 + b"\r\n")),
    "headers without number": ("boundary=x", part("files", b"1", "a.json", more=b"x: a\r\n" * 50_000)),
    "no boundary": ("", part("files", b"1", "a.json")),
    "an empty boundary": ("boundary=", b"--\r\n\r\n"),
    "a boundary of 60,000 bytes": (f"boundary={'x' * 60_000}", b"--x--"),
    "never its boundary": ("boundary=x", b"y" * 500_000),
    "no end": ("boundary=x", part("adapter_id", b"bomb") + part("files", b"1" * 1000, "adapter_config.json")),
    "a preamble without end": ("boundary=x", b"\r\n" * 200_000 + part("adapter_id", b"bomb")),
    "a form in a form": ("boundary=x", part("files", b"", more=b"content-type: multipart/mixed; boundary=y\r\n")),
    "two names": (
        "boundary=x",
        b'--x\r\ncontent-disposition: form-data; name="adapter_id"; name="files"\r\n\r\nb\r\n--x--\r\n',
    ),
    "an adapter_id of a megabyte": ("boundary=x", part("adapter_id", b"a" * (1 << 20)) + b"--x--\r\n"),
    "no disposition": ("boundary=x", b"--x\r\n\r\nhello\r\n--x--\r\n"),
    "base64": ("boundary=x", part("files", b"e30=", "adapter_config.json", more=b"content-transfer-encoding: base64\r\n")),
}


@pytest.mark.parametrize("name", FORMS)
def test_multipart_bombs_are_refused_and_leave_nothing(tiny_server: ServerProcess, name: str) -> None:
    """Parts without number, headers without end, boundaries that are missing or never come."""
    stored = tiny_server.stored()
    boundary, body = FORMS[name]
    headers = {"content-type": f"multipart/form-data; {boundary}" if boundary else "multipart/form-data"}
    response = tiny_server.http.post("/adapters", content=body, headers=headers)
    assert response.status_code in (400, 413, 422, 431), response.text
    until(lambda: tiny_server.stored() == stored)


def test_slow_loris_uploads_keep_nobody_from_being_served(tiny_server: ServerProcess) -> None:
    """Many uploads that stall in the middle hold a temporary file each, and no thread; when they go, so does the file."""
    stored = tiny_server.stored()
    begun = part("adapter_id", b"loris") + part("files", b"{", "adapter_config.json")[:-2]
    head = (
        b"POST /adapters HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\ncontent-length: 99999\r\n\r\n"
    )
    with ExitStack() as held:
        for _ in range(100):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", tiny_server.port), timeout=60))
            connection.sendall(head + begun)
        assert tiny_server.generate().status_code == 200
        assert tiny_server.upload("in-time", lora(61)).status_code == 201
        assert tiny_server.generate(adapter="in-time").status_code == 200
        assert tiny_server.http.delete("/adapters/in-time").status_code == 204
    until(lambda: not any("staging" in path for path in tiny_server.stored() - stored))


def test_slow_loris_headers_keep_nobody_from_being_served(tiny_server: ServerProcess) -> None:
    with ExitStack() as held:
        for _ in range(200):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", tiny_server.port), timeout=60))
            connection.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\nx: ")
        assert tiny_server.generate().status_code == 200
