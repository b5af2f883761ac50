"""A1111's API, as far as `webuiapi` and Open WebUI call it.

Clients always send some 45 keys: `a1111_fields` says what is followed, refused, or left out with a warning in
`info`. Errors have 4xx codes. A client can interrupt only its jobs (by key and Basic user name), or the one job
it named with `force_task_id`.
"""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from minikin.images.metadata import infotext_of, parameters_text, recorded_or_none, texts_of
from minikin.server.api.a1111_fields import (
    Img2Img,
    Txt2Img,
    check_settings,
    notes_on,
    parameters,
    recipe_fields,
)
from minikin.server.api.a1111_images import filled, flat, mask_of, resized
from minikin.server.api.a1111_options import names_of
from minikin.server.api.openai_images import of_size
from minikin.server.api.shared import MIN_STRENGTH, known_fields, prompts_or_recorded
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected, invalid_field
from minikin.server.http import (
    StrictRoute,
    b64,
    carries_images,
    client_of,
    decoded,
    enqueues_jobs,
    preview,
    result_files,
    service_of,
    submit,
    wait_for_job,
)
from minikin.server.jobs import Job, JobRequest
from minikin.server.service import Service

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], route_class=StrictRoute)
ORIGINAL = 1  # `inpainting_fill`
Inputs = tuple[dict[str, Image.Image], list[str]]  # of one job: its images, and notes on them


@router.post("/txt2img", response_class=JSONResponse)
@enqueues_jobs
async def txt2img(request: Request, body: Txt2Img) -> Response:
    """Generate images from a prompt."""
    return await _answer(request, "paint", body, {}, [])


@router.post("/img2img", response_class=JSONResponse)
@carries_images
@enqueues_jobs
async def img2img(request: Request, body: Img2Img) -> Response:
    """Refine an image, or inpaint it where a mask is white; several images one by one."""
    body.mask = body.mask or None
    kind = "refine" if body.mask is None else "inpaint"
    several, most = len(body.init_images), service_of(request).limits.images
    if several > most:  # before any is decoded
        raise invalid_field("init_images", f"init_images: this server takes at most {most} images a request.")
    if several > 1 and several > (body.batch_size or 1):
        raise invalid_field(
            "init_images",
            f"init_images has {several} images: batch_size must be at least that, for one of each.",
        )
    images = [await decoded(request, text, "init_images") for text in body.init_images]
    body.prompt, body.negative_prompt = prompts_or_recorded(body.prompt, body.negative_prompt, images[0])
    mask = None if body.mask is None else await decoded(request, body.mask, "mask")
    service = service_of(request)
    inputs = await run_in_threadpool(lambda: [_inputs(service, body, image, mask) for image in images])
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    extra: dict[str, Any] = {"strength": max(MIN_STRENGTH, strength)}
    if mask is not None:
        extra |= {"feather": body.feather, "only_masked": body.inpaint_full_res,
                  "padding": body.inpaint_full_res_padding}  # fmt: skip
    return await _answer(request, kind, body, extra, inputs)


def _inputs(
    service: Service, body: Img2Img, image: Image.Image, mask: Image.Image | None
) -> tuple[dict[str, Image.Image], list[str]]:
    """The images of one job: resized, and with a mask filled, as the request says; and notes on that."""
    images = {"image": flat(image)}
    if mask is None and body.width and body.height:
        return {"image": resized(images["image"], (body.width, body.height), body.resize_mode or 0)}, []
    if mask is not None:
        images["mask"] = mask_of(mask, image.size, invert=bool(body.inpainting_mask_invert))
    images, note = of_size(images, None, service.engine.side, service.limits)
    notes = [note] if note else []
    if mask is None:
        return images, notes
    size = images["image"].size
    if body.width and body.height and size != (body.width, body.height):
        notes.append(
            f"An inpainted image keeps its size, {size[0]}x{size[1]}: width and height are not done here."
        )
    if body.inpainting_fill != ORIGINAL:
        images["image"] = filled(images["image"], images["mask"])
    return images, notes


@router.get("/progress")
async def progress(request: Request, id_task: str = "", skip_current_image: bool = False) -> dict[str, Any]:
    """Progress of your jobs, or of the one with this `force_task_id`."""
    service = service_of(request)
    jobs = _jobs_of(service, client_of(request), id_task)
    job = next((job for job in jobs if job.started), jobs[0] if jobs else None)
    if job is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": _state(None, 0),
            "current_image": None,
            "textinfo": None,
        }
    image = None if skip_current_image else await preview(service, job)
    share = job.done / job.total if job.total else 0.0
    wait = (1 - share) * job.prepared.cost * max(1, len(job.seeds)) * service.queue.rate_s
    ahead = service.queue.position(job)
    return {
        "progress": max(0.01, min(share, 0.99)), "eta_relative": round(wait, 2),
        "state": _state(job, len(jobs)), "current_image": image,
        "textinfo": f"In the queue: {ahead + 1}" if job.status == "queued" else None,
    }  # fmt: skip


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request, id_task: str = "") -> dict[str, Any]:
    """Cancel your jobs, or the one with this `force_task_id`; never another client's."""
    service = service_of(request)
    for job in _jobs_of(service, client_of(request), id_task):
        job.result = {"interrupted": await preview(service, job)}
        service.cancel(job)
    return {}


@router.post("/options")
async def set_options(request: Request, body: dict[str, Any]) -> None:
    """Accepts only settings that change nothing: the base is chosen when the server is started."""
    check_settings(body, await run_in_threadpool(names_of, service_of(request)), lasting=True)


# ---- recipes inside images -------------------------------------------------------------------


