"""Health checks and metrics: /livez, /readyz, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minikin.server import metrics
from minikin.server.http import service_of

router = APIRouter(tags=["probes"])


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a request would be served, else 503 with the reason."""
    why = service_of(request).ready
    return JSONResponse({"status": why or "ok"}, 503 if why else 200)


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    service = service_of(request)
    waiting = service.queue.waiting()
    metrics.QUEUE.set(len(waiting))
    metrics.RUNNING.set(len(service.running()))
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")
