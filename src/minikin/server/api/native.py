"""The native API: jobs with progress and previews, results, concepts, teaching.

The bodies of /api/paint, /api/refine and /api/inpaint are the recipes themselves, with two fields more:
`concepts` (contents by name) and `task` (a name of the client's own for the job). Images come as
base64, or as `result:ID` for one that was painted here; what a request does not say of one is the
image's own, where it records it. A job is answered 202 at once, or 200 with its
results when `?wait=true`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, Field, create_model
from starlette.concurrency import run_in_threadpool

from minikin import __version__
from minikin.recipes import Paint
from minikin.server import decode, serializers
from minikin.server.engine import Given
from minikin.server.errors import Refused, not_found
from minikin.server.http import (
    Strict,
    StrictRoute,
    answered,
    client_of,
    preview,
    queued,
    service_of,
    sse,
    submit,
)
from minikin.server.job_types import KINDS, Kind, complete
from minikin.server.jobs import Asked
from minikin.server.service import Service

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)
HEARTBEAT_S = 10.0
LISTED = 100
_EXTRA = ("concepts", "task")


def _body(kind: Kind) -> type[BaseModel]:
    """The kind's recipe with what a request adds to it."""
    told = "JPEG, PNG or WebP in base64, or result:ID"
    more: dict[str, Any] = {name: (str, Field(description=told)) for name in kind.takes}
    more |= {name: (str | None, Field(None, description=told)) for name in kind.may}
    if kind.takes:
        more["prompt"] = (str, Field("", description="what it shows; the image's own prompt by default"))
    model: type[BaseModel] = create_model(
        f"{kind.name.capitalize()}Request", __base__=(Strict, kind.recipe),
        concepts=(dict[str, str], Field(default_factory=dict, description="contents by name: sha256:...")),
        task=(str, Field("", max_length=80, description="your own name for this job")),
        **more,
    )  # fmt: skip
    return model


def _add(kind: Kind) -> None:
    async def handle(request: Request, body: Any, wait: bool = False) -> Response:
        values = body.model_dump(exclude_unset=True)
        extra = {name: values.pop(name, None) for name in _EXTRA}
        given = None
        if kind.takes:
            brought = {n: values.pop(n, None) for n in (*kind.takes, *kind.may)}
            given = Given(
                pictures={n: await _picture(request, t, n) for n, t in brought.items() if t is not None}
            )
            base = service_of(request).engine.name
            values = complete(kind.name, values, given.pictures["picture"], base)
        asked = Asked(kind.name, client_of(request), "native", extra["task"] or "", wait)
        job = await submit(request, asked, values, extra["concepts"], given)
        return await answered(request, job, wait)

    queued(handle)
    handle.__annotations__ |= {"body": _body(kind), "request": Request, "wait": bool, "return": Response}
    router.add_api_route(
        f"/{kind.name}", handle, methods=["POST"], status_code=202, name=kind.name,
        summary=f"{kind.name.capitalize()} images", response_class=JSONResponse,
    )  # fmt: skip


for _kind in KINDS.values():
    if issubclass(_kind.recipe, Paint):
        _add(_kind)


# ---- jobs --------------------------------------------------------------------------------------


@router.get("/jobs")
async def jobs(request: Request, limit: int = LISTED) -> dict[str, Any]:
    """Your jobs, the newest first."""
    service, client = service_of(request), client_of(request)

    def listed() -> list[dict[str, Any]]:
        rows = service.store.jobs(client, max(1, min(limit, LISTED)))
        return [_view(service, client, row["id"], row) for row in rows]

    return {"jobs": await run_in_threadpool(listed)}


@router.get("/jobs/{id}")
async def job(request: Request, id: str) -> dict[str, Any]:
    """One job: its place in the line, progress, preview, results or error."""
    service, client = service_of(request), client_of(request)
    told = await run_in_threadpool(_view, service, client, id)
    live = service.job(client, id)
    return {**told, "preview": await preview(service, live) if live and not live.over else None}


@router.delete("/jobs/{id}")
async def cancel(request: Request, id: str) -> dict[str, Any]:
    """Cancel: a waiting job at once, a running one within a step."""
    service, client = service_of(request), client_of(request)
    found = service.job(client, id)
    if found is not None:
        service.cancel(found)
        async with found.watch() as changes:
            while not found.over and await changes.next(30.0):
                pass
    return await run_in_threadpool(_view, service, client, id)


@router.post("/jobs/{id}/stop")
async def stop(request: Request, id: str) -> dict[str, Any]:
    """End teaching early and keep the concept as it is."""
    found = service_of(request).job(client_of(request), id)
    if found is None:
        raise not_found("job", id)
    if found.asked.kind != "teach" or found.given.stop is None:
        raise Refused(
            "Only teaching can be stopped and kept; cancel this with DELETE.", status=422, code="not_teaching"
        )
    found.given.stop.set()
    return serializers.of(service_of(request), found)


@router.get("/jobs/{id}/events")
async def events(request: Request, id: str) -> Response:
    """Server-sent events: `progress` with a preview after every step, `end` with the results."""
    service, client = service_of(request), client_of(request)
    found = service.job(client, id)
    if found is None:
        told = await run_in_threadpool(_view, service, client, id)
        return StreamingResponse(iter([sse("end", told)]), media_type="text/event-stream")
    open_ = request.app.state.__dict__.setdefault("_streams", [0])
    if open_[0] >= service.limits.event_streams:
        raise Refused("Too many event streams are open.", status=429, code="too_many_streams", retry_s=5)

    async def stream() -> AsyncIterator[bytes]:
        open_[0] += 1
        try:
            async with found.watch() as changes:
                while not found.over:
                    shown = await preview(service, found)
                    yield sse("progress", {**serializers.of(service, found), "preview": shown})
                    while not await changes.next(HEARTBEAT_S):
                        yield b": still here\n\n"
                yield sse("end", serializers.of(service, found))
        finally:
            open_[0] -= 1

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/results/{id}")
async def result(request: Request, id: str) -> Response:
    """A finished image, a PNG with its recipe inside."""
    data = await run_in_threadpool(service_of(request).read, client_of(request), id)
    return Response(data, media_type="image/png", headers={
        "Content-Disposition": f'inline; filename="{id[:8]}.png"', "Cache-Control": "private, max-age=3600",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    })  # fmt: skip


@router.get("/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """What can be asked for here: kinds, base, presets, samplers, LoRAs, limits."""
    service = service_of(request)
    told = await run_in_threadpool(service.engine.describe)
    return {
        "version": __version__, "kinds": dict.fromkeys(KINDS, True), **told,
        "content_filter": service.filtering.mode if service.filtering else None,
        "limits": dict(service.limits.__dict__),
    }  # fmt: skip


# ---- shared ------------------------------------------------------------------------------------


def _view(service: Service, client: str, id_: str, row: dict[str, Any] | None = None) -> dict[str, Any]:
    live = service.job(client, id_)
    if live is not None:
        return serializers.of(service, live)
    row = row or service.store.job(id_)
    if row is None or row["client"] != client:
        raise not_found("job", id_)
    return serializers.of_row(row, service.store.pictures(id_))


async def _picture(request: Request, text: Any, what: str) -> Image.Image:
    """An image of a request's body: base64, or one that was painted here."""
    service = service_of(request)
    if isinstance(text, str) and text.startswith("result:"):
        data = await run_in_threadpool(service.read, client_of(request), text.removeprefix("result:"))
        return await run_in_threadpool(decode.decode, data, what, service.limits)
    return await run_in_threadpool(decode.from_base64, text, what, service.limits)
