"""Bugs, by name, that a server might have: each plants itself through a `pytest.MonkeyPatch`, before the server
is made. test_port_controls and test_load_controls say which test must find which."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Request, Response

from minikin import events, strict_json
from minikin.errors import BaseMismatch
from minikin.server import app, http, limits, middleware, serializers, service
from minikin.server import errors as server_errors
from minikin.server.api import a1111, a1111_fields, a1111_options, native, native_concepts
from minikin.server.concept_store import ConceptStore, Entry
from minikin.server.errors import RequestRejected
from minikin.server.job_store import JobStore
from minikin.server.queue import JobQueue
from minikin.server.service import Service
from minikin.server.worker import Worker
from tests.helpers import fake_engine
from tests.robustness import test_open_port_values as what

Patch = pytest.MonkeyPatch


# ---- who gets at what --------------------------------------------------------------------------


def jobs_of_all(patch: Patch) -> None:
    patch.setattr(Service, "job", lambda self, client, id_: self._jobs.get(id_))


def ended_jobs_of_all(patch: Patch) -> None:
    """The owner is looked at in memory, not in the store."""
    real = native._view

    def view(service: Service, client: str, id_: str, row: Any = None) -> Any:
        matches = service.store.job(id_)
        if matches is None or id_ in service._jobs:
            return real(service, client, id_, row)
        return serializers.stored_job_json(matches, service.store.images(id_))

    patch.setattr(native, "_view", view)


def another_status_for_others(patch: Patch) -> None:
    real = native._view

    def view(service: Service, client: str, id_: str, row: Any = None) -> Any:
        matches = service.store.job(id_)
        if matches is not None and matches["client"] != client:
            raise RequestRejected("It is somebody else's.", status=403, code="not_yours")
        return real(service, client, id_, row)

    patch.setattr(native, "_view", view)


def more_work_for_others(patch: Patch) -> None:
    """What is there is looked through before it is looked at whose it is."""
    real, all_of_it = Service.job, bytes(20_000_000)

    def job(self: Service, client: str, id_: str) -> Any:
        if id_ in self._jobs:
            hashlib.sha256(all_of_it)
        return real(self, client, id_)

    patch.setattr(Service, "job", job)


def images_of_all(patch: Patch) -> None:
    def image(self: JobStore, id_: str, client: str) -> Any:
        return next(iter(self._rows("SELECT * FROM pictures WHERE id=?", id_)), None)

    patch.setattr(JobStore, "image", image)


def one_store_for_all(patch: Patch) -> None:
    def owned(self: ConceptStore, client: str) -> list[Entry]:
        return [Entry(r["name"], r["sha256"], True) for r in self.store._rows("SELECT name, sha256 FROM shelf")]

    patch.setattr(ConceptStore, "_owned", owned)


def flags_are_told(patch: Patch) -> None:
    """As A1111 does."""
    more = APIRouter(prefix="/sdapi/v1")
    more.get("/cmd-flags")(lambda: {"argv": sys.argv})
    patch.setattr(a1111_options.router, "routes", [*more.routes, *a1111_options.router.routes])


def the_base_is_a_path(patch: Patch) -> None:
    """As A1111 writes its checkpoints."""
    patch.setattr(a1111_options, "title", lambda s: f"{s.folder}/{s.engine.name}.safetensors")


def uvicorn_says_its_name(patch: Patch) -> None:
    real = app.listening
    patch.setattr(app, "listening", lambda *a, **k: real(*a, **{**k, "server_header": True}))


def interrupt_is_for_all(patch: Patch) -> None:
    patch.setattr(Service, "unfinished", lambda self, client: self._unfinished())


def a_task_is_anybodys(patch: Patch) -> None:
    real = a1111._jobs_of

    def jobs_of(service: Service, client: str, task: str) -> Any:
        same_task = [job for job in service._unfinished() if job.request.task == task]
        return same_task if task else real(service, client, task)

    patch.setattr(a1111, "_jobs_of", jobs_of)


def settings_are_taken(patch: Patch) -> None:
    for module in (a1111, a1111_fields):
        patch.setattr(module, "check_settings", lambda *_, **__: None)


def scripts_are_left_alone(patch: Patch) -> None:
    """What is not there is not told: the image is another one than was asked for."""
    real, names = (
        a1111.recipe_fields,
        ("script_name", "alwayson_scripts", "styles", "enable_hr", "subseed_strength"),
    )
    patch.setattr(
        a1111,
        "recipe_fields",
        lambda kind, body, base: real(kind, body.model_copy(update=dict.fromkeys(names)), base),
    )


def saved_where_it_says(patch: Patch) -> None:
    real = http.parse_json

    def parse(body: bytes) -> Any:
        matches = real(body)
        if isinstance(matches, dict) and matches.get("save_images"):
            Path(matches["outpath_samples"]).mkdir()
        return matches

    patch.setattr(http, "parse_json", parse)


def any_host(patch: Patch) -> None:
    """As servers answer that are not made for a local user."""
    patch.setattr(middleware.AccessMiddleware, "_check_host", lambda self, headers: None)


def any_origin(patch: Patch) -> None:
    patch.setattr(middleware.AccessMiddleware, "_check_origin", lambda self, headers: None)


def any_type(patch: Patch) -> None:
    """JSON is read whatever it says it is."""
    patch.setattr(middleware.AccessMiddleware, "_check_type", lambda self, headers: None)


def a_form_everywhere(patch: Patch) -> None:
    patch.setattr(a1111.txt2img, "accepts_forms", True, raising=False)


# ---- what it may be asked ----------------------------------------------------------------------


def no_limits(patch: Patch) -> None:
    patch.setattr(service, "check_paint", lambda *_: None)


def no_cap_on_cost(patch: Patch) -> None:
    """Each number alone is looked at, not all together; the images are drawn small, for this to be quick."""
    real_draw = fake_engine.draw

    def check(recipe: Any, most: limits.Limits, *more: Any) -> None:
        limits.check_paint(recipe, replace(most, cost=1e9), *more)

    patch.setattr(service, "check_paint", check)
    patch.setattr(fake_engine, "draw", lambda data, size: real_draw(data, (64, 64)))


def refused_when_it_waits(patch: Patch) -> None:
    """Accepted and written down first."""
    real = Service.submit

    def submit(self: Service, *job_request: Any) -> Any:
        job = real(self, *job_request)
        try:
            limits.check_paint(job.prepared.recipe, self.limits, self.engine.side)  # type: ignore[arg-type]
        except RequestRejected:
            self.cancel(job)
            raise
        return job

    no_limits(patch)
    patch.setattr(Service, "submit", submit)


def truth_is_one(patch: Patch) -> None:
    """A parser that knows no difference between true and 1."""
    real = http.parse_json

    def parse(body: bytes) -> Any:
        matches = real(body)
        plain = isinstance(matches, dict)
        return {k: 1 if v is True else v for k, v in matches.items()} if plain else matches

    patch.setattr(http, "parse_json", parse)


def each_tag_looks_at_all_before(patch: Patch) -> None:
    """As prompts were once read: twice as long takes four times as long, here 0.4 s for 32,000 characters."""

    def read(text: str) -> None:
        until = time.thread_time() + 0.4 * (len(text) / 32_000) ** 2
        while time.thread_time() < until:
            pass

    patch.setattr(what, "concept_tags", read)


def nan_is_a_number(patch: Patch) -> None:
    patch.setattr(strict_json, "_refused", float)


def numbers_without_end(patch: Patch) -> None:
    patch.setattr(strict_json, "_finite", float)


def the_last_of_two_keys(patch: Patch) -> None:
    patch.setattr(strict_json, "_unique", dict)


def depth_without_end(patch: Patch) -> None:
    patch.setattr(http, "MAX_DEPTH", 1000)


def json_as_python_reads_it(patch: Patch) -> None:
    patch.setattr(http, "parse_json", json.loads)


# ---- how much, how large, how often ------------------------------------------------------------


def chunks_are_not_counted(patch: Patch) -> None:
    """Only what Content-Length says is looked at."""

    async def serve(self: Any, scope: Any, receive: Any, send: Any, *_: Any) -> None:
        await self.app(scope, receive, send)

    patch.setattr(middleware.AccessMiddleware, "_serve", serve)


def lengths_are_not_looked_at(patch: Patch) -> None:
    """Only what has come is counted."""
    real = middleware.AccessMiddleware._authenticate
    patch.setattr(http, "_limited", lambda request, most: request.receive)
    patch.setattr(
        middleware.AccessMiddleware,
        "_authenticate",
        lambda self, scope, h: real(self, scope, {**h, "content-length": "1"}),
    )


def forms_of_a_thousand(patch: Patch) -> None:
    """The framework's own limit."""
    patch.setattr(http.StrictRequest, "_get_form", Request._get_form)


