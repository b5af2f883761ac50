"""The native API's concepts: list, upload, download, delete, teach."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from minikin.images.photos import Photo, alpha_mask, grey_of_mask, on_white
from minikin.perfusion.concept import check_category, check_name
from minikin.recipes import Teach
from minikin.server import serializers
from minikin.server.concept_store import Entry
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected, invalid_field
from minikin.server.http import (
    StrictRoute,
    accepts_forms,
    client_of,
    decoded,
    enqueues_jobs,
    job_response,
    parse_json,
    service_of,
    submit,
)
from minikin.server.jobs import JobRequest
from minikin.server.service import Service

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)
MAX_CAPTION = 500  # characters


@router.get("/concepts")
async def concepts(
    request: Request, search: str = "", category: str = "", limit: int | None = Query(None, ge=0, lt=2**31),
    offset: int = Query(0, ge=0, lt=2**31),
) -> dict[str, Any]:  # fmt: skip
    """The concepts you can use: yours, and this server's library. search: a part of the name."""
    service, client = service_of(request), client_of(request)

    def listed() -> dict[str, Any]:
        entries = service.concept_store.entries(client)
        newest = {e.name: e for e in entries}
        rows = []
        for e in entries:
            if search.lower() in e.name:
                with suppress(RequestRejected):  # it was deleted meanwhile
                    rows.append(
                        {**serializers.concept_json(e), **_details(service, e), "newest": newest[e.name] is e}
                    )
        rows = [row for row in rows if category in ("", row["category"])]
        return {"concepts": rows[offset:][:limit], "total": len(rows)}

    return await run_in_threadpool(listed)


def _details(service: Service, entry: Entry) -> dict[str, Any]:
    """Details of a concept; of the library's from its index, without opening a file."""
    if entry.listed is not None:
        return serializers.index_entry_details(entry.listed)
    return serializers.concept_details(service.concept_store.pinned(entry.name, entry).concept)


@router.post("/concepts", status_code=201)
@accepts_forms
async def upload(request: Request, file: UploadFile = File(), name: str | None = Form(None)) -> dict[str, Any]:
    """Upload a concept file; of two with one name the newer is used."""
    service, client = service_of(request), client_of(request)
    data = await file.read(service.limits.concept + 1)

    def put() -> dict[str, Any]:
        entry = service.concept_store.put(client, data, name or None)
        return serializers.concept_json(entry, service.concept_store.pinned(entry.name, entry).concept.category)

    return await run_in_threadpool(put)


@router.post("/concepts/teach", status_code=202, response_class=JSONResponse)
@accepts_forms
@enqueues_jobs
async def teach(
    request: Request, photos: list[UploadFile] = File(),
    recipe: str = Form(description="JSON of the Teach recipe"),
    masks: list[UploadFile] | None = File(None),
    photo_captions: str = Form("", description="JSON list with a text for each photo"), wait: bool = False,
) -> Response:  # fmt: skip
    """Teach a concept from photos. masks: one for each photo, in their order, white where the subject is.
    photo_captions: what each shows, in their order, with the category's word in it; "" for no caption."""
    values = parse_json(recipe.encode())
    if not isinstance(values, dict):
        raise invalid_field("recipe", "recipe is a JSON object with name and category.")
    service = service_of(request)
    checked: Teach = Teach.make(**{"base": service.engine.name, **values})
    check_name(checked.name)
    check_category(checked.category)
    if checked.captions or checked.device or checked.dtype:
        raise invalid_field(
            "recipe", "captions, device and dtype are set by the server: leave them out.", code="bad_recipe"
        )
    captions = _captions(photo_captions, len(photos))
    inputs = JobInputs(photos=await photos_of(request, photos, masks, captions))
    job = await submit(
        request, JobRequest("teach", client_of(request), "native", "", wait), values, None, inputs
    )
    return await job_response(request, job, wait)


@router.get("/concepts/{ref}")
async def download(request: Request, ref: str) -> Response:
    """The concept's file, by name or by `sha256:...`."""
    service, client = service_of(request), client_of(request)

    def read() -> tuple[str, bytes]:
        entry = service.concept_store.find(client, ref)
        return entry.name, service.concept_store.data(entry)

    name, data = await run_in_threadpool(read)
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/concepts/{ref}")
async def delete(request: Request, ref: str) -> dict[str, Any]:
    """Delete a concept of yours: every content of that name, or one content by its hash."""
    deleted = await run_in_threadpool(service_of(request).concept_store.delete, client_of(request), ref)
    return {"deleted": [serializers.concept_json(e) for e in deleted]}


async def photos_of(
    request: Request, photos: list[UploadFile], masks: list[UploadFile] | None = None,
    captions: Sequence[str] = (),
) -> list[Photo]:  # fmt: skip
    """Decoded photos for teaching, with their masks and captions; raises RequestRejected."""
    service = service_of(request)
    if not 1 <= len(photos) <= service.limits.photos:
        message = f"Send 1 to {service.limits.photos} photos; 3 to 6 are best."
        raise invalid_field("photos", message, code="bad_photo")
    if masks and len(masks) != len(photos):
        raise invalid_field(
            "masks", f"There are {len(photos)} photos and {len(masks)} masks.", code="bad_photo"
        )
    files = [(p, f"photo {k + 1}") for k, p in enumerate(photos)]
    files += [(m, f"mask {k + 1}") for k, m in enumerate(masks or [])]
    images, pixels_left = [], service.limits.photos_pixels
    for file, what in files:
        images.append(await decoded(request, await file.read(service.limits.image + 1), what, still=True))
        pixels_left -= images[-1].width * images[-1].height
        if pixels_left < 0:
            megapixels = service.limits.photos_pixels / 1e6
            message = (
                f"Photos and masks have more than {megapixels:.0f} megapixels in all; send fewer or smaller."
            )
            raise RequestRejected(message, status=413, code="image_too_large", param="photos")
    mask_images = images[len(photos) :]
    return await run_in_threadpool(
        lambda: [
            _photo(k, p, mask_images[k] if mask_images else None, captions[k] if captions else "")
            for k, p in enumerate(images[: len(photos)])
        ]
    )


def _captions(text: str, count: int) -> list[str]:
    """The captions of `count` photos; none where the text is empty. Raises RequestRejected."""
    captions = parse_json(text.encode()) if text.strip() else []
    texts = isinstance(captions, list) and all(isinstance(c, str) and len(c) <= MAX_CAPTION for c in captions)
    if not texts or len(captions) not in (0, count):
        raise invalid_field(
            "photo_captions",
            f"photo_captions is a JSON list of {count} texts of at most {MAX_CAPTION} characters, one for each "
            'photo; "" stands for no caption.',
        )
    return list(captions)


def _photo(k: int, image: Image.Image, mask_image: Image.Image | None, caption: str) -> Photo:
    """A photo for teaching, named by its number and not by the client's file."""
    mask = None
    if mask_image is not None:
        grey = grey_of_mask(mask_image).resize(image.size, Image.Resampling.BILINEAR)
        mask = np.asarray(grey, np.float32) / 255
    else:
        mask = alpha_mask(image)
    return Photo(f"{k:03}.png", np.asarray(on_white(image)).copy(), mask, caption.strip())
