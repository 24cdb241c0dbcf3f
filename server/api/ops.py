"""What operators and routers ask: health, readiness, facts about the server, metrics. Starts no work."""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..step_times import SIZE
from .auth import public, requires
from .context import Context
from .schemas import ErrorResponse, Health, Ready

router = APIRouter(tags=["operations"])


@router.get("/health", responses={200: {"model": Health}, 503: {"model": ErrorResponse}})
@public
async def health(services: Context) -> Response:
    """200 when the server takes requests."""
    return services.readiness.health()


@router.get("/livez", responses={200: {"model": Health}, 503: {"model": ErrorResponse}})
@public
async def livez(services: Context) -> Response:
    """200 while the process lives, whatever it is doing; 503 once the engine has hung for `--watchdog-seconds`."""
    return services.readiness.alive()


@router.get("/readyz", responses={200: {"model": Ready}, 503: {"model": Ready}})
@public
async def readyz(services: Context) -> Response:
    """The server's phase; 200 when ready, 503 with the percentage while loading, and while shutting down."""
    return services.readiness.report()


@router.get("/info")
@requires("infer")
async def info(services: Context) -> Response:
    """The base model and the limits, under LoRAX's names, and what the engine is doing."""
    limits, stats = services.limits, services.client.engine.stats()
    return JSONResponse(
        {
            "model_id": services.model_name,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_best_of": 1,
            "max_stop_sequences": limits.max_stop_sequences,
            "max_input_length": limits.max_total_tokens - 1,
            "max_total_tokens": limits.max_total_tokens,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            **services.info,
            "engine": {
                "running": stats.running,
                "waiting": stats.waiting,
                "adapter_slots_used": stats.slots_used,
                "adapter_slots_total": stats.slots_total,
                "kv_blocks_used": stats.kv_blocks_used,
                "kv_blocks_total": stats.kv_blocks_total,
            },
        }
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
@requires("admin")
async def metrics(services: Context) -> Response:
    """Prometheus exposition."""
    body, content_type = await to_thread.run_sync(services.metrics.render)
    return Response(body, headers={"content-type": content_type})


@router.get("/debug/step")
@requires("admin")
async def debug_step(services: Context, last: Annotated[int, Query(ge=0, le=SIZE)] = 0) -> Response:
    """Where the time of the last 256 steps went: medians by phase, and with `last` so many steps one by one."""
    return JSONResponse(services.client.engine.step_times().report(last))
