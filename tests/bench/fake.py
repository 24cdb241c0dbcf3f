"""A server as the bench sees it, in a hundred lines: the routes, the wire formats, and a log of what was asked."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .streaming import Streaming

HIDDEN, LAYERS, WIDE = 16, 2, 32

INFO: dict[str, Any] = {
    "model_id": "tiny",
    "model_type": "llama",
    "runtime_bytes": 100,
    "base_bytes": 400,
    "kv_cache_bytes": 200,
    "host_cache_limit_bytes": 60,
    "base": {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 100,
        "modules": {
            "model.embed_tokens": ["embedding", 100, HIDDEN],
            "lm_head": ["linear", HIDDEN, 100],
            **{
                f"model.layers.{layer}.{name}": shape
                for layer in range(LAYERS)
                for name, shape in {
                    "input_layernorm": ["norm", HIDDEN, HIDDEN],
                    "self_attn.q_proj": ["linear", HIDDEN, HIDDEN],
                    "self_attn.k_proj": ["linear", HIDDEN, 8],
                    "self_attn.v_proj": ["linear", HIDDEN, 8],
                    "self_attn.o_proj": ["linear", HIDDEN, HIDDEN],
                    "post_attention_layernorm": ["norm", HIDDEN, HIDDEN],
                    "mlp.gate_proj": ["linear", HIDDEN, WIDE],
                    "mlp.up_proj": ["linear", HIDDEN, WIDE],
                    "mlp.down_proj": ["linear", WIDE, HIDDEN],
                }.items()
            },
        },
        "sublayers": [
            [layer, kind, f"model.layers.{layer}.{exit_}"]
            for layer in range(LAYERS)
            for kind, exit_ in (("attention", "self_attn.o_proj"), ("feed_forward", "mlp.down_proj"))
        ],
    },
}


@dataclass
class FakeServer:
    """Generates token 7 for everything. `refuse` maps an adapter's number to what its requests get instead.

    With `keys`, a request needs one of them; `root` may make tenants and further keys.
    """

    refuse: dict[int, Response | str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=lambda: dict(INFO))
    adapters: dict[str, list[str]] = field(default_factory=dict)  # name -> file names
    deleted: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)  # the tenant behind each of `requests`
    keys: dict[str, str] = field(default_factory=dict)  # key -> tenant
    tenants: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> policy
    removed: list[str] = field(default_factory=list)  # tenants
    states: dict[str, str] = field(default_factory=dict)  # adapter -> what an unload leaves it in
    loads: list[str] = field(default_factory=list)
    asked_again: list[dict[str, Any]] = field(default_factory=list)  # what came to /generate
    again: int = 7  # the token that /generate gives
    pace: float = 0.0  # seconds before each token

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        return Streaming(
            Starlette(
                routes=[
                    Route("/info", self._info),
                    Route("/metrics", self._metrics),
                    Route("/tokenize", self._tokenize, methods=["POST"]),
                    Route("/adapters", self._upload, methods=["POST"]),
                    Route("/adapters", self._list),
                    Route("/adapters/{name}", self._delete, methods=["DELETE"]),
                    Route("/adapters/{name}/load", self._load, methods=["POST"]),
                    Route("/adapters/{name}/unload", self._unload, methods=["POST"]),
                    Route("/generate", self._answer, methods=["POST"]),
                    Route("/admin/tenants/{name}", self._tenant, methods=["PUT", "DELETE"]),
                    Route("/admin/keys", self._key, methods=["POST"]),
                    Route("/generate_stream", self._generate, methods=["POST"]),
                ]
            )
        )

    async def _info(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        return JSONResponse(self.info)

    async def _metrics(self, request: Request) -> Response:
        """Every request so far was a step of its own with 3 adapters; the resident set grows by one per upload."""
        steps = len(self.requests)
        return PlainTextResponse(
            f"""# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes {800 + len(self.adapters)}