def bytes_as_they_came(patch: Patch) -> None:
    """With what followed the image."""
    real = Service.read
    patch.setattr(Service, "read", lambda *a: real(*a) + b"<html><script>alert(1)</script>")


def no_nosniff(patch: Patch) -> None:
    patch.delitem(middleware._HEADERS, "X-Content-Type-Options")


def no_sandbox(patch: Patch) -> None:
    patch.setattr(native, "Response", lambda data, media_type, headers: Response(data, media_type=media_type))


def the_type_of_its_name(patch: Patch) -> None:
    patch.setattr(native_concepts, "Response", lambda data, **_: Response(data, media_type="text/html"))


def the_fault_is_told(patch: Patch) -> None:
    async def response(request: Request, e: Exception) -> Response:
        return http._respond(
            request, RequestRejected(f"Internal error: {e!r}.", status=500, code="internal_error")
        )

    patch.setattr(http, "on_unexpected", response)


def conflict(patch: Patch) -> None:
    patch.setitem(server_errors._STATUS, BaseMismatch, 409)


def not_a_word_about_retrying(patch: Patch) -> None:
    patch.setattr(server_errors, "headers_of", lambda e: {})


def everything_may_be_tried_again(patch: Patch) -> None:
    real = server_errors.headers_of
    patch.setattr(
        server_errors, "headers_of", lambda e: {k: v for k, v in real(e).items() if k != "x-should-retry"}
    )


