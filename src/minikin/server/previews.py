"""Preview routes: the recipe inside an image, the preview of a concept, masks proposed for photos."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from minikin.generation.recorded_fields import recipe_fields
from minikin.images import xmp
from minikin.images.metadata import Recorded, recorded, texts_of
from minikin.perfusion.concept import check_category
from minikin.recipes import Teach
from minikin.server import serializers
from minikin.server.api.native_concepts import photos_of
from minikin.server.engine import JobInputs
from minikin.server.errors import not_found
from minikin.server.http import (
    StrictRoute,
    accepts_forms,
    client_of,
    decoded,
    enqueues_jobs,
    service_of,
    submit,
)
from minikin.server.jobs import JobRequest

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)


@router.post("/recipe")
@accepts_forms
async def recipe(request: Request, file: UploadFile = File()) -> dict[str, Any]:
    """The generation metadata of an image, by Minikin or another program; `fields`: as options of paint."""
    image = await decoded(request, await file.read(service_of(request).limits.image + 1), "the image")
    record = recorded(texts_of(image))
    return {
        "size": list(image.size), "prompt": record.prompt, "negative": record.negative,
        "settings": record.settings, "seed": record.recipe.get("seed"), "made": record.recipe,
        "chain": _chain(record), "source_type": xmp.source_type_of(image),
        "fields": recipe_fields(record, image.size),
    }  # fmt: skip


def _chain(record: Recorded) -> list[dict[str, Any]]:
    """The lineage of an image, oldest first: type of work, seed, preset."""
    steps, facts = [], record.recipe
    while facts:
        recipe: Any = facts.get("recipe")
        recipe = recipe if isinstance(recipe, dict) else {}
        steps.append({
            "work": facts.get("work", "paint"), "seed": facts.get("seed"), "preset": facts.get("preset"),
            "prompt": recipe.get("prompt", ""), "strength": recipe.get("strength"),
        })  # fmt: skip
        parent = facts.get("parent")
        facts = parent.get("made", {}) if isinstance(parent, dict) else {}
    return steps[::-1]


@router.get("/concepts/{ref}/preview")
async def preview(request: Request, ref: str) -> Response:
    """The small image inside a concept's file."""
    service, client = service_of(request), client_of(request)

    def read() -> bytes:
        entry = service.concept_store.find(client, ref)
        return service.concept_store.pinned(entry.name, entry).concept.preview

    data = await run_in_threadpool(read)
    if not data:
        raise not_found("preview of a concept", ref)
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


@router.post("/masks", status_code=202, response_class=JSONResponse)
@accepts_forms
@enqueues_jobs
async def masks(
    request: Request, photos: list[UploadFile] = File(), category: str = Form(max_length=80)
) -> dict[str, Any]:
    """Find a category in photos: a job whose images are the masks, white where it is, in the photos' order."""
    check_category(category)
    values = {"name": "x", "category": category, "base": service_of(request).engine.name}
    Teach.make(**values)
    inputs = JobInputs(photos=await photos_of(request, photos))
    job = await submit(request, JobRequest("masks", client_of(request)), values, None, inputs)
    return serializers.job_json(service_of(request), job)
