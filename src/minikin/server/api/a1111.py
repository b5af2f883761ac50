"""A1111's API, as far as `webuiapi` and Open WebUI call it.

Requests carry some 45 keys whatever is wanted: keys that mean nothing here are left alone, keys that would
change the server, run scripts or ask for what is not there are refused with a sentence. Errors have honest
4xx codes. What one client interrupts is its own: its jobs by key and Basic user name, or the one job it
named with `force_task_id`.
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

from minikin.generation.schedulers import SCHEDULERS
from minikin.images.metadata import parse_parameters
from minikin.server import decode
from minikin.server.api.a1111_options import digest, title
from minikin.server.api.shared import known, seed_of, words
from minikin.server.engine import Given
from minikin.server.errors import Refused, wrong
from minikin.server.http import StrictRoute, b64, client_of, hold, pictures, preview, queued, service_of, submit
from minikin.server.jobs import Asked, Job
from minikin.server.service import Service

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], route_class=StrictRoute)
HARMLESS = ("CLIP_stop_at_last_layers", "sd_model_checkpoint", "samples_format", "eta_noise_seed_delta")
UNSUPPORTED = "unsupported_field"
KARRAS = " Karras"
LEAST = 0.01  # strength


class Txt2Img(BaseModel):
    """What is read of /txt2img; everything else a client sends is left alone."""

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
    """What is read of /img2img besides."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    mask_blur: int | None = Field(4, ge=0, le=256)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=1024)
    inpainting_mask_invert: int | None = 0
    include_init_images: bool | None = False


@router.post("/txt2img", response_class=JSONResponse)
@queued
async def txt2img(request: Request, body: Txt2Img) -> Response:
    """Paint from a prompt."""
    return await _answer(request, "paint", body, {}, None)


@router.post("/img2img", response_class=JSONResponse)
@queued
async def img2img(request: Request, body: Img2Img) -> Response:
    """Refine an image, or inpaint it where a mask is white."""
    limits = service_of(request).limits
    kind = "refine" if body.mask is None else "inpaint"
    image = await run_in_threadpool(decode.from_base64, body.init_images[0], "init_images", limits)
    body.prompt, body.negative_prompt = words(body.prompt, body.negative_prompt, image)
    # A1111's 0 changes nothing; here at least one step runs
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    more: dict[str, Any] = {"strength": max(LEAST, strength)}
    shown = {"picture": image.convert("RGB")}
    if body.mask is not None:
        mask = await run_in_threadpool(decode.from_base64, body.mask, "mask", limits)
        shown["mask"] = _cover(mask, image.size, invert=bool(body.inpainting_mask_invert))
        more |= {"feather": body.mask_blur, "only_masked": body.inpaint_full_res,
                 "padding": body.inpaint_full_res_padding}  # fmt: skip
    return await _answer(request, kind, body, more, shown)


@router.get("/progress")
async def progress(request: Request, id_task: str = "", skip_current_image: bool = False) -> dict[str, Any]:
    """How far your own jobs are; one of them by its `force_task_id`."""
    service = service_of(request)
    mine = _mine(service, client_of(request), id_task)
    now = next((job for job in mine if job.started), mine[0] if mine else None)
    if now is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": _state(None, 0),
            "current_image": None,
            "textinfo": None,
        }
    shown = None if skip_current_image else await preview(service, now)
    share = now.done / now.total if now.total else 0.0
    wait = (1 - share) * now.prepared.cost * max(1, len(now.seeds)) * service.line.rate_s
    ahead = service.line.position(now)
    return {
        "progress": max(0.01, min(share, 0.99)), "eta_relative": round(wait, 2),
        "state": _state(now, len(mine)), "current_image": shown,
        "textinfo": f"In the queue: {ahead + 1}" if now.status == "queued" else None,
    }  # fmt: skip


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request, id_task: str = "") -> dict[str, Any]:
    """Leave your own jobs, or one of them by its `force_task_id`; nobody else's."""
    service = service_of(request)
    for job in _mine(service, client_of(request), id_task):
        job.result = {"interrupted": await preview(service, job)}
        service.cancel(job)
    return {}


@router.post("/options")
async def set_options(request: Request, body: dict[str, Any]) -> None:
    """Only what changes nothing: the base is chosen when the server is started."""
    _check_settings(service_of(request), body)


# ---- recipes inside images -------------------------------------------------------------------


