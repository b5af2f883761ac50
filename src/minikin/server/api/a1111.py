"""A1111's API, as far as `webuiapi` and Open WebUI call it.

Clients always send some 45 keys: those without a meaning here are ignored; those that would change the server,
run scripts or need a missing feature are rejected with a sentence. Errors have 4xx codes. A client can
interrupt only its jobs (by key and Basic user name), or the one job it named with `force_task_id`.
"""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from minikin.images.metadata import parse_parameters
from minikin.server.api.a1111_options import digest, title
from minikin.server.api.shared import known_fields, prompts_or_recorded, seed_of
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
HARMLESS = ("CLIP_stop_at_last_layers", "sd_model_checkpoint", "samples_format", "eta_noise_seed_delta")
UNSUPPORTED = "unsupported_field"
MIN_STRENGTH = 0.01


class Txt2Img(BaseModel):
    """The fields of /txt2img that are read; all others are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = Field(-1, ge=-1, lt=2**63)
    subseed_strength: float | None = 0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = Field(1, ge=1, le=1000)
    n_iter: int | None = Field(1, ge=1, le=1000)
    styles: list[str] | None = None
    enable_hr: bool | None = False
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = True
    force_task_id: str | None = Field(None, max_length=80)
    preset: str | None = None
    concepts: dict[str, str] | None = None


class Img2Img(Txt2Img):
    """The further fields of /img2img that are read."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    mask_blur: int | None = Field(4, ge=0, le=256)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=1024)
    inpainting_mask_invert: int | None = 0
    include_init_images: bool | None = False


@router.post("/txt2img", response_class=JSONResponse)
@enqueues_jobs
async def txt2img(request: Request, body: Txt2Img) -> Response:
    """Generate images from a prompt."""
    return await _answer(request, "paint", body, {}, None)


@router.post("/img2img", response_class=JSONResponse)
@carries_images
@enqueues_jobs
async def img2img(request: Request, body: Img2Img) -> Response:
    """Refine an image, or inpaint it where a mask is white."""
    kind = "refine" if body.mask is None else "inpaint"
    image = await decoded(request, body.init_images[0], "init_images")
    body.prompt, body.negative_prompt = prompts_or_recorded(body.prompt, body.negative_prompt, image)
    # A1111's 0 changes nothing; here at least one step runs
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    extra: dict[str, Any] = {"strength": max(MIN_STRENGTH, strength)}
    images = {"image": image.convert("RGB")}
    if body.mask is not None:
        mask = await decoded(request, body.mask, "mask")
        images["mask"] = _resized_mask(mask, image.size, invert=bool(body.inpainting_mask_invert))
        extra |= {"feather": body.mask_blur, "only_masked": body.inpaint_full_res,
                 "padding": body.inpaint_full_res_padding}  # fmt: skip
    return await _answer(request, kind, body, extra, images)


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
    _check_settings(service_of(request), body)


# ---- recipes inside images -------------------------------------------------------------------


