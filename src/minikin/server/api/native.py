"""The native API: jobs with progress and previews, results, concepts, teaching.

The bodies of /api/paint, /api/refine and /api/inpaint are the recipes, with two further fields: `concepts`
(contents by name) and `task` (the client's name for the job). Images come as base64, or as `result:ID` for a
result of this server; fields that a request leaves out come from the image's metadata. A request gets 202 and
the job at once, or with `?wait=true` 200 and the results.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import AliasChoices, BaseModel, Field, create_model
from starlette.concurrency import run_in_threadpool

from minikin import __version__
from minikin.models.regions import NAMED_BOXES
from minikin.recipes import Paint
from minikin.server import serializers
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected, not_found
from minikin.server.http import (
    CountedStream,
    Strict,
    StrictRoute,
    carries_images,
    client_of,
    decoded,
    enqueues_jobs,
    job_response,
    preview,
    service_of,
    sse,
    submit,
)
from minikin.server.image_folder import file_name
from minikin.server.job_types import JOB_TYPES, JobType, with_defaults_of
from minikin.server.jobs import JobRequest
from minikin.server.service import Service

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)
HEARTBEAT_S = 10.0
MAX_LISTED = 100
_EXTRA = ("concepts", "task")
OLD_IMAGE_FIELD = "picture"  # word: name of the API field in 0.1


def _body(job_type: JobType) -> type[BaseModel]:
    """The request model of a job type: its recipe with the request's further fields."""
    description = "JPEG, PNG or WebP in base64, or result:ID"
    fields: dict[str, Any] = {name: (str, _image_field(name, description)) for name in job_type.required}
    fields |= {name: (str | None, Field(None, description=description)) for name in job_type.optional}
    if job_type.required:
        fields["prompt"] = (
            str,
            Field("", description="what it shows; by default the prompt in the image's metadata"),
        )
    model: type[BaseModel] = create_model(
        f"{job_type.name.capitalize()}Request", __base__=(Strict, job_type.recipe),
        concepts=(dict[str, str], Field(default_factory=dict, description="contents by name: sha256:...")),
        task=(str, Field("", max_length=80, description="your name for this job")),
        **fields,
    )  # fmt: skip
    return model


def _image_field(name: str, description: str) -> Any:
    """A required image; `picture`, the name in 0.1, is still accepted for `image`."""  # word: old API field
    old = (OLD_IMAGE_FIELD,) if name == "image" else ()
    return Field(validation_alias=AliasChoices(name, *old), description=description)


def _add(job_type: JobType) -> None:
    async def handle(request: Request, body: Any, wait: bool = False) -> Response:
        recipe_fields = body.model_dump(exclude_unset=True)
        extra = {name: recipe_fields.pop(name, None) for name in _EXTRA}
        inputs = None
        if job_type.required:
            texts = {n: recipe_fields.pop(n, None) for n in (*job_type.required, *job_type.optional)}
            inputs = JobInputs(
                {n: await _image(request, t, n) for n, t in texts.items() if t is not None},
                source=await _file_name(request, texts["image"]), parent=_id_of(texts["image"]),
            )  # fmt: skip
            base = service_of(request).engine.name
            recipe_fields = with_defaults_of(job_type.name, recipe_fields, inputs.images["image"], base)
        job_request = JobRequest(job_type.name, client_of(request), "native", extra["task"] or "", wait)
        job = await submit(request, job_request, recipe_fields, extra["concepts"], inputs)
        if job_type.required and OLD_IMAGE_FIELD in await request.json():
            job.notes.append(
                f"The field {OLD_IMAGE_FIELD} is now called image; the next version drops the old name."
            )
        return await job_response(request, job, wait)

    enqueues_jobs(handle)
    if job_type.required:
        carries_images(handle)
    handle.__annotations__ |= {"body": _body(job_type), "request": Request, "wait": bool, "return": Response}
    router.add_api_route(
        f"/{job_type.name}", handle, methods=["POST"], status_code=202, name=job_type.name,
        summary=f"{job_type.name.capitalize()} images", response_class=JSONResponse,
    )  # fmt: skip


for _kind in JOB_TYPES.values():
    if issubclass(_kind.recipe, Paint):
        _add(_kind)


# ---- jobs --------------------------------------------------------------------------------------


