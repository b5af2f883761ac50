"""Is it alive, is it ready, how much has it done."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minikin.server import metrics
from minikin.server.http import service_of

router = APIRouter(tags=["probes"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a request would be served; 503 and why while it would not."""
    why = service_of(request).ready
    return JSONResponse({"status": why or "ok"}, 503 if why else 200)


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    service = service_of(request)
    waiting = service.line.waiting()
    metrics.QUEUE.set(len(waiting))
    metrics.RUNNING.set(len(service.running()))
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")
