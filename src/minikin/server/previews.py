"""What somebody who looks at the server needs besides jobs: recipes inside images, faces of concepts,
and where the subject of a photo is, before it is taught."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from minikin.images import xmp
from minikin.images.metadata import Recorded, recorded, texts_of
from minikin.perfusion.concept import check_category
from minikin.recipes import Teach
from minikin.server import decode, serializers
from minikin.server.api.native_concepts import photos_of
from minikin.server.engine import Given
from minikin.server.errors import not_found
from minikin.server.http import StrictRoute, client_of, queued, service_of, submit, uploads
from minikin.server.jobs import Asked

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)


@router.post("/recipe")
@uploads
async def recipe(request: Request, file: UploadFile = File()) -> dict[str, Any]:
    """What an image records of how it was made, ours and other programs' alike."""
    limits = service_of(request).limits
    data = await file.read(limits.image + 1)
    image = await run_in_threadpool(decode.decode, data, "the image", limits)
    found = recorded(texts_of(image))
    return {
        "size": list(image.size), "prompt": found.prompt, "negative": found.negative,
        "settings": found.settings, "seed": found.recipe.get("seed"), "made": found.recipe,
        "chain": _chain(found), "source_type": xmp.source_type_of(image),
    }  # fmt: skip


def _chain(found: Recorded) -> list[dict[str, Any]]:
    """What was done, the first image first: kind of work, seed, preset."""
    steps, made = [], found.recipe
    while made:
        told: Any = made.get("recipe")
        told = told if isinstance(told, dict) else {}
        steps.append({
            "work": made.get("work", "paint"), "seed": made.get("seed"), "preset": made.get("preset"),
            "prompt": told.get("prompt", ""), "strength": told.get("strength"),
        })  # fmt: skip
        parent = made.get("parent")
        made = parent.get("made", {}) if isinstance(parent, dict) else {}
    return steps[::-1]


@router.get("/concepts/{ref}/preview")
async def preview(request: Request, ref: str) -> Response:
    """The small image inside a concept's file."""
    service, client = service_of(request), client_of(request)

    def read() -> bytes:
        entry = service.shelf.find(client, ref)
        return service.shelf.pinned(entry.name, entry).concept.preview

    data = await run_in_threadpool(read)
    if not data:
        raise not_found("preview of a concept", ref)
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


@router.post("/masks", status_code=202, response_class=JSONResponse)
@uploads
@queued
async def masks(
    request: Request, photos: list[UploadFile] = File(), category: str = Form(max_length=80)
) -> dict[str, Any]:
    """Where a category is in photos: a job whose images are the masks, white where it is, in their order."""
    check_category(category)
    values = {"name": "x", "category": category, "base": service_of(request).engine.name}
    Teach.make(**values)
    given = Given(many={"photos": await photos_of(request, photos)})
    job = await submit(request, Asked("masks", client_of(request)), values, None, given)
    return serializers.of(service_of(request), job)