@router.get("/jobs")
async def jobs(
    request: Request, limit: int = MAX_LISTED, before: float | None = None, unfinished: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Your jobs, newest first. before: only those created earlier (seconds since 1970). unfinished: those that
    wait or run, oldest first, and `others`, what runs for other clients: kind and progress."""
    service, client = service_of(request), client_of(request)
    if unfinished:
        others = [job for job in service.running() if job.request.client != client]
        return {
            "jobs": [serializers.job_json(service, job) for job in service.unfinished(client)],
            "others": [{"kind": job.request.kind, "step": job.done, "steps": job.total} for job in others],
        }

    def listed() -> list[dict[str, Any]]:
        rows = service.store.jobs(client, max(1, min(limit, MAX_LISTED)), before)
        return [_view(service, client, row["id"], row) for row in rows]

    return {"jobs": await run_in_threadpool(listed)}


@router.get("/jobs/{id}")
async def job(request: Request, id: str) -> dict[str, Any]:
    """One job: its queue position, progress, preview, results or error."""
    service, client = service_of(request), client_of(request)
    body = await run_in_threadpool(_view, service, client, id)
    active = service.job(client, id)
    return {**body, "preview": await preview(service, active) if active and not active.over else None}


@router.delete("/jobs/{id}")
async def cancel(request: Request, id: str) -> dict[str, Any]:
    """Cancel a job: a waiting one at once, a running one within a step."""
    service, client = service_of(request), client_of(request)
    active = service.job(client, id)
    if active is not None:
        service.cancel(active)
        async with active.watch() as changes:
            while not active.over and await changes.next(30.0):
                pass
    return await run_in_threadpool(_view, service, client, id)


@router.post("/jobs/{id}/stop")
async def stop(request: Request, id: str) -> dict[str, Any]:
    """End teaching early and keep the concept as it is."""
    active = service_of(request).job(client_of(request), id)
    if active is None:
        raise not_found("job", id)
    if active.request.kind != "teach" or active.inputs.stop is None:
        raise RequestRejected(
            "Only teaching can be stopped and kept; cancel this with DELETE.", status=422, code="not_teaching"
        )
    active.inputs.stop.set()
    return serializers.job_json(service_of(request), active)


@router.get("/jobs/{id}/events")
async def events(request: Request, id: str) -> Response:
    """Server-sent events: `progress` with a preview after every step, `end` with the results."""
    service, client = service_of(request), client_of(request)
    active = service.job(client, id)
    if active is None:
        body = await run_in_threadpool(_view, service, client, id)
        return StreamingResponse(iter([sse("end", body)]), media_type="text/event-stream")
    leave = service.streams.enter(client)  # counted from here on, before its first event is sent

    async def stream() -> AsyncIterator[bytes]:
        async with active.watch() as changes:
            while not active.over:
                image = await preview(service, active)
                yield sse("progress", {**serializers.job_json(service, active), "preview": image})
                while not await changes.next(HEARTBEAT_S):
                    yield b": still here\n\n"
            yield sse("end", serializers.job_json(service, active))

    return CountedStream(stream(), leave)


@router.get("/results/{id}")
async def result(request: Request, id: str) -> Response:
    """A finished image, a PNG with its recipe inside."""
    data = await run_in_threadpool(service_of(request).read, client_of(request), id)
    name = quote(await _file_name(request, f"result:{id}"))
    return Response(data, media_type="image/png", headers={
        "Content-Disposition": f'inline; filename="{name}"', "Cache-Control": "private, max-age=3600",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    })  # fmt: skip


@router.get("/capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """What this server offers: job types, base, presets, samplers, LoRAs, limits; `regions`: the named boxes,
    as shares of the image from its upper left corner (left, top, right, bottom)."""
    service = service_of(request)
    description = await run_in_threadpool(service.engine.describe)
    return {
        "version": __version__, "kinds": dict.fromkeys(JOB_TYPES, True), **description,
        "content_filter": service.filtering.mode if service.filtering else None,
        "regions": NAMED_BOXES, "images": _lifetime(service), "one_library": service.concept_store.one_library,
        "limits": {**service.limits.__dict__, "pictures": service.limits.images},  # word: name in 0.1
    }  # fmt: skip


def _lifetime(service: Service) -> dict[str, Any]:
    """Where images are kept, and for how many hours: `folder` is None, or the person's own, with no end."""
    saved = service.writer.image_folder
    return {
        "folder": str(saved.path) if saved else None,
        "hours": None if saved else service.limits.keep_s / 3600,
    }


# ---- shared ------------------------------------------------------------------------------------


def _view(service: Service, client: str, id_: str, row: dict[str, Any] | None = None) -> dict[str, Any]:
    live = service.job(client, id_)
    if live is not None:
        return serializers.job_json(service, live)
    row = row or service.store.job(id_)
    if row is None or row["client"] != client:
        raise not_found("job", id_)
    return serializers.stored_job_json(row, service.store.images(id_), service.writer.path)


def _id_of(text: Any) -> str:
    """The id of an image that is a result of this server; "" for others."""
    return text.removeprefix("result:") if isinstance(text, str) and text.startswith("result:") else ""


async def _file_name(request: Request, text: Any) -> str:
    """The file name of an image that is a result of this server; "" for others."""
    service, id_ = service_of(request), _id_of(text)
    if not id_:
        return ""
    row = await run_in_threadpool(service.store.image, id_, client_of(request))
    job = await run_in_threadpool(service.store.job, row["job"]) if row else None
    return file_name(service.writer.path(id_), job["kind"], job["recipe"], row["seed"]) if row and job else ""


async def _image(request: Request, text: Any, what: str) -> Image.Image:
    """An image of a request's body: base64, or a result of this server."""
    service = service_of(request)
    if id_ := _id_of(text):
        data = await run_in_threadpool(service.read, client_of(request), id_)
        return await decoded(request, data, what)
    return await decoded(request, text, what)
