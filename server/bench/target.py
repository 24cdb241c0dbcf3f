"""One running server as the bench talks to it, over HTTP and nothing else.

Owns routes and wire formats. Never decides what is sent or when.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from httpx_aiohttp import AiohttpTransport

from .options import BenchError
from .results import OK, Outcome
from .scrape import Scrape
from .workload import Order, Piece

_CONTROL_SECONDS = 60.0  # for everything but generation
_PAGE = 1000  # records per page of a listing
_SHOWN = 300  # characters of the server's words in a message
_DATA = "data:"


class Target:
    """A server under test. Use `connect`."""

    def __init__(self, http: httpx.AsyncClient, request_seconds: float, api_key: str | None = None) -> None:
        self._http = http
        self._request_seconds = request_seconds
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.heard = 0  # pieces of streams that have come, about a token each

    def under(self, api_key: str | None) -> Target:
        """The same server with another key."""
        return Target(self._http, self._request_seconds, api_key)

    async def info(self) -> Mapping[str, object]:
        """What /info says. Raises: BenchError when no server answers."""
        found = (await self._call("GET", "/info")).json()
        if not isinstance(found, dict):
            raise BenchError("`url`: GET /info answers no JSON object; is this an adapterd server?")
        return found

    async def scrape(self) -> Scrape:
        """Nothing, from a server that does not show this key its metrics."""
        response = await self._call("GET", "/metrics", allowed=(401, 403, 404))
        return Scrape.parse(response.text if response.is_success else "")

    async def tokenize(self, text: str) -> Sequence[Piece]:
        found = (await self._call("POST", "/tokenize", json={"inputs": text})).json()
        return [Piece(int(token["id"]), int(token["stop"])) for token in found]

    async def upload(self, name: str, files: Mapping[str, bytes]) -> float:
        """Seconds until the server has accepted the adapter. Raises: BenchError with the reason it refuses."""
        parts = [("files", (file, body)) for file, body in files.items()]
        begun = time.perf_counter()
        await self._call("POST", "/adapters", data={"adapter_id": name}, files=parts)
        return time.perf_counter() - begun

    async def delete(self, name: str) -> None:
        """Also of an adapter that is not there."""
        await self._call("DELETE", f"/adapters/{name}", allowed=(404,))

    async def adapter_names(self) -> set[str]:
        """Of every adapter that the key's tenant has."""
        names: set[str] = set()
        params: dict[str, str] = {"limit": str(_PAGE)}
        while True:
            page = (await self._call("GET", "/adapters", params=params)).json()
            names |= {str(record["adapter_id"]) for record in page["adapters"]}
            if not page.get("next_cursor"):
                return names
            params["cursor"] = str(page["next_cursor"])

    async def load(self, name: str) -> None:
        """Have an adapter on the device. Raises: BenchError when it cannot be."""
        await self._call("POST", f"/adapters/{name}/load")

    async def unload(self, name: str) -> str:
        """Off the device and out of host memory, unless requests use it; the state that it is in then."""
        return str((await self._call("POST", f"/adapters/{name}/unload")).json()["state"])

    async def put_tenant(self, name: str, policy: Mapping[str, object]) -> None:
        """With an administrator's key."""
        await self._call("PUT", f"/admin/tenants/{name}", json=dict(policy))

    async def remove_tenant(self, name: str) -> None:
        """With its keys and adapters; also one that is not there."""
        await self._call("DELETE", f"/admin/tenants/{name}", params={"adapters": "true"}, allowed=(404,))

    async def make_key(self, tenant: str, scopes: Sequence[str]) -> str:
        """The key itself, which no answer shows again."""
        found = await self._call("POST", "/admin/keys", json={"tenant": tenant, "scopes": list(scopes)})
        return str(found.json()["key"])

    async def answer(self, order: Order) -> tuple[int, ...]:
        """The ids of a request's new tokens, its whole prompt computed: asking for the prompt's details leaves no room for
        cached keys and values. Raises: BenchError when it fails.
        """
        body = _body(order)
        body["parameters"] = {**body["parameters"], "decoder_input_details": True}
        found = (await self._call("POST", "/generate", json=body, timeout=self._request_seconds)).json()
        return tuple(int(token["id"]) for token in found["details"]["tokens"])

    async def generate(self, order: Order) -> Outcome:
        """Streams one request to its end. Failures are outcomes, not exceptions."""
        started = time.perf_counter()
        chunks: list[tuple[float, bytes]] = []
        try:
            status = await self._stream(order, chunks)
        except httpx.HTTPError as error:
            ended = time.perf_counter()
            return Outcome(order.adapter, type(error).__name__, started, ended, message=str(error) or repr(error))
        ended = time.perf_counter()
        try:
            return _outcome(order, status, started, ended, list(_lines(chunks)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Outcome(order.adapter, "malformed", started, ended, message=f"the stream is not understood: {error!r}")

    async def _stream(self, order: Order, chunks: list[tuple[float, bytes]]) -> int:
        """Bytes are noted as they come and read afterwards: the client's own work stays out of the server's way."""
        headers = {**self._headers, "accept-encoding": "identity"}
        async with self._http.stream(
            "POST", "/generate_stream", json=_body(order), headers=headers, timeout=self._request_seconds
        ) as response:
            async for chunk in response.aiter_raw():
                chunks.append((time.perf_counter(), chunk))  # a stream cut short must leave what came
                self.heard += 1
            return response.status_code

    async def _call(self, method: str, path: str, *, allowed: tuple[int, ...] = (), **request: Any) -> httpx.Response:
        """Raises: BenchError for any answer that is neither a success nor `allowed`."""
        try:
            response = await self._http.request(method, path, headers=self._headers, **request)
        except httpx.HTTPError as error:
            raise BenchError(
                f"`url`: {method} {str(self._http.base_url).rstrip('/')}{path} got no answer: {error!r}"
            ) from error
        if response.is_success or response.status_code in allowed:
            return response
        raise BenchError(f"the server refused {method} {path} with {response.status_code}: {response.text[:_SHOWN]}")


@asynccontextmanager
async def connect(
    url: str,
    *,
    api_key: str | None,
    request_seconds: float,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Target]:
    """A client with as many connections as there are requests in flight. `transport` replaces the network."""
    # On aiohttp's connections, whose parser is compiled: on the server's own cores httpx's take 380 us per token, these 110.
    # 0 is aiohttp's word for no limit.
    network = AiohttpTransport(limits=httpx.Limits(max_connections=0, keepalive_expiry=_CONTROL_SECONDS), trust_env=False)
    async with httpx.AsyncClient(
        base_url=url, timeout=_CONTROL_SECONDS, transport=transport or network, trust_env=False
    ) as http:
        yield Target(http, request_seconds, api_key)


def _body(order: Order) -> dict[str, Any]:
    parameters: dict[str, object] = {
        "max_new_tokens": order.max_new_tokens,
        "ignore_eos_token": True,
        "do_sample": False,
        "details": True,
    }
    if order.adapter is not None:
        parameters["adapter_id"] = order.adapter
    return {"inputs": order.prompt.text, "parameters": parameters}


def _lines(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Each line with the time at which its last byte came."""
    rest = b""
    for at, chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from ((at, line.rstrip(b"\r").decode()) for line in whole)
    if rest:
        yield chunks[-1][0], rest.decode()


def _outcome(order: Order, status: int, started: float, ended: float, lines: list[tuple[float, str]]) -> Outcome:
    """Errors come as a status with a JSON body, or, once streaming has begun, as an event."""
    if status != httpx.codes.OK:
        message = " ".join(line for _, line in lines)[:_SHOWN]
        return Outcome(order.adapter, str(status), started, ended, message=message)
    events = [(at, json.loads(line.removeprefix(_DATA))) for at, line in lines if line.startswith(_DATA)]
    error = next((event for _, event in events if "error" in event), None)
    if error is not None:
        return Outcome(order.adapter, str(error.get("error_type", "error")), started, ended, message=str(error["error"]))
    tokens = [(at, int(event["token"]["id"])) for at, event in events if event.get("token")]
    details = next((event["details"] for _, event in reversed(events) if event.get("details")), None)
    if details is None:
        return Outcome(order.adapter, "incomplete", started, ended, message="the stream ended without its last event")
    return Outcome(
        order.adapter,
        OK,
        started,
        ended,
        token_times=tuple(at for at, _ in tokens),
        token_ids=tuple(id for _, id in tokens),
        prompt_tokens=int(details.get("prompt_tokens", len(order.prompt.ids))),
    )