def requests_in_the_log(patch: Patch) -> None:
    real = Service.submit

    def submit(self: Service, job_request: Any, values: Any, *more: Any) -> Any:
        service.log.info("%s asks for %s", job_request.client, values)
        return real(self, job_request, values, *more)

    patch.setattr(Service, "submit", submit)


def no_cap_for_one(patch: Patch) -> None:
    real = JobQueue._check

    def check(self: JobQueue, client: str) -> None:
        real(self, "nobody")

    patch.setattr(JobQueue, "_check", check)


def first_come_first_served(patch: Patch) -> None:
    def first(self: JobQueue) -> Any:
        lines = [line for line in self._by_client.values() if line]
        return min(lines, key=lambda line: line[0].job.created).popleft() if lines else None

    patch.setattr(JobQueue, "_first", first)


def always_in_a_minute(patch: Patch) -> None:
    """All who were refused come back together."""
    full = RequestRejected("Full.", status=429, code="client_queue_full", retry_s=60.0)
    patch.setattr(JobQueue, "_rejection", lambda *_: full)


def soon_whatever_waits(patch: Patch) -> None:
    def full(self: JobQueue, why: str, code: str) -> RequestRejected:
        return RequestRejected(why, status=429, code=code, retry_s=random.uniform(1, 5))

    patch.setattr(JobQueue, "_rejection", full)


def the_door_is_open(patch: Patch) -> None:
    """Whether there is a place is asked when all has been read."""
    patch.setattr(Service, "check_open", lambda self, client: None)


def a_route_past_the_door(patch: Patch) -> None:
    patch.delattr(a1111.img2img, "enqueues_jobs")


def nobody_looks_who_is_there(patch: Patch) -> None:
    async def no(self: Any) -> bool:
        return False

    patch.setattr(http.StrictRequest, "is_disconnected", no)


def painted_to_the_end(patch: Patch) -> None:
    """The job ends, and the engine goes on."""
    real = Worker._on_step

    def on_step(self: Worker, batch: Any) -> Any:
        step = real(self, batch)

        def deaf(done: int, preview: Any) -> None:
            with suppress(events.Cancelled):
                step(done, preview)

        return deaf

    patch.setattr(Worker, "_on_step", on_step)