@router.post("/png-info")
async def png_info(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """What an image records about how it was made."""
    image = await run_in_threadpool(decode.from_base64, body.get("image"), "image", service_of(request).limits)
    text = str(image.info.get("parameters", ""))
    prompt, negative, settings = parse_parameters(text)
    told = {"Prompt": prompt, "Negative prompt": negative, **settings} if text else {}
    return {"info": text, "items": {"parameters": text} if text else {}, "parameters": told}


# ---- requests and answers ----------------------------------------------------------------------


def values(service: Service, kind: str, body: Txt2Img) -> dict[str, Any]:
    """The recipe's fields for this request; raises Refused for what is not there."""
    for name, wanted in (("script_name", body.script_name), ("alwayson_scripts", body.alwayson_scripts),
                         ("styles", body.styles), ("enable_hr", body.enable_hr),
                         ("subseed_strength", body.subseed_strength)):  # fmt: skip
        if wanted:
            raise wrong(name, f"{name} is not offered here: leave it out.", code=UNSUPPORTED)
    _check_settings(service, body.override_settings or {})
    n = (body.batch_size or 1) * (body.n_iter or 1)
    told: dict[str, Any] = {
        "prompt": body.prompt, "negative": body.negative_prompt or "", "n": n, "seed": seed_of(body.seed),
        "steps": body.steps, "guidance": body.cfg_scale, "width": body.width, "height": body.height,
        "preset": body.preset, "scheduler": sampler(body.sampler_name or body.sampler_index, body.scheduler),
    }  # fmt: skip
    if kind == "inpaint":  # keeps its image's size
        told["width"] = told["height"] = None
    return known(kind, told)


def sampler(name: str | None, schedule: str | None) -> str | None:
    """One name from A1111's two: ("DPM++ 2M", "Karras") is "DPM++ 2M Karras"; None for the base's own."""
    if not name or name.lower() == "automatic":
        return None
    if (schedule or "").lower() == "karras" and not name.endswith(KARRAS) and name + KARRAS in SCHEDULERS:
        return name + KARRAS
    return name


async def _answer(
    request: Request, kind: str, body: Txt2Img, more: dict[str, Any], shown: dict[str, Image.Image] | None
) -> Response:  # fmt: skip
    service = service_of(request)
    told = {**await run_in_threadpool(values, service, kind, body), **known(kind, more)}
    asked = Asked(kind, client_of(request), "a1111", body.force_task_id or "", held=True)
    job = await submit(request, asked, told, body.concepts, Given(pictures=shown) if shown else None)
    try:
        await hold(request, job)
    except Refused as e:
        left = job.result or {}
        if e.code != "cancelled" or "interrupted" not in left:
            raise
        last = left["interrupted"]  # as A1111 does: an interrupted image is shown as far as it came
        return JSONResponse(
            {"images": [last] if last else [], "parameters": _asked(body), "info": _info(job, told)}
        )
    files = await pictures(request, job) if body.send_images is not False else []
    return JSONResponse(
        {"images": [b64(f) for f in files], "parameters": _asked(body), "info": _info(job, told)}
    )  # fmt: skip


def _asked(body: Txt2Img) -> dict[str, Any]:
    """What was asked for, without the images it came with."""
    return body.model_dump(exclude={"init_images", "mask"})


def _info(job: Job, told: dict[str, Any]) -> str:
    seeds = [p.seed for p in job.pictures] or job.seeds
    size = (job.pictures[0].width, job.pictures[0].height) if job.pictures else (0, 0)
    n = len(seeds)
    return json.dumps({
        "prompt": told.get("prompt", ""), "all_prompts": [told.get("prompt", "")] * n,
        "negative_prompt": told.get("negative", ""), "all_negative_prompts": [told.get("negative", "")] * n,
        "seed": seeds[0] if seeds else -1, "all_seeds": seeds, "subseed": -1, "all_subseeds": [-1] * n,
        "subseed_strength": 0, "width": size[0], "height": size[1],
        "sampler_name": told.get("scheduler") or "base default", "cfg_scale": told.get("guidance"),
        "steps": job.prepared.steps, "batch_size": n, "restore_faces": False,
        "denoising_strength": told.get("strength"),
        "extra_generation_params": {}, "index_of_first_image": 0, "styles": [], "clip_skip": 1,
        "infotexts": [job.infotexts[p.number] for p in job.pictures], "job_timestamp": _stamp(job.created),
        "is_using_inpainting_conditioning": False, "warnings": job.notes,
        "concepts": {name: p.sha256 for name, p in job.prepared.concepts.items()},
        "interrupted": job.status == "cancelled",
        # as the filters among A1111's extensions tell it: by image
        "nsfw": [job.verdict(p.number) is not None for p in job.pictures],
        "content_filter": [(job.verdict(p.number) or {}).get("action") for p in job.pictures],
    })  # fmt: skip


def _check_settings(service: Service, settings: dict[str, Any]) -> None:
    """Raise Refused, 422, for settings that would change something."""
    for name, value in settings.items():
        if name not in HARMLESS:
            raise wrong(name[:60], f"The option '{name[:60]}' cannot be set over HTTP.", code=UNSUPPORTED)
        ours = service.engine.name, title(service), digest(service)
        if name == "sd_model_checkpoint" and value not in ours:
            said = f"The base is '{ours[0]}' and is chosen when the server is started, with --base."
            raise wrong(name, said, code=UNSUPPORTED)


def _cover(mask: Image.Image, size: tuple[int, int], *, invert: bool) -> Image.Image:
    grey = mask.convert("L") if mask.size == size else mask.convert("L").resize(size, Image.Resampling.BILINEAR)
    return ImageChops.invert(grey) if invert else grey


def _mine(service: Service, client: str, task: str) -> list[Job]:
    """This client's jobs of this dialect, or the one of that name."""
    return [
        j for j in service.live(client) if j.asked.dialect == "a1111" and (not task or j.asked.task == task)
    ]


def _state(job: Job | None, count: int) -> dict[str, Any]:
    steps = job.prepared.steps if job else 0
    return {
        "skipped": False, "interrupted": bool(job and job.cancelled.is_set()), "stopping_generation": False,
        "job": (job.asked.task or job.id) if job else "", "job_count": count,
        "job_timestamp": _stamp(job.created if job else time.time()), "job_no": 0,
        "sampling_step": job.done % steps if job and steps else 0, "sampling_steps": steps,
    }  # fmt: skip


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
