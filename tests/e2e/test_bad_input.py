"""Bad input over HTTP against a real server: each gets one clear answer, and the next good request is served as before."""

from __future__ import annotations

import io
import json
import pickle
import socket
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.uploads import HIDDEN, RANK, Files, lora, packed, tensors
from tests.process import ServerProcess, until

CONTEXT = 4096  # positions of the tiny base
GOOD = {"inputs": "hello world", "parameters": {"max_new_tokens": 5, "details": True, "ignore_eos_token": True}}


@pytest.fixture(scope="module")
def healthy_answer(tiny_server: ServerProcess) -> Any:
    return tiny_server.http.post("/generate", json=GOOD).json()


@pytest.fixture(autouse=True)
def _still_serving(tiny_server: ServerProcess, healthy_answer: Any) -> Iterator[None]:
    """After every test here: the same request gets the same answer, nothing hangs in the engine, nothing was logged."""
    errors = tiny_server.log.count('"level": "error"')
    yield
    assert tiny_server.http.post("/generate", json=GOOD).json()["generated_text"] == healthy_answer["generated_text"]
    until(tiny_server.idle)
    assert tiny_server.log.count('"level": "error"') == errors


def refusal(response: httpx.Response, status: int) -> tuple[str, str]:
    """(error, error_type) of a refusal with that status."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error", "error_type"}
    return body["error"], body["error_type"]


# -- requests


@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
def test_an_unknown_adapter(tiny_server: ServerProcess, route: str) -> None:
    response = tiny_server.http.post(route, json={"inputs": "hello", "parameters": {"adapter_id": "nobody"}})
    assert refusal(response, 404) == ("adapter 'nobody' does not exist", "not_found")


@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": "hello"', b"inputs=hello", b"\xff\xfe"])
def test_malformed_json(tiny_server: ServerProcess, body: bytes) -> None:
    response = tiny_server.http.post("/generate", content=body, headers={"content-type": "application/json"})
    message, kind = refusal(response, 400)
    assert message.startswith("the request body is not JSON: ")
    assert kind == "validation"


def test_deeply_nested_json(tiny_server: ServerProcess) -> None:
    body = b'{"inputs": ' + b"[" * 100_000
    response = tiny_server.http.post("/generate", content=body, headers={"content-type": "application/json"})
    message, _ = refusal(response, 400)
    assert message.startswith("the request body is not JSON: ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the request body must be an object. Given: []"),
        ({}, "`inputs` is required"),
        ({"inputs": 5}, "`inputs` must be a string. Given: 5"),
        ({"inputs": float("nan")}, "`inputs` must be a string. Given: NaN"),
        ({"inputs": None}, "`inputs` must be a string. Given: null"),
        ({"inputs": "hello", "parameters": 3}, "`parameters` must be an object. Given: 3"),
        ({"inputs": "hello", "parameters": {"max_new_tokens": "5"}}, '`max_new_tokens` must be an integer. Given: "5"'),
        ({"inputs": "hello", "parameters": {"stop": "x"}}, '`stop` must be a list. Given: "x"'),
        ({"inputs": "hello", "parameters": {"stop": [1]}}, "`stop[0]` must be a string. Given: 1"),
        ({"inputs": "hello", "parameters": {"do_sample": "yes"}}, '`do_sample` must be a boolean. Given: "yes"'),
        ({"inputs": "hello", "parameters": {"adapter_id": 7}}, "`adapter_id` must be a string. Given: 7"),
    ],
)
def test_wrong_types(tiny_server: ServerProcess, body: Any, message: str) -> None:
    headers = {"content-type": "application/json"}
    error, kind = refusal(tiny_server.http.post("/generate", content=json.dumps(body), headers=headers), 422)
    assert error == f"Input validation error: {message}"
    assert kind == "validation"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -1}, "`temperature` must be non-negative"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 1.5}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64. Given: -1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"best_of": 3}, "`best_of` must be > 0 and <= 1. Given: 3"),
        ({"truncate": 0}, f"`truncate` must be strictly positive and less than {CONTEXT}. Given: 0"),
        ({"return_k_alternatives": 1000}, "`return_k_alternatives` must be >= 0 and <= 20. Given: 1000"),
    ],
)
def test_parameters_out_of_range(tiny_server: ServerProcess, parameters: dict[str, Any], message: str) -> None:
    error, _ = refusal(tiny_server.http.post("/generate", json={"inputs": "hello", "parameters": parameters}), 422)
    assert error == f"Input validation error: {message}"


def test_a_prompt_longer_than_the_context_names_both_numbers(tiny_server: ServerProcess) -> None:
    """Each emoji is four tokens."""
    body = {"inputs": "\N{PILE OF POO}" * 1025, "parameters": {}}
    error, _ = refusal(tiny_server.http.post("/generate", json=body), 422)
    assert error == f"Input validation error: `inputs` must have less than {CONTEXT} tokens. Given: 4100"


def test_a_prompt_that_leaves_too_little_room_names_all_numbers(tiny_server: ServerProcess) -> None:
    body = {"inputs": "\N{PILE OF POO}" * 1020, "parameters": {"max_new_tokens": 100}}
    error, _ = refusal(tiny_server.http.post("/generate", json=body), 422)
    assert error == (
        f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {CONTEXT}. "
        "Given: 4080 `inputs` tokens and 100 `max_new_tokens`"
    )


def test_an_empty_prompt(tiny_server: ServerProcess) -> None:
    error, _ = refusal(tiny_server.http.post("/generate", json={"inputs": ""}), 422)
    assert error == "Input validation error: `inputs` cannot be empty"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_prompt_of_2_mb(tiny_server: ServerProcess, chunked: bool) -> None:
    body = json.dumps({"inputs": "x" * (2 << 20)}).encode()
    content: Any = iter([body[: 1 << 20], body[1 << 20 :]]) if chunked else body
    response = tiny_server.http.post("/generate", content=content, headers={"content-type": "application/json"})
    error, kind = refusal(response, 413)
    assert error.startswith(f"the request body may have {2 << 20} bytes, it has ")
    assert kind == "too_large"


# -- uploads


def zipped(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Trap:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (13,)


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SOUND = lora(1)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({CONFIG: SOUND[CONFIG], "adapter_model.bin": pickle.dumps(Trap())}, "adapter_model.bin"),
        ({CONFIG: SOUND[CONFIG], "adapter_model.pkl": pickle.dumps(Trap())}, "adapter_model.pkl"),
        ({CONFIG: SOUND[CONFIG], WEIGHTS: pickle.dumps(Trap())}, WEIGHTS),
        ({"adapter.zip": zipped(SOUND)}, "adapter.zip"),
        ({CONFIG: SOUND[CONFIG], WEIGHTS: zipped(SOUND)}, WEIGHTS),
        ({WEIGHTS: SOUND[WEIGHTS]}, CONFIG),
        ({CONFIG: SOUND[CONFIG]}, "safetensors"),
        ({CONFIG: b"{", WEIGHTS: SOUND[WEIGHTS]}, CONFIG),
        ({CONFIG: SOUND[CONFIG], WEIGHTS: b""}, WEIGHTS),
        ({CONFIG: SOUND[CONFIG], WEIGHTS: SOUND[WEIGHTS][:-1]}, WEIGHTS),
        ({CONFIG: SOUND[CONFIG], WEIGHTS: b"\xff" * 8 + SOUND[WEIGHTS]}, WEIGHTS),
        ({**SOUND, "../escape.json": b"{}"}, "../escape.json"),
        ({**SOUND, "run.py": b"print()"}, "run.py"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_files(tiny_server: ServerProcess, files: Files, named: str) -> None:
    error, _ = refusal(tiny_server.upload("refused", files), 422)
    assert named in error
    refusal(tiny_server.http.get("/adapters/refused"), 404)


def broken(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sound tensors but for the first layer's A or B."""
    names = {half: f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"}
    return tensors(1) | {names[half]: tensor for half, tensor in change.items()}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (packed(broken(A=torch.full((RANK, HIDDEN), torch.nan))), ["layers.0.self_attn.q_proj", "NaN or infinity"]),
        (packed(broken(B=torch.full((HIDDEN, RANK), torch.inf))), ["layers.0.self_attn.q_proj", "NaN or infinity"]),
        (packed(broken(A=torch.zeros(RANK, 7))), ["layers.0.self_attn.q_proj", "[4, 7]", "[4, 32]"]),
        (packed(broken(B=torch.zeros(HIDDEN, RANK, dtype=torch.int64))), ["layers.0.self_attn.q_proj", "I64"]),
        (packed({k.replace("layers.1", "layers.9"): v for k, v in tensors(1).items()}), ["layers.9.self_attn.q_proj", "llama"]),
        (packed({k.replace("q_proj", "c_attn"): v for k, v in tensors(1).items()}), ["target_modules", "c_attn"]),
        (packed(tensors(1), r=0), ["r", "0"]),
        (packed(tensors(1), r="four"), ["r", "four"]),
        (packed(tensors(1), peft_type="LOHA"), ["peft_type", "LOHA"]),
    ],
)
def test_adapters_that_do_not_fit(tiny_server: ServerProcess, files: Files, words: list[str]) -> None:
    error, kind = refusal(tiny_server.upload("refused", files), 422)
    assert [word for word in words if word not in error] == [], error
    assert kind == "adapter"
    refusal(tiny_server.http.get("/adapters/refused"), 404)


