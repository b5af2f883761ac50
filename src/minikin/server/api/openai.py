"""OpenAI's images API, as the stock `openai` client speaks it.

    /v1/images/generations   JSON        -> paint
    /v1/images/edits         multipart   -> refine; inpaint where a mask (or the image itself) is transparent
    /v1/images/variations    multipart   -> refine, a little
    /v1/models                           the base, and `base:preset` for each preset that is ready

`openai_fields` says which fields are followed, and what is refused. Options that the API lacks come through
`extra_body`, by vllm-omni's names: seed, num_inference_steps, guidance_scale, negative_prompt, concepts; and
preset, scheduler, strength. Every item of `data` also has `seed`, `infotext` and `id`. An unknown field is an
error.
"""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, File, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as Upload

from minikin.errors import Blocked, MinikinError
from minikin.generation.content_filter import is_blocked, refusal
from minikin.images import xmp
from minikin.images.encode import Marking
from minikin.printable import escaped
from minikin.recipes import first_sentence
from minikin.server.api.openai_fields import (
    Generation,
    Images,
    check,
    no_model,
    ready_models,
    recipe_fields,
    warnings_of,
)
from minikin.server.api.openai_images import is_transparent, mask_from_alpha, of_size
from minikin.server.api.shared import prompts_or_recorded
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected, error_body, invalid_field, sentence_of, status_of
from minikin.server.http import (
    StrictRoute,
    accepts_forms,
    b64,
    client_of,
    decoded,
    enqueues_jobs,
    raise_failure,
    result_files,
    service_of,
    sse,
    submit,
    wait_for_job,
)
from minikin.server.jobs import Job, JobRequest
from minikin.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)
EDIT_STRENGTH, FAITHFUL_STRENGTH, VARIATION_STRENGTH = 0.75, 0.5, 0.5  # faithful: input_fidelity high
_SINCE = int(time.time())


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The base, alone and with each preset that is ready."""
    service = service_of(request)
    names = await run_in_threadpool(ready_models, service)
    return {"object": "list", "data": [_model(service, n) for n in names]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    if name not in await run_in_threadpool(ready_models, service_of(request)):
        raise no_model(name, "")
    return _model(service_of(request), name)


@router.post("/images/generations", response_class=JSONResponse)
@enqueues_jobs
async def generations(request: Request, body: Generation) -> Response:
    """Generate images from a prompt."""
    return await _respond(request, "paint", body, None, "image_generation")


@router.post("/images/edits", response_class=JSONResponse, openapi_extra={"requestBody": {"content": {
    "multipart/form-data": {"schema": {"type": "object", "required": ["image", "prompt"], "properties": {
        "image": {"type": "string", "format": "binary"}, "mask": {"type": "string", "format": "binary"},
        "prompt": {"type": "string"}}}}}}})  # fmt: skip
@accepts_forms
@enqueues_jobs
async def edits(request: Request) -> Response:
    """Edit an image: all of it, or where the mask is transparent."""
    body, files = await _form(request, ("image", "mask"))
    if not body.prompt.strip():
        raise invalid_field(
            "prompt", "prompt is missing: say what the image should become.", code="missing_prompt"
        )
    image, mask = files.get("image"), files.get("mask")
    if image is None:
        raise invalid_field("image", "image is missing.", code="missing_image")
    alpha_source = mask or (image if is_transparent(image) else None)
    if body.strength is None:
        body.strength = FAITHFUL_STRENGTH if body.input_fidelity == "high" else EDIT_STRENGTH
    inputs = {"image": image.convert("RGB")}
    if alpha_source is not None:
        inputs["mask"] = mask_from_alpha(alpha_source, image.size)
    kind = "refine" if alpha_source is None else "inpaint"
    return await _respond(request, kind, body, inputs, "image_edit")


@router.post("/images/variations", response_class=JSONResponse)
@accepts_forms
@enqueues_jobs
async def variations(request: Request, image: UploadFile = File()) -> Response:
    """Variations of an image, by the prompt in its metadata where it has one."""
    body, files = await _form(request, ("image",))
    source = files["image"]
    body.strength = VARIATION_STRENGTH if body.strength is None else body.strength
    body.prompt, body.negative_prompt = prompts_or_recorded(body.prompt, body.negative_prompt, source)
    return await _respond(request, "refine", body, {"image": source.convert("RGB")}, "image_edit")


# ---- requests ----------------------------------------------------------------------------------


async def _form(request: Request, names: tuple[str, ...]) -> tuple[Images, dict[str, Image.Image]]:
    """The fields of a multipart request, and its images decoded."""
    service = service_of(request)
    form: FormData = await request.form()
    fields: dict[str, Any] = {}
    by_name: dict[str, Any] = {}  # concepts[NAME]
    contents: list[str] = []  # concepts[], and concepts more than once
    files: dict[str, Image.Image] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, Upload):
            if name not in names:
                raise invalid_field(
                    name[:40], f"'{name[:40]}' is no file of this call.", code="unknown_parameter"
                )
            if name in files:
                why = f"Several of {name} were sent, and one is edited here: send one, or one request for each."
                raise invalid_field(name, why, code="too_many_images")
            files[name] = await decoded(request, await value.read(service.limits.image + 1), name)
        elif name == "concepts":
            contents.append(value)
        elif name.startswith("concepts["):
            by_name[name[9:].rstrip("]")] = value
        elif name in fields:
            raise invalid_field(name[:40], f"The field {escaped(name[:40])} was sent twice.")
        else:
            fields[name] = value
    if by_name and contents:
        raise invalid_field("concepts", "Send either concepts or concepts[NAME], not both.")
    fields |= {"concepts": by_name or contents} if by_name or contents else {}
    try:
        return Images(**fields), files
    except ValidationError as e:
        where = str(e.errors()[0]["loc"][0]) if e.errors()[0]["loc"] else "body"
        raise invalid_field(where, first_sentence(e)) from None


def _contents(body: Images) -> dict[str, str]:
    """`concepts` by name; a list may hold "tom@sha256:..."."""
    if isinstance(body.concepts, dict):
        return body.concepts
    pairs = [text.partition("@") for text in body.concepts]
    return {name: sha for name, at, sha in pairs if at}


# ---- answers -----------------------------------------------------------------------------------


async def _respond(
    request: Request, kind: str, body: Images, images: dict[str, Image.Image] | None, event: str
) -> Response:  # fmt: skip
    service = service_of(request)
    check(body)
    fields = await run_in_threadpool(recipe_fields, service, kind, body)
    notes = warnings_of(body, edits=images is not None)
    if images:
        images, note = await run_in_threadpool(of_size, images, body.size, service.engine.side, service.limits)
        notes += [note] if note else []
    job_request = JobRequest(kind, client_of(request), "openai", blocking=True)
    inputs = JobInputs(images) if images else None
    job = await submit(request, job_request, fields, _contents(body), inputs)
    job.notes += notes
    if body.stream:
        return StreamingResponse(_stream(request, job, body, event), media_type="text/event-stream")
    await wait_for_job(request, job)
    _check_filter(job)
    files = await result_files(request, job, partial(_converted, body=body, marking=service.marking))
    as_url = (
        body.response_format or ("url" if (body.model or "").startswith("dall-e") else "b64_json")
    ) == "url"
    data = []
    for image, file in zip(job.images, files, strict=True):
        item: dict[str, Any] = {"id": image.id, "seed": image.seed, "infotext": job.infotexts.get(image.number)}
        if verdict := job.verdict(image.number):
            item |= {"flagged": True, "filter": verdict}
        if as_url:
            item["url"] = f"{str(request.base_url).rstrip('/')}/api/results/{image.id}"
        else:
            item["b64_json"] = b64(file)
        data.append(item)
    size = f"{job.images[0].width}x{job.images[0].height}"
    return JSONResponse({
        "created": int(job.created), "data": data, "output_format": body.output_format, "size": size,
        "quality": body.quality or "auto", "background": "opaque", "usage": _usage(), "warnings": job.notes,
        "concepts": {name: pinned.sha256 for name, pinned in job.prepared.concepts.items()},
    })  # fmt: skip


async def _stream(request: Request, job: Job, body: Images, event: str) -> AsyncIterator[bytes]:
    """Up to `partial_images` previews, then the image; a client that disconnects cancels the job."""
    service = service_of(request)
    common = {"output_format": body.output_format, "quality": body.quality or "auto", "background": "opaque"}
    sent, previews = 0, body.partial_images or 0
    try:
        async with job.watch() as changes:
            while not job.over:
                await changes.next(10.0)
                due = (sent + 1) * job.total / (previews + 1)
                preview = job.preview() if sent < previews and job.done >= due and not job.over else None
                if preview is not None:
                    data = await run_in_threadpool(_encoded, preview, body, service.marking.unsigned)
                    yield sse(f"{event}.partial_image", {
                        "type": f"{event}.partial_image", "b64_json": b64(data), "partial_image_index": sent,
                        "created_at": int(job.created), "size": f"{preview.width}x{preview.height}", **common,
                    })  # fmt: skip
                    sent += 1
        try:
            raise_failure(job)
            _check_filter(job)
        except MinikinError as e:
            yield sse("error", {"type": "error", **error_body("openai", status_of(e), e.code, sentence_of(e))})
            return
        (file,) = await result_files(request, job, partial(_converted, body=body, marking=service.marking))
        image = job.images[0]
        yield sse(f"{event}.completed", {
            "type": f"{event}.completed", "b64_json": b64(file), "created_at": int(job.created),
            "size": f"{image.width}x{image.height}", "usage": _usage(), "seed": image.seed, "id": image.id,
            "infotext": job.infotexts.get(image.number), **common,
            **({"flagged": True, "filter": verdict} if (verdict := job.verdict(image.number)) else {}),
        })  # fmt: skip
    finally:
        if not job.over:
            service.cancel(job)


def _check_filter(job: Job) -> None:
    """Raise OpenAI's error when the content filter blocked every image; one of several is shown as a card."""
    blocked = sum(is_blocked(job.verdict(p.number)) for p in job.images)
    if blocked and blocked == len(job.images):
        raise RequestRejected(refusal(blocked, blocked), status=400, code=Blocked.code)


def _converted(data: bytes, body: Images, marking: Marking) -> bytes:
    """The PNG unchanged, with its recipe, or another format with the same mark."""
    if body.output_format == "png":
        return data
    image = Image.open(io.BytesIO(data))
    return _encoded(xmp.with_source_type(image, xmp.source_type_of(image) or xmp.NONE), body, marking)


def _encoded(image: Image.Image, body: Images, marking: Marking) -> bytes:
    quality = 100 if body.output_compression is None else body.output_compression
    if body.output_format == "png":
        return marking.encode(image, compress_level=1)
    if body.output_format == "jpeg":
        quality = max(1, min(95, quality))
    return marking.encode(image.convert("RGB"), body.output_format.upper(), quality=quality)


def _usage() -> dict[str, Any]:
    """OpenAI's token counts, all zero: there are none here."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": details}


def _model(service: Service, name: str) -> dict[str, Any]:
    filter = service.filtering.mode if service.filtering else None
    return {"id": name, "object": "model", "created": _SINCE, "owned_by": "minikin", "content_filter": filter}
