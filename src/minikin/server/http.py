"""HTTP for all dialects: strict JSON and forms, errors, blocking requests, previews."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar, get_args

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from minikin import strict_json
from minikin.images.encode import Marking
from minikin.recipes import first_sentence
from minikin.server import decode, serializers
from minikin.server.errors import RequestRejected, error_response, internal
from minikin.server.jobs import Job
from minikin.server.middleware import BodyRejected
from minikin.server.service import Service

Handler = TypeVar("Handler", bound=Callable[..., Any])
MAX_DEPTH = 32
MAX_VALUES = 5_000  # numbers, texts, lists and objects of a body
SMALL = 64 * 1024  # bytes of a body that is parsed on the event loop, in less than a millisecond
BOM = b"\xef\xbb\xbf"
FIELD = 1 << 20  # bytes of a form's field that is not a file
POLL_S = 0.1  # how often a blocking request checks whether its client is still connected


class Strict(BaseModel):
    """A request in which `true` is not accepted for the number 1."""

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if (
                isinstance(value, bool)
                and field
                and bool not in (field.annotation, *get_args(field.annotation))
            ):
                raise ValueError(f"the field {name} cannot be true or false")
        return values


class StrictRequest(Request):
    """A request with strict JSON (no NaN, no duplicate keys, limited depth, valid Unicode) and small forms."""

    async def json(self) -> Any:
        """The body. A large one is parsed in a thread: the event loop goes on with other requests."""
        if not hasattr(self, "_json"):
            body = await self.body()
            small = len(body) <= SMALL
            self._json = parse_json(body) if small else await run_in_threadpool(parse_json, body)
        return self._json

    async def _get_form(self, **_: Any) -> FormData:
        most = service_of(self).limits.parts
        try:
            return await super()._get_form(max_files=most, max_fields=most, max_part_size=FIELD)
        except StarletteHTTPException as e:
            if isinstance(e, BodyRejected):
                raise
            rejection = (
                RequestRejected(
                    f"A form may have {most} files and {most} fields.", status=413, code="too_many_parts"
                )
                if e.detail.startswith("Too many")
                else RequestRejected(f"The form cannot be read: {e.detail}", status=400, code="invalid_form")
            )
            raise BodyRejected(rejection) from None


def enqueues_jobs(handle: Handler) -> Handler:
    """Marks a handler that adds a job: a full queue rejects the request before its body is read."""
    handle.enqueues_jobs = True  # type: ignore[attr-defined]
    return handle


def carries_images(handle: Handler) -> Handler:
    """Marks a handler whose JSON holds images: the body of any other is limited to `Limits.text_body`."""
    handle.carries_images = True  # type: ignore[attr-defined]
    return handle


def accepts_forms(handle: Handler) -> Handler:
    """Marks a handler that accepts forms: other routes reject them, since foreign web pages can send forms."""
    handle.accepts_forms = True  # type: ignore[attr-defined]
    return handle


class StrictRoute(APIRoute):
    """Routes whose requests are `StrictRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        enqueues = getattr(self.endpoint, "enqueues_jobs", False)
        accepts_forms = getattr(self.endpoint, "accepts_forms", False)
        large = accepts_forms or getattr(self.endpoint, "carries_images", False)

        async def strict(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").lower()
            if content_type.startswith("multipart/") and not accepts_forms:
                raise RequestRejected(
                    "This route takes no form. Send application/json.",
                    status=415,
                    code="unsupported_media_type",
                )
            if accepts_forms and content_type.startswith("application/json"):
                why = "This route takes a form: send multipart/form-data."
                raise RequestRejected(why, status=415, code="unsupported_media_type")
            if enqueues:
                service_of(request).check_open(client_of(request))
            limit = service_of(request).limits.text_body
            receive = request.receive if large else _limited(request, limit)
            return await handle(StrictRequest(request.scope, receive))

        return strict


def _limited(request: Request, most: int) -> Receive:
    """The request's `receive`, which raises BodyRejected (413) for a body of more than so many bytes."""
    stated, received = int(request.headers.get("content-length", "0")), 0

    async def receive() -> Message:
        nonlocal received
        message: Message = await request.receive() if stated <= most else {}
        received += len(message.get("body", b""))
        if max(stated, received) > most:
            size = f"{most >> 20} MiB" if most >> 20 else f"{most} bytes"
            message_text = (
                f"The body is larger than {size}, the most this call reads: no image travels with it."
            )
            raise BodyRejected(RequestRejected(message_text, status=413, code="body_too_large"))
        return message

    return receive


def parse_json(body: bytes) -> Any:
    """Strict JSON (`strict_json`); raises HTTPException (400) whose detail is the message."""
    try:
        if body.startswith(BOM):
            raise strict_json.BadJson("it begins with a byte order mark")
        return strict_json.loads(body, max_bytes=len(body), max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    except strict_json.BadJson as e:
        raise HTTPException(400, f"The body is not valid JSON: {e}.") from None


async def decoded(
    request: HTTPConnection, data: bytes | str | None, what: str, *, still: bool = False
) -> Image.Image:
    """An image of a request, from bytes or from base64; clients take turns. Raises RequestRejected.

    still  reject an animated image in bytes, of which otherwise the first frame is read
    """
    service = service_of(request)
    read: Any = partial(decode.decode, still=still) if isinstance(data, bytes) else decode.from_base64
    async with service.decoding.turn(client_of(request)):
        image: Image.Image = await run_in_threadpool(read, data, what, service.limits)
    return image


class CountedStream(StreamingResponse):
    """Server-sent events that have a place (`admission.Places`), given back when the response is over.

    Not in the generator's `finally`: one that never starts, since its client is gone, has none.
    """

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def on_http_error(request: Request, e: Exception) -> Response:
    """Errors of the framework, in the dialect's format."""
    assert isinstance(e, HTTPException) or hasattr(e, "status_code")
    if (rejection := getattr(e, "rejection", None)) is not None:
        return _respond(request, rejection)
    status = int(getattr(e, "status_code", 500))
    codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    text = str(getattr(e, "detail", "")) or "The request was not understood."
    if status == 404:
        text = f"There is nothing at {request.url.path[:120]}."
    elif status == 405:
        text = f"{request.method[:20]} does not work at {request.url.path[:120]}; /docs lists what does."
    return _respond(request, RequestRejected(text, status=status, code=codes.get(status, "bad_request")))


async def on_invalid(request: Request, e: Exception) -> Response:
    """A request that does not validate: the first problem as a sentence."""
    assert isinstance(e, RequestValidationError)
    problem = e.errors()[0]
    where = [str(p) for p in problem["loc"] if p not in ("body", "query", "path")]
    if problem["type"] == "json_invalid":
        return _respond(
            request, RequestRejected("The body is not valid JSON.", status=400, code="invalid_json")
        )
    if not where and problem["type"] != "value_error":  # of the whole body, not of its fields together
        missing = problem["type"] == "missing"
        what = "The body is missing" if missing else "The body is not an object of JSON"
        message = f'{what}: send the fields as {{"prompt": "..."}}.'
    else:
        message = first_sentence(_Problems([problem | {"loc": tuple(where)}]))  # type: ignore[arg-type]
    param = ".".join(where) or None
    return _respond(request, RequestRejected(message, status=422, code="invalid_request", param=param))


class _Problems:
    """The part of a ValidationError that `first_sentence` reads."""

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        self._problems = problems

    def errors(self, **_: Any) -> list[dict[str, Any]]:
        return self._problems


async def on_minikin_error(request: Request, e: Exception) -> Response:
    return _respond(request, e)


async def on_unexpected(request: Request, e: Exception) -> Response:
    """An internal error: its reference, and nothing else."""
    return _respond(request, internal(request.scope["state"].get("request_id", "")))


def _respond(request: Request, error: Any) -> Response:
    return error_response(error, request.url.path, request.scope["state"].get("request_id", ""))


def service_of(request: Any) -> Service:
    service: Service = request.app.state.service
    return service


def client_of(request: Any) -> str:
    client: str = request.scope["state"]["client"]
    return client


async def submit(request: Request, *args: Any, **kwargs: Any) -> Job:
    """`Service.submit` off the event loop."""
    return await run_in_threadpool(service_of(request).submit, *args, **kwargs)


async def wait_for_job(request: Request, job: Job) -> Job:
    """Wait for a job's end; a client that disconnects cancels it. Raises the job's error."""
    service = service_of(request)
    until = time.monotonic() + service.limits.queue_wait_s
    try:
        async with job.watch() as changes:
            while not job.over:
                await changes.next(POLL_S)
                if not job.over and await request.is_disconnected():
                    raise RequestRejected("The client disconnected.", status=499, code="client_gone")
                if job.status == "queued" and time.monotonic() > until:
                    raise RequestRejected(
                        f"The request waited {service.limits.queue_wait_s:.0f} s in the queue.",
                        status=503, code="queue_timeout", retry_s=service.queue.wait_s(),
                    )  # fmt: skip
    except BaseException:
        service.cancel(job)
        raise
    raise_failure(job)
    return job


async def job_response(request: Request, job: Job, wait: bool) -> Response:
    """202 and the job, or 200 and its results for a blocking request."""
    if wait:
        await wait_for_job(request, job)
    body = json.dumps(serializers.job_json(service_of(request), job)).encode()
    return Response(body, 200 if wait else 202, {"Location": f"/api/jobs/{job.id}"}, "application/json")


def raise_failure(job: Job) -> None:
    """Raise the error a job ended with, when it was not completed."""
    if job.error is not None:
        raise job.error
    if job.status == "cancelled":
        raise RequestRejected("The job was cancelled.", status=410, code="cancelled")


async def result_files(
    request: Request, job: Job, convert: Callable[[bytes], bytes] | None = None
) -> list[bytes]:
    """The files of a completed job."""
    service = service_of(request)

    def read() -> list[bytes]:
        return [(convert or bytes)(service.read_file(p)) for p in job.images]

    return await run_in_threadpool(read)


def jpeg(image: Image.Image, marking: Marking, quality: int = 75) -> bytes:
    """A preview as JPEG, with the mark and without a signature."""
    return marking.unsigned.encode(image.convert("RGB"), "JPEG", quality=quality)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def preview(service: Service, job: Job) -> str | None:
    """The current state of a job's image, a JPEG in base64."""

    def encode_preview() -> str | None:
        image = job.preview()
        return b64(jpeg(image, service.marking)) if image is not None else None

    return await run_in_threadpool(encode_preview)


def sse(event: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
