"""POST /embed: a text's final hidden state, pooled, through an adapter if one is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from ..engine.scoring import score_all
from ..errors import ValidationError
from .auth import Caller, requires
from .body import documented, json_body, shown
from .context import Context, require_ready
from .failures import counting_refusals
from .generate import REFUSALS
from .schemas import EmbedRequest, EmbedResponse
from .sse import while_connected
from .texts import headers_of, jobs_of, texts_of

router = APIRouter(tags=["embed"], dependencies=[Depends(require_ready)])

Body = Annotated[EmbedRequest, Depends(json_body(EmbedRequest, counted=True))]


@router.post(
    "/embed",
    responses={200: {"model": EmbedResponse}, **REFUSALS},
    openapi_extra=documented(
        EmbedRequest,
        one_text={"inputs": "What is deep learning?"},
        several={"inputs": ["a cat", "a dog"], "adapter_id": "support", "pooling": "last"},
    ),
)
@requires("infer", action="embed")
async def embed(request: Request, body: Body, services: Context, caller: Caller) -> Response:
    """`embeddings`: the text's vector, or one vector per text when `inputs` is a list."""
    with counting_refusals(services.metrics):
        pooling = _pooling(body.pooling)
        texts = await texts_of(request, body, services, caller)
    jobs = jobs_of(texts, "embed", request, services, caller, pooling=pooling)
    found = await while_connected(request.receive, score_all(services.client, jobs))
    normalize = body.normalize is not False
    vectors = [normalized(scores[0]) if normalize else list(scores[0]) for scores in found]
    content = {"embeddings": vectors if texts.several else vectors[0]}
    return JSONResponse(content, headers=headers_of(services, jobs, body))


def normalized(vector: Sequence[float]) -> list[float]:
    """At Euclidean length 1; a zero vector stays zero."""
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def _pooling(given: str | None) -> Literal["last", "mean"]:
    match given:
        case None | "mean":
            return "mean"
        case "last":
            return "last"
    raise ValidationError(f"`pooling` must be one of mean, last. Given: {shown(given)}")
