"""A1111's lists: models, samplers, LoRAs, embeddings, and the routes that have nothing to list."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from minikin.generation.schedulers import SCHEDULERS, SCHEDULES
from minikin.server.api.a1111_fields import OPTIONS
from minikin.server.errors import RequestRejected
from minikin.server.http import StrictRoute, client_of, service_of
from minikin.server.service import Service

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], route_class=StrictRoute)


def title(service: Service) -> str:
    """The base's name as A1111 writes checkpoints: with the first digits of its hash."""
    return f"{service.engine.name} [{digest(service)[:10]}]"


def digest(service: Service) -> str:
    """The base's fingerprint."""
    return str(service.engine.describe()["base"]["fingerprint"])


def names_of(service: Service) -> tuple[str, ...]:
    """The base's names as clients write them; the first is the one to show."""
    name, hash_ = service.engine.name, digest(service)
    file = f"{name}.safetensors"
    return name, title(service), file, f"{file} [{hash_[:10]}]", hash_, hash_[:10]


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """Which base is open, and what is as it is; all of it may be posted back."""
    service = service_of(request)
    return {"sd_model_checkpoint": title(service), "sd_checkpoint_hash": digest(service), **OPTIONS}


@router.get("/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    service = service_of(request)
    name = service.engine.name
    return [{"title": title(service), "model_name": name, "hash": digest(service)[:10],
             "sha256": digest(service), "filename": f"{name}.safetensors", "config": None}]  # fmt: skip


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    return [{"name": n, "aliases": [n.lower().replace(" ", "_")], "options": {}} for n in SCHEDULERS]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    return [
        {"name": label.lower().replace(" ", "_"), "label": label, "aliases": None, "default_rho": -1,
         "need_inner_model": False}
        for label in ("Automatic", *SCHEDULES)
    ]  # fmt: skip


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    description = await run_in_threadpool(service_of(request).engine.describe)
    return [{"name": n, "alias": n, "path": f"{n}.safetensors", "metadata": {}} for n in description["loras"]]


@router.get("/embeddings")
async def embeddings(request: Request) -> dict[str, Any]:
    """The client's concepts, written <name> in prompts."""
    service, client = service_of(request), client_of(request)
    entries = await run_in_threadpool(service.concept_store.entries, client)
    entry = {"step": None, "sd_checkpoint": digest(service)[:10], "sd_checkpoint_name": service.engine.name,
           "shape": 0, "vectors": 1}  # fmt: skip
    return {"loaded": {e.name: {**entry, "sha256": e.sha256} for e in entries}, "skipped": {}}


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    return {"txt2img": [], "img2img": []}


@router.get("/upscalers")
@router.get("/latent-upscale-modes")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/sd-vae")
@router.get("/sd-modules")
@router.get("/script-info")
async def none() -> list[Any]:
    """There are none of these here."""
    return []


@router.get("/cmd-flags")
@router.get("/memory")
async def nothing_to_tell() -> dict[str, Any]:
    """Empty: flags and memory of the server are not public."""
    return {}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
@router.post("/refresh-vae")
async def nothing_to_do() -> None:
    """Nothing to refresh: files are looked up whenever they are named."""


@router.post("/extra-single-image")
@router.post("/extra-batch-images")
@router.post("/interrogate")
@router.post("/unload-checkpoint")
@router.post("/reload-checkpoint")
async def not_here(request: Request) -> None:
    raise RequestRejected(f"{request.url.path} is not offered here.", status=501, code="not_implemented")
