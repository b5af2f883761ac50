"""The app: one service, three dialects, one gate.

`create` returns the FastAPI app (`app.state.service`), to which a page can be mounted, and `gated` puts
the gate in front of all of it. `serve` runs both under uvicorn until it is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from minikin import __version__
from minikin.errors import MinikinError
from minikin.server import http, live, previews, probes
from minikin.server.api import a1111, a1111_options, native, native_concepts, openai
from minikin.server.errors import described, dialect_of
from minikin.server.middleware import Guard
from minikin.server.service import Service

SWEEP_S = 60.0
log = logging.getLogger(__name__)


def create(service: Service) -> FastAPI:
    """All routes on one service; the app's life is the service's."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.start)
        sweeping = asyncio.create_task(_sweep(service))
        try:
            yield
        finally:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="Minikin", version=__version__, lifespan=life,
        description="Images from words and personal concepts: the native API, OpenAI's images and A1111's.",
        docs_url="/docs", redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    for module in (probes, native, native_concepts, previews, live, openai, a1111, a1111_options):
        app.include_router(module.router, responses=described(dialect_of(f"{module.router.prefix}/")))
    app.add_exception_handler(Exception, http.on_unexpected)
    app.add_exception_handler(MinikinError, http.on_minikin_error)
    app.add_exception_handler(RequestValidationError, http.on_invalid)
    for kind in (HTTPException, StarletteHTTPException):
        app.add_exception_handler(kind, http.on_http_error)
    return app


def gated(
    app: FastAPI, *, keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> Guard:
    """The app behind the gate: what uvicorn is given."""
    service: Service = app.state.service
    return Guard(app, keys=keys, hosts=hosts, origins=origins, limits=service.limits)


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            await run_in_threadpool(service.sweep)
        except MinikinError as e:
            log.warning("sweeping: %s", e)
        except Exception:  # whatever it is: nothing would be removed any more
            log.exception("sweeping")


def listening(guard: Guard, host: str, port: int, **more: Any) -> Any:
    """uvicorn's configuration, a `uvicorn.Config`: the one that every server runs with, those of the tests too.

    more  settings that differ, by uvicorn's names
    """
    import uvicorn

    from minikin.server.protocol import protocol

    limits = guard.limits
    own: dict[str, Any] = {
        "log_level": "warning", "server_header": False, "date_header": True, "proxy_headers": False,
        "timeout_graceful_shutdown": 3, "timeout_keep_alive": 15, "http": protocol(limits),
        "h11_max_incomplete_event_size": 32_768, "ws_max_size": 1 << 20, "lifespan": "on",
    }  # fmt: skip
    return uvicorn.Config(guard, host=host, port=port, **{**own, **more})


def server(guard: Guard, service: Service, host: str, port: int, **more: Any) -> Any:
    """A `uvicorn.Server` that leaves as `serve` says; more: as for `listening`."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:  # theirs would end by the signal again, not with 0
            if service.draining:
                self.force_exit, self.should_exit = self.should_exit, True
                return
            service.drain()
            threading.Thread(target=self.leave, daemon=True).start()

        def leave(self) -> None:
            service.finish()
            self.should_exit = True

    return Server(listening(guard, host, port, **more))


def serve(guard: Guard, service: Service, host: str, port: int) -> None:
    """Run until SIGTERM or SIGINT; then take nothing new, finish what is in hand, and leave.

    Meanwhile it goes on listening: /readyz and new requests hear 503, /livez 200. A second signal ends it.
    """
    server(guard, service, host, port).run()