def test_an_adapter_of_another_base(tiny_server: ServerProcess) -> None:
    """The shapes say it: an adapter of a wider model fits nowhere."""
    wide = {k: torch.zeros(RANK, 64) if "lora_A" in k else torch.zeros(64, RANK) for k in tensors(1)}
    error, _ = refusal(tiny_server.upload("refused", packed(wide)), 422)
    assert "[4, 64]" in error
    assert "[4, 32]" in error


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 200, "a/versions"])
def test_names_that_no_adapter_may_have(tiny_server: ServerProcess, name: str) -> None:
    error, _ = refusal(tiny_server.upload(name, SOUND), 422)
    assert "`adapter_id`" in error


def test_an_upload_that_is_no_form(tiny_server: ServerProcess) -> None:
    refusal(tiny_server.http.post("/adapters", json={"adapter_id": "refused"}), 400)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refusal(tiny_server.http.post("/adapters", content=b"no form at all", headers=headers), 400)


def test_an_upload_larger_than_the_limit(tiny_server: ServerProcess) -> None:
    """Refused from its announced length, before a byte is stored."""
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(
            b"POST /adapters HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            b"content-length: 999999999999\r\n\r\n"
        )
        answer = connection.makefile("rb").readline()
    assert answer.split()[1] == b"413"