@router.post("/png-info")
@carries_images
async def png_info(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """The generation metadata of an image."""
    image = await decoded(request, body.get("image"), "image")
    text = str(image.info.get("parameters", ""))
    prompt, negative, settings = parse_parameters(text)
    parameters = {"Prompt": prompt, "Negative prompt": negative, **settings} if text else {}
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": parameters}


# ---- requests and answers ----------------------------------------------------------------------


def recipe_fields(service: Service, kind: str, body: Txt2Img) -> dict[str, Any]:
    """The recipe's fields for this request; raises RequestRejected for unsupported ones."""
    for name, value in (("script_name", body.script_name), ("alwayson_scripts", body.alwayson_scripts),
                         ("styles", body.styles), ("enable_hr", body.enable_hr),
                         ("subseed_strength", body.subseed_strength)):  # fmt: skip
        if value:
            raise invalid_field(name, f"{name} is not offered here: leave it out.", code=UNSUPPORTED)
    _check_settings(service, body.override_settings or {})
    n = (body.batch_size or 1) * (body.n_iter or 1)
    fields: dict[str, Any] = {
        "prompt": body.prompt, "negative": body.negative_prompt or "", "n": n, "seed": seed_of(body.seed),
        "steps": body.steps, "guidance": body.cfg_scale, "width": body.width, "height": body.height,
        "preset": body.preset, "scheduler": sampler(body.sampler_name or body.sampler_index),
        "schedule": body.scheduler,
    }  # fmt: skip
    if kind == "inpaint":  # keeps its image's size
        fields["width"] = fields["height"] = None
    return known_fields(kind, fields)


def sampler(name: str | None) -> str | None:
    """The sampler's name; None for the base's default."""
    return None if not name or name.lower() == "automatic" else name


async def _answer(
    request: Request, kind: str, body: Txt2Img, extra: dict[str, Any], images: dict[str, Image.Image] | None
) -> Response:  # fmt: skip
    service = service_of(request)
    fields = {**await run_in_threadpool(recipe_fields, service, kind, body), **known_fields(kind, extra)}
    job_request = JobRequest(kind, client_of(request), "a1111", body.force_task_id or "", blocking=True)
    job = await submit(request, job_request, fields, body.concepts, JobInputs(images) if images else None)
    try:
        await wait_for_job(request, job)
    except RequestRejected as e:
        result = job.result or {}
        if e.code != "cancelled" or "interrupted" not in result:
            raise
        last = result["interrupted"]  # as A1111 does: an interrupted request returns the last preview
        return JSONResponse(
            {"images": [last] if last else [], "parameters": _parameters(body), "info": _info(job, fields)}
        )
    files = await result_files(request, job) if body.send_images is not False else []
    return JSONResponse(
        {"images": [b64(f) for f in files], "parameters": _parameters(body), "info": _info(job, fields)}
    )  # fmt: skip


def _parameters(body: Txt2Img) -> dict[str, Any]:
    """The request's parameters, without its images."""
    return body.model_dump(exclude={"init_images", "mask"})


def _info(job: Job, fields: dict[str, Any]) -> str:
    seeds = [p.seed for p in job.images] or job.seeds
    size = (job.images[0].width, job.images[0].height) if job.images else (0, 0)
    n = len(seeds)
    return json.dumps({
        "prompt": fields.get("prompt", ""), "all_prompts": [fields.get("prompt", "")] * n,
        "negative_prompt": fields.get("negative", ""), "all_negative_prompts": [fields.get("negative", "")] * n,
        "seed": seeds[0] if seeds else -1, "all_seeds": seeds, "subseed": -1, "all_subseeds": [-1] * n,
        "subseed_strength": 0, "width": size[0], "height": size[1],
        "sampler_name": fields.get("scheduler") or "base default", "cfg_scale": fields.get("guidance"),
        "steps": job.prepared.steps, "batch_size": n, "restore_faces": False,
        "denoising_strength": fields.get("strength"),
        "extra_generation_params": {}, "index_of_first_image": 0, "styles": [], "clip_skip": 1,
        "infotexts": [job.infotexts[p.number] for p in job.images], "job_timestamp": _stamp(job.created),
        "is_using_inpainting_conditioning": False, "warnings": job.notes,
        "concepts": {name: p.sha256 for name, p in job.prepared.concepts.items()},
        "interrupted": job.status == "cancelled",
        # per image, as A1111's filter extensions report it
        "nsfw": [job.verdict(p.number) is not None for p in job.images],
        "content_filter": [(job.verdict(p.number) or {}).get("action") for p in job.images],
    })  # fmt: skip


def _check_settings(service: Service, settings: dict[str, Any]) -> None:
    """Raise RequestRejected (422) for settings that would change something."""
    for name, value in settings.items():
        if name not in HARMLESS:
            raise invalid_field(
                name[:60], f"The option '{name[:60]}' cannot be set over HTTP.", code=UNSUPPORTED
            )
        names = service.engine.name, title(service), digest(service)
        if name == "sd_model_checkpoint" and value not in names:
            message = f"The base is '{names[0]}' and is chosen when the server is started, with --base."
            raise invalid_field(name, message, code=UNSUPPORTED)


def _resized_mask(mask: Image.Image, size: tuple[int, int], *, invert: bool) -> Image.Image:
    grey = mask.convert("L") if mask.size == size else mask.convert("L").resize(size, Image.Resampling.BILINEAR)
    return ImageChops.invert(grey) if invert else grey


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
