"""Requests that ask for too much, for what is not theirs, or for what no number is: refused before any engine work.

Each test is named after its CVE or the field that made the class known.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller
from tests.security.conftest import refusal
from tests.security.watch import watched

PROMPT = "the cat sat on the mat, how are you today? hello world"
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-400", "0", "-0.0", "-1", "1e308", "1e-300", "9" * 400)


def cached(caller: Caller, **more: Any) -> int:
    """How many of the prompt's tokens came from the prefix cache."""
    response = caller.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}, **more})
    assert response.status_code == 200, response.text
    return int(response.headers["x-cached-tokens"])


def generated(caller: Caller) -> float:
    """Tokens the engine has put through, ever."""
    body, _ = caller.house.server.metrics.render()
    (line,) = [line for line in body.decode().splitlines() if line.startswith("adapterd_step_tokens_sum ")]
    return float(line.split()[1])


def raw(caller: Caller, path: str, body: str) -> Any:
    return caller.ask("POST", path, content=body.encode(), headers={"content-type": "application/json"})


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "x"}, {"user_id": "ann"}])
def test_cve_2025_46570_no_prefix_of_another_tenant_is_reused_whatever_salt_is_sent(acme: Caller, salt: dict[str, Any]) -> None:
    """The time to a first token tells whether a guess at somebody's prompt was right, if blocks are shared."""
    zeta = acme.house.tenant(f"zeta-{len(salt)}-{next(iter(salt), '')}")
    cached(acme, **salt)
    assert cached(acme, **salt) > 0
    assert cached(zeta, **salt) == 0
    assert cached(zeta, **salt) > 0


@pytest.mark.parametrize(
    "name", ["http://169.254.169.254/x", "https://example.invalid/a", "file:///etc/passwd", "s3://a/b", "//host/x"]
)
@pytest.mark.parametrize("route", ["/generate", "/classify", "/embed", "/v1/completions"])
def test_ssrf_an_adapter_id_that_is_a_url_is_a_missing_name(acme: Caller, name: str, route: str) -> None:
    body = {"inputs": "hello", "adapter_id": name, "model": name, "prompt": "hello", "max_tokens": 1}
    with watched() as seen:
        refusal(acme.post(route, body), 404)
    assert seen.of("socket.connect") == seen.of("socket.getaddrinfo") == []
    assert [opened for opened in seen.of("open") if name in opened] == []