def test_an_upload_cut_off_in_the_middle(tiny_server: ServerProcess) -> None:
    """Nothing of it can be seen afterwards, on disk neither, and the same upload then works."""
    stored = tiny_server.stored()
    request = httpx.Request(
        "POST",
        f"{tiny_server.url}/adapters",
        data={"adapter_id": "cut"},
        files=[("files", (name, data)) for name, data in lora(2).items()],
    )
    body = request.read()
    head = f"POST /adapters HTTP/1.1\r\nhost: x\r\ncontent-type: {request.headers['content-type']}\r\n"
    for sent in (10, len(body) // 2, len(body) - 1):
        with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:sent])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        refusal(tiny_server.http.get("/adapters/cut"), 404)
    until(lambda: tiny_server.stored() == stored)
    assert tiny_server.upload("cut", lora(2)).status_code == 201
    assert tiny_server.generate(adapter="cut").status_code == 200
    assert tiny_server.http.delete("/adapters/cut").status_code == 204


def test_the_same_upload_twice_is_one_version(tiny_server: ServerProcess) -> None:
    first = tiny_server.upload("twice", lora(3))
    again = tiny_server.upload("twice", lora(3))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert len(tiny_server.http.get("/adapters/twice/versions").json()["adapters"]) == 1
    assert tiny_server.http.delete("/adapters/twice").status_code == 204


def test_no_such_route_and_no_such_method(tiny_server: ServerProcess) -> None:
    refusal(tiny_server.http.get("/nowhere"), 404)
    refusal(tiny_server.http.get("/generate"), 405)


def test_bytes_that_are_no_http(tiny_server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n")
        assert connection.makefile("rb").readline().split()[1] == b"400"
