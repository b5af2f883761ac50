"""The native API's gallery: every image of a client that is still there, searched, marked and deleted."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from minikin.server import serializers
from minikin.server.archive import zipped
from minikin.server.errors import RequestRejected, not_found
from minikin.server.http import Strict, StrictRoute, client_of, jpeg, service_of
from minikin.server.image_folder import file_name
from minikin.server.jobs import stored_verdict
from minikin.server.service import Service

router = APIRouter(prefix="/api", tags=["native"], route_class=StrictRoute)
MAX_LISTED = 200
THUMBNAIL_PX = 256  # longest side


class ImageChange(Strict):
    """What can be changed about an image."""

    favourite: bool = Field(description="whether it is one of your favourites")


class Selection(Strict):
    """Some images."""

    ids: list[str] = Field(min_length=1, max_length=MAX_LISTED, description="ids of images")


@router.get("/images")
async def images(
    request: Request, search: str = Query("", max_length=400), favourite: bool = False,
    limit: int = Query(MAX_LISTED, ge=0, le=MAX_LISTED), offset: int = Query(0, ge=0, lt=2**31),
) -> dict[str, Any]:  # fmt: skip
    """Your images, newest first. search: a part of the prompt. favourite: favourites alone."""
    service, client = service_of(request), client_of(request)

    def listed() -> dict[str, Any]:
        total, rows = service.store.gallery(client, search, favourite, limit, offset)
        return {"images": [_view(service, row) for row in rows], "total": total}

    return await run_in_threadpool(listed)


def _row(service: Service, client: str, id_: str) -> dict[str, Any]:
    """An image of the store with the kind and recipe of its job; raises RequestRejected (404)."""
    row = service.store.image(id_, client)
    job = service.store.job(row["job"]) if row else None
    if row is None or job is None:
        raise not_found("image", id_)
    return {**row, "kind": job["kind"], "recipe": job["recipe"]}


def _name(service: Service, row: dict[str, Any]) -> str:
    return file_name(service.writer.path(row["id"]), row["kind"], row["recipe"], row["seed"])


def _view(service: Service, row: dict[str, Any]) -> dict[str, Any]:
    name = _name(service, row)
    verdict = stored_verdict(row["result"], row["number"])
    return {
        **serializers.image_json(row, name, verdict=verdict), "kind": row["kind"], "created": row["made"],
        "about": serializers.about(row["kind"], row["recipe"]), "favourite": bool(row["favourite"]),
    }  # fmt: skip


@router.get("/images/{id}/family")
async def family(request: Request, id: str) -> dict[str, Any]:
    """An image with those it was made from and all that were made from these, oldest first; at most 200, the
    nearest, and `more` says whether there are others. `parent`: the id of the image each was made from, "" for
    none. Of images sent in a request the server knows no parent."""
    service, client = service_of(request), client_of(request)

    def listed() -> dict[str, Any]:
        if service.store.image(id, client) is None:
            raise not_found("image", id)
        rows, more = service.store.family(client, id)
        return {"images": [{**_view(service, row), "parent": row["parent"]} for row in rows], "more": more}

    return await run_in_threadpool(listed)


@router.post("/images/archive", response_class=StreamingResponse)
async def archive(request: Request, body: Selection) -> Response:
    """A ZIP of these images, each a PNG with its recipe inside, and all recipes in `recipes.json`; images that
    are not there any more are listed in `missing.txt`."""
    service, client = service_of(request), client_of(request)

    def images() -> list[tuple[str, dict[str, Any], str]]:
        rows = []
        for id_ in dict.fromkeys(body.ids):
            with suppress(RequestRejected):
                rows.append(_row(service, client, id_))
        return [(_name(service, row), row["recipe"] | {"seed": row["seed"]}, row["id"]) for row in rows]

    there = await run_in_threadpool(images)
    if not there:
        raise not_found("image", body.ids[0])
    missing = sorted(set(body.ids) - {id_ for _, _, id_ in there})
    stream = zipped(there, lambda id_: service.read(client, id_), missing)
    headers = {"Content-Disposition": 'attachment; filename="images.zip"'}
    return StreamingResponse(stream, media_type="application/zip", headers=headers)


@router.patch("/images/{id}")
async def change(request: Request, id: str, body: ImageChange) -> dict[str, Any]:
    """Make an image a favourite, or no favourite any more."""
    service, client = service_of(request), client_of(request)
    if await run_in_threadpool(service.store.image, id, client) is None:
        raise not_found("image", id)
    await run_in_threadpool(service.store.set_favourite, id, body.favourite)
    return {"id": id, "favourite": body.favourite}


@router.delete("/images/{id}")
async def delete(request: Request, id: str) -> dict[str, Any]:
    """Delete an image, also the file in the folder of the person who uses this server alone. A file there that
    has another content by now stays; while that folder is not there, nothing is deleted."""
    await run_in_threadpool(service_of(request).delete_image, client_of(request), id)
    return {"id": id, "deleted": True}


@router.get("/images/{id}/thumbnail")
async def thumbnail(request: Request, id: str) -> Response:
    """A small JPEG of an image, with its mark."""
    service, client = service_of(request), client_of(request)

    def shrunk() -> bytes:
        with Image.open(io.BytesIO(service.read(client, id))) as image:
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            return jpeg(image, service.marking)

    data = await run_in_threadpool(shrunk)
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})