@pytest.mark.parametrize("source", ["hub", "s3", "local", "pbase"])
def test_ssrf_adapter_source_is_refused(acme: Caller, source: str) -> None:
    words = refusal(acme.generate(adapter="org/model", adapter_source=source))
    assert words == "Input validation error: `adapter_source` is not supported"


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/generate", {"parameters": {"best_of": 10**9}}),
        ("/generate", {"parameters": {"return_k_alternatives": 10**9}}),
        ("/generate", {"parameters": {"top_n_tokens": 2**63}}),
        ("/generate", {"parameters": {"max_new_tokens": 10**18}}),
        ("/generate", {"parameters": {"truncate": 10**18}}),
        ("/generate", {"parameters": {"stop": ["x"] * 10_000}}),
        ("/v1/completions", {"n": 10**9}),
        ("/v1/completions", {"best_of": 10**9}),
        ("/v1/completions", {"logprobs": 10**9}),
        ("/v1/completions", {"prompt": ["x"] * 10_000}),
        ("/v1/completions", {"prompt": [[1]] * 10_000}),
        ("/v1/completions", {"stop": ["x"] * 10_000}),
        ("/v1/chat/completions", {"n": 2**31}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 10**9}),
        ("/embed", {"inputs": ["x"] * 10_000}),
        ("/classify", {"inputs": ["x"] * 10_000}),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else value,
)
def test_huge_counts_are_refused_before_the_engine_hears_of_them(acme: Caller, route: str, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"inputs": "hello", "prompt": "hello", "model": "", "messages": messages, "max_tokens": 1, **fields}
    before = generated(acme)
    refusal(acme.post(route, body))
    assert generated(acme) == before


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "min_p", "top_k", "seed"]
)
def test_numbers_that_are_nan_or_infinite_or_extreme_break_only_their_request(acme: Caller, field: str) -> None:
    """min_p is no field here, and ignored like any other that is unknown."""
    for number in NUMBERS:
        for route, head in (
            ("/generate", '{"inputs": "hello", "parameters": {"max_new_tokens": 2, "do_sample": true, '),
            ("/v1/completions", '{"model": "", "prompt": "hello", "max_tokens": 2, "parameters": {}, '),
        ):
            tail = "}}" if route == "/generate" else "}"
            response = raw(acme, route, f'{head}"{field}": {number}{tail}')
            assert response.status_code in (200, 400, 422, 424), (number, response.text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_min_p_nan_and_temperature_inf_are_refused_by_name(acme: Caller, field: str, number: str) -> None:
    body = f'{{"inputs": "hello", "parameters": {{"max_new_tokens": 2, "{field}": {number}}}}}'
    assert field in refusal(raw(acme, "/generate", body), 400, 422)


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": {"type": "regex", "value": "((a+)+)+$"}},
        {"grammar": {"type": "json", "value": {"$ref": "#"}}},
        {"response_format": {"type": "json_object", "schema": {"$ref": "http://169.254.169.254/"}}},
        {"response_format": {"type": "regex", "value": "(.*)*" * 1000}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_regex_and_grammar_in_a_request_are_refused_unread(acme: Caller, fields: dict[str, Any]) -> None:
    with watched() as seen:
        assert "is not supported" in refusal(acme.generate(**fields))
        chat = {"model": "", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}
        assert acme.post("/v1/chat/completions", chat).status_code in (200, 422)  # `grammar` is none of OpenAI's fields
    assert seen.of("socket.connect") == seen.of("socket.getaddrinfo") == []


@pytest.mark.parametrize(
    "prompt", [[-1], [10**6], [2**31], [2**63], [10**30], [1, -5, 2], [[1], [-1]], [True], [1.5], [None], [[]], []]
)
def test_token_ids_out_of_range_are_refused_by_name(acme: Caller, prompt: list[Any]) -> None:
    """An id past the table reads memory that is somebody else's, or ends the process."""
    assert "prompt" in refusal(acme.post("/v1/completions", {"model": "", "prompt": prompt, "max_tokens": 1}))


@pytest.mark.parametrize("bias", [{"-1": 100}, {"999999999": 100}, {"1": 1e308}, {"x": 1}, {"1": 100}])
def test_logit_bias_out_of_range_is_refused(acme: Caller, bias: dict[str, float]) -> None:
    assert "logit_bias" in refusal(acme.post("/v1/completions", {"model": "", "prompt": "a", "logit_bias": bias}))


@pytest.mark.parametrize(
    "cursor", ["A" * 20_000, "=" * 50, base64.b64encode(b"\0" * 600).decode(), "%00", "../../etc/passwd", "1 OR 1=1", "\u202e"]
)
@pytest.mark.parametrize("route", ["/adapters", "/users"])
def test_base64_bombs_in_cursors_are_refused(acme: Caller, route: str, cursor: str) -> None:
    assert "cursor" in refusal(acme.get(route, params={"cursor": cursor}))


def test_base64_bombs_in_chat_content_are_never_decoded(acme: Caller) -> None:
    """An image by data URL or by address is no text; nothing fetches or inflates it."""
    for url in ("data:image/png;base64," + "A" * 1_000_000, "http://169.254.169.254/a.png"):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        with watched() as seen:
            words = refusal(
                acme.post("/v1/chat/completions", {"model": "", "messages": [{"role": "user", "content": content}]})
            )
        assert "may hold text only" in words
        assert len(words) < 300
        assert seen.of("socket.connect") == seen.of("socket.getaddrinfo") == []


@pytest.mark.parametrize("depth", [200, 5_000, 500_000])
def test_deep_json_in_a_request_is_refused(acme: Caller, depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = f'{{"inputs": "x", "parameters": {{"max_new_tokens": 1, "grammar": {opening * depth}1{closing * depth}}}}}'
        assert raw(acme, "/generate", body).status_code in (400, 413, 422)


def test_a_body_over_the_limit_is_refused_before_it_is_parsed(acme: Caller) -> None:
    refusal(raw(acme, "/generate", '{"inputs": "' + "x" * (3 << 20) + '"}'), 413)


@pytest.mark.parametrize(
    "body", ["\ufeff{}", '{"inputs": "\\ud800"}', '{"inputs": "\ud83d"}', '{"inputs": "a", "inputs": 5}', "nul", "[]", "5"]
)
def test_json_that_parsers_disagree_about_is_refused(acme: Caller, body: str) -> None:
    content = body.encode("utf-8", "surrogatepass")
    response = acme.ask("POST", "/generate", content=content, headers={"content-type": "application/json"})
    refusal(response, 400, 422)


def test_merges_and_compositions_without_bound_are_refused(acme: Caller) -> None:
    assert acme.upload("one", lora(1)).status_code == 201
    ids = ["one"] * 10_000
    refusal(acme.generate(merged_adapters={"ids": ids, "weights": [1.0] * len(ids)}))
    refusal(acme.generate(merged_adapters={"ids": ["one"], "weights": [1e308]}), 422, 424)
