"""The native API's concepts: list, upload, download, delete, teach."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from minikin.images.photos import Photo, on_white
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import Teach
from minikin.server import decode, serializers
from minikin.server.concept_store import Entry
from minikin.server.engine import Given
from minikin.server.errors import Refused, wrong
from minikin.server.http import (
    StrictRoute,
    answered,
    client_of,
    parse_json,
    queued,
    service_of,
    submit,
    uploads,
)
from minikin.server.jobs import Asked
from minikin.server.service import Service

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)


@router.get("/concepts")
async def concepts(
    request: Request, search: str = "", category: str = "", limit: int | None = Query(None, ge=0, lt=2**31),
    offset: int = Query(0, ge=0, lt=2**31),
) -> dict[str, Any]:  # fmt: skip
    """The concepts you can name: your own, and this server's library. search: a part of the name."""
    service, client = service_of(request), client_of(request)

    def listed() -> dict[str, Any]:
        entries = service.shelf.entries(client)
        newest = {e.name: e for e in entries}
        told = []
        for e in entries:
            if search.lower() in e.name:
                with suppress(Refused):  # it was deleted meanwhile
                    told.append(
                        {**serializers.concept(e), **_inside(service, e), "newest": newest[e.name] is e}
                    )
        told = [one for one in told if category in ("", one["category"])]
        return {"concepts": told[offset:][:limit], "total": len(told)}

    return await run_in_threadpool(listed)


def _inside(service: Service, entry: Entry) -> dict[str, Any]:
    """Of the library's concepts what its index knows: no file is opened."""
    if entry.listed is not None:
        return serializers.listed(entry.listed)
    return serializers.inside(service.shelf.pinned(entry.name, entry).concept)


@router.post("/concepts", status_code=201)
@uploads
async def upload(request: Request, file: UploadFile = File(), name: str | None = Form(None)) -> dict[str, Any]:
    """Upload a concept file; of two with one name the newer is meant."""
    service, client = service_of(request), client_of(request)
    data = await file.read(service.limits.concept + 1)

    def put() -> dict[str, Any]:
        entry = service.shelf.put(client, data, name or None)
        return serializers.concept(entry, service.shelf.pinned(entry.name, entry).concept.category)

    return await run_in_threadpool(put)


@router.post("/concepts/teach", status_code=202, response_class=JSONResponse)
@uploads
@queued
async def teach(
    request: Request, photos: list[UploadFile] = File(),
    recipe: str = Form(description="JSON of the Teach recipe"),
    masks: list[UploadFile] | None = File(None), wait: bool = False,
) -> Response:  # fmt: skip
    """Teach a concept from photos. masks: one for each photo, in their order, white where the subject is."""
    values = parse_json(recipe.encode())
    if not isinstance(values, dict):
        raise wrong("recipe", "recipe is a JSON object with name and category.")
    service = service_of(request)
    asked: Teach = Teach.make(**{"base": service.engine.name, **values})
    check_name(asked.name)
    check_category(asked.category)
    if asked.captions or asked.device or asked.dtype:
        raise wrong(
            "recipe", "captions, device and dtype are the server's own: leave them out.", code="bad_recipe"
        )
    given = Given(many={"photos": await photos_of(request, photos, masks)})
    job = await submit(request, Asked("teach", client_of(request), "native", "", wait), values, None, given)
    return await answered(request, job, wait)


@router.get("/concepts/{ref}")
async def download(request: Request, ref: str) -> Response:
    """The concept's file, by name or by `sha256:...`."""
    service, client = service_of(request), client_of(request)

    def read() -> tuple[str, bytes]:
        entry = service.shelf.find(client, ref)
        return entry.name, service.shelf.data(entry)

    name, data = await run_in_threadpool(read)
    told = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=told)


@router.delete("/concepts/{ref}")
async def delete(request: Request, ref: str) -> dict[str, Any]:
    """Remove a concept of yours, every content of that name, or one content by its hash."""
    gone = await run_in_threadpool(service_of(request).shelf.delete, client_of(request), ref)
    return {"deleted": [serializers.concept(e) for e in gone]}


async def photos_of(
    request: Request, photos: list[UploadFile], masks: list[UploadFile] | None = None
) -> list[Photo]:
    """Photos for teaching with their masks; raises Refused."""
    service = service_of(request)
    if not 1 <= len(photos) <= service.limits.photos:
        said = f"Send 1 to {service.limits.photos} photos; 3 to 6 are best."
        raise wrong("photos", said, code="bad_photo")
    if masks and len(masks) != len(photos):
        raise wrong("masks", f"There are {len(photos)} photos and {len(masks)} masks.", code="bad_photo")
    files = [(p, f"photo {k + 1}") for k, p in enumerate(photos)]
    files += [(m, f"mask {k + 1}") for k, m in enumerate(masks or [])]
    shown, left = [], service.limits.photos_pixels
    for file, what in files:
        shown.append(await _uploaded(service, file, what))
        left -= shown[-1].width * shown[-1].height
        if left < 0:
            most = service.limits.photos_pixels / 1e6
            said = (
                f"The photos and masks have more than {most:.0f} megapixels in all. Send smaller or fewer ones."
            )
            raise Refused(said, status=413, code="image_too_large", param="photos")
    covers = shown[len(photos) :]
    return await run_in_threadpool(
        lambda: [_photo(k, p, covers[k] if covers else None) for k, p in enumerate(shown[: len(photos)])]
    )


async def _uploaded(service: Service, file: UploadFile, what: str) -> Image.Image:
    data = await file.read(service.limits.image + 1)
    return await run_in_threadpool(decode.decode, data, what, service.limits)


def _photo(k: int, image: Image.Image, cover: Image.Image | None) -> Photo:
    """A photo for teaching; its name says nothing of the file it came from."""
    mask = None
    if cover is not None:
        grey = cover.getchannel("A") if "A" in cover.getbands() else cover.convert("L")
        mask = np.asarray(grey.resize(image.size, Image.Resampling.BILINEAR), np.float32) / 255
    elif "A" in image.getbands():
        mask = np.asarray(image.getchannel("A"), np.float32) / 255
    return Photo(f"{k:03}.png", np.asarray(on_white(image)).copy(), mask)