# TYPE adapterd_adapter_slots_bytes gauge
adapterd_adapter_slots_bytes 50
# TYPE adapterd_step_rows histogram
adapterd_step_rows_bucket{{le="1.0"}} {steps}
adapterd_step_rows_bucket{{le="+Inf"}} {steps}
adapterd_step_rows_count {steps}
adapterd_step_rows_sum {steps}
# TYPE adapterd_step_distinct_adapters histogram
adapterd_step_distinct_adapters_bucket{{le="2.0"}} 0
adapterd_step_distinct_adapters_bucket{{le="4.0"}} {steps}
adapterd_step_distinct_adapters_bucket{{le="+Inf"}} {steps}
adapterd_step_distinct_adapters_count {steps}
adapterd_step_distinct_adapters_sum {3 * steps}
# TYPE adapterd_step_seconds histogram
adapterd_step_seconds_count {steps}
adapterd_step_seconds_sum {0.02 * steps}
# TYPE adapterd_running gauge
adapterd_running 0
"""
        )

    async def _tokenize(self, request: Request) -> Response:
        """A token per up to three letters of a word, behind one token that the server adds."""
        text = (await request.json())["inputs"]
        words = re.finditer(r" ?[a-z]{1,3}", text)
        pieces = [{"id": 2 + len(word[0]), "text": word[0], "start": word.start(), "stop": word.end()} for word in words]
        return JSONResponse([{"id": 1, "text": "<s>", "start": 0, "stop": 0}, *pieces])

    async def _upload(self, request: Request) -> Response:
        async with request.form() as form:
            self.adapters[str(form["adapter_id"])] = [getattr(file, "filename", "") for file in form.getlist("files")]
        return JSONResponse({}, 201)

    async def _delete(self, request: Request) -> Response:
        self.deleted.append(request.path_params["name"])
        return Response(status_code=204)

    async def _list(self, request: Request) -> Response:
        """Three to a page."""
        names = [name for name in self.adapters if name not in self.deleted]
        at = int(request.query_params.get("cursor", 0))
        following = str(at + 3) if at + 3 < len(names) else None
        return JSONResponse({"adapters": [{"adapter_id": name} for name in names[at : at + 3]], "next_cursor": following})

    async def _load(self, request: Request) -> Response:
        self.loads.append(request.path_params["name"])
        return JSONResponse({"state": "resident"})

    async def _unload(self, request: Request) -> Response:
        return JSONResponse({"state": self.states.get(request.path_params["name"], "stored")})

    async def _answer(self, request: Request) -> Response:
        """The base answers 8."""
        self.asked_again.append(await request.json())
        parameters = self.asked_again[-1]["parameters"]
        token = self.again if parameters.get("adapter_id") else 8
        return JSONResponse({"details": {"tokens": [{"id": token}] * parameters["max_new_tokens"]}})

    async def _tenant(self, request: Request) -> Response:
        name = request.path_params["name"]
        if self._caller(request) != "root":
            return JSONResponse({"error": "this needs the admin scope", "error_type": "forbidden"}, 403)
        if request.method == "DELETE":
            self.removed.append(name)
            return Response(status_code=204)
        self.tenants[name] = await request.json()
        return JSONResponse({})

    async def _key(self, request: Request) -> Response:
        tenant = (await request.json())["tenant"]
        self.keys[f"key-of-{tenant}"] = tenant
        return JSONResponse({"key": f"key-of-{tenant}"}, 201)

    def _caller(self, request: Request) -> str:
        return self.keys.get(request.headers.get("authorization", "").removeprefix("Bearer "), "")

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.owners.append(self._caller(request))
        name = body["parameters"].get("adapter_id")
        found = self.refuse.get(int(name.rpartition("-")[2])) if name else None
        if isinstance(found, Response):
            return found
        lines = _events(body["parameters"]["max_new_tokens"], self.pace) if found is None else _stream(found)
        return StreamingResponse(lines, media_type="text/event-stream")


async def _events(count: int, pace: float) -> AsyncIterator[str]:
    for index in range(count):
        await asyncio.sleep(pace)
        last = index == count - 1
        details = {"finish_reason": "length", "prompt_tokens": 5, "generated_tokens": count, "seed": None} if last else None
        token = {"id": 7, "text": "x", "logprob": -1.0, "special": False}
        yield f"data: {json.dumps({'token': token, 'generated_text': 'x' if last else None, 'details': details})}\n\n"


async def _stream(text: str) -> AsyncIterator[str]:
    yield text
