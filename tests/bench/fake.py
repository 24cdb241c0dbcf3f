"""A server as the bench sees it, in a hundred lines: the routes, the wire formats, and a log of what was asked."""

from __future__ import annotations

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
    """Generates token 7 for everything. `refuse` maps an adapter's number to what its requests get instead."""

    refuse: dict[int, Response | str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=lambda: dict(INFO))
    adapters: dict[str, list[str]] = field(default_factory=dict)  # name -> file names
    deleted: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(
            Starlette(
                routes=[
                    Route("/info", self._info),
                    Route("/metrics", self._metrics),
                    Route("/tokenize", self._tokenize, methods=["POST"]),
                    Route("/adapters", self._upload, methods=["POST"]),
                    Route("/adapters/{name}", self._delete, methods=["DELETE"]),
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

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        name = body["parameters"].get("adapter_id")
        found = self.refuse.get(int(name.rpartition("-")[2])) if name else None
        if isinstance(found, Response):
            return found
        lines = _events(body["parameters"]["max_new_tokens"]) if found is None else _stream(found)
        return StreamingResponse(lines, media_type="text/event-stream")


async def _events(count: int) -> AsyncIterator[str]:
    for index in range(count):
        last = index == count - 1
        details = {"finish_reason": "length", "prompt_tokens": 5, "generated_tokens": count, "seed": None} if last else None
        token = {"id": 7, "text": "x", "logprob": -1.0, "special": False}
        yield f"data: {json.dumps({'token': token, 'generated_text': 'x' if last else None, 'details': details})}\n\n"


async def _stream(text: str) -> AsyncIterator[str]:
    yield text