@router.post("/png-info")
@carries_images
async def png_info(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """The generation metadata of an image; of other tools than A1111 as A1111 would write it."""
    image = await decoded(request, body.get("image"), "image")
    texts = texts_of(image)
    record = recorded_or_none(texts)
    if record is None or not (record.prompt or record.settings):
        return {"info": "", "items": texts, "parameters": {}}
    parameters = {"Prompt": record.prompt, "Negative prompt": record.negative, **record.settings}
    text = infotext_of(texts) or parameters_text(record.prompt, record.negative, record.settings)
    return {"info": text, "items": {"parameters": text, **texts}, "parameters": parameters}


# ---- requests and answers ----------------------------------------------------------------------


async def _answer(
    request: Request, kind: str, body: Txt2Img, extra: dict[str, Any], inputs: list[Inputs]
) -> Response:  # fmt: skip
    """The images of one job, or of one job for each of several init images."""
    service = service_of(request)
    fields = recipe_fields(kind, body, await run_in_threadpool(names_of, service)) | known_fields(kind, extra)
    jobs: list[Job] = []
    last: list[str] = []
    try:
        for values, (images, notes) in _work(service, fields, inputs):
            job_request = JobRequest(kind, client_of(request), "a1111", body.force_task_id or "", blocking=True)
            job = await submit(
                request, job_request, values, body.concepts, JobInputs(images) if images else None
            )
            job.notes += [*notes_on(body, values), *notes]
            jobs.append(job)
        for job in jobs:
            try:
                await wait_for_job(request, job)
            except RequestRejected as e:
                interrupted = (job.result or {}).get("interrupted", "")
                if e.code != "cancelled" or interrupted == "":
                    raise
                last += [interrupted] if interrupted else []  # as A1111 does: the last preview
    except BaseException:
        for job in jobs:
            if not job.over:
                service.cancel(job)
        raise
    images_b64 = list(last)
    if body.send_images is not False:
        files = [f for job in jobs if job.status == "completed" for f in await result_files(request, job)]
        images_b64 = [*(b64(f) for f in files), *last]
    return JSONResponse({"images": images_b64, "parameters": parameters(body), "info": _info(jobs, fields)})


def _work(
    service: Service, fields: dict[str, Any], inputs: list[Inputs]
) -> list[tuple[dict[str, Any], Inputs]]:
    """The jobs of a request: one, or one for each image and each repetition, with seeds in this order."""
    if len(inputs) < 2:
        return [(fields, inputs[0] if inputs else ({}, []))]
    n, most = fields.get("n", 1), service.limits.images
    if n > most:
        raise invalid_field("batch_size", f"batch_size: this server takes at most {most} images a request.")
    repetitions = max(1, n // len(inputs))
    if fields["seed"] + repetitions * len(inputs) > 2**63:
        raise invalid_field(
            "seed", "The seed of the last image would lie beyond 2^63 - 1: choose a smaller one."
        )
    return [
        (fields | {"n": 1, "seed": fields["seed"] + k * len(inputs) + i}, images)
        for k in range(repetitions) for i, images in enumerate(inputs)
    ]  # fmt: skip


def _info(jobs: list[Job], fields: dict[str, Any]) -> str:
    images = [(job, image) for job in jobs for image in job.images]
    seeds = [image.seed for _, image in images] or [seed for job in jobs for seed in job.seeds]
    size = (images[0][1].width, images[0][1].height) if images else (0, 0)
    n, first = len(seeds), jobs[0]
    return json.dumps({
        "prompt": fields.get("prompt", ""), "all_prompts": [fields.get("prompt", "")] * n,
        "negative_prompt": fields.get("negative", ""), "all_negative_prompts": [fields.get("negative", "")] * n,
        "seed": seeds[0] if seeds else -1, "all_seeds": seeds, "subseed": -1, "all_subseeds": [-1] * n,
        "subseed_strength": 0, "width": size[0], "height": size[1],
        "sampler_name": fields.get("scheduler") or "base default", "cfg_scale": fields.get("guidance"),
        "steps": first.prepared.steps, "batch_size": n, "restore_faces": False,
        "denoising_strength": fields.get("strength"),
        "extra_generation_params": {"Schedule type": s} if (s := fields.get("schedule")) else {},
        "index_of_first_image": 0, "styles": [], "clip_skip": fields.get("clip_skip", 1),
        "infotexts": [job.infotexts[image.number] for job, image in images],
        "job_timestamp": _stamp(first.created),
        "is_using_inpainting_conditioning": False,
        "warnings": list(dict.fromkeys(note for job in jobs for note in job.notes)),
        "concepts": {name: p.sha256 for job in jobs for name, p in job.prepared.concepts.items()},
        "interrupted": any(job.status == "cancelled" for job in jobs),
        # per image, as A1111's filter extensions report it
        "nsfw": [job.verdict(image.number) is not None for job, image in images],
        "content_filter": [(job.verdict(image.number) or {}).get("action") for job, image in images],
    })  # fmt: skip


def _jobs_of(service: Service, client: str, task: str) -> list[Job]:
    """This client's A1111 jobs, or the one with this `force_task_id`."""
    return [
        j
        for j in service.unfinished(client)
        if j.request.dialect == "a1111" and (not task or j.request.task == task)
    ]


def _state(job: Job | None, count: int) -> dict[str, Any]:
    steps = job.prepared.steps if job else 0
    return {
        "skipped": False, "interrupted": bool(job and job.cancelled.is_set()), "stopping_generation": False,
        "job": (job.request.task or job.id) if job else "", "job_count": count,
        "job_timestamp": _stamp(job.created if job else time.time()), "job_no": 0,
        "sampling_step": job.done % steps if job and steps else 0, "sampling_steps": steps,
    }  # fmt: skip


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
