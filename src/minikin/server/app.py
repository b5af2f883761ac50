"""The FastAPI app: one service, three APIs (dialects), one access middleware.

`create` returns the app (`app.state.service`), to which the page can be mounted, and `with_middleware` puts
authentication and limits in front of all of it. `serve` runs both under uvicorn until SIGTERM or SIGINT.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
from minikin.server import http, live, previews, probes, reference
from minikin.server.api import a1111, a1111_options, native, native_concepts, native_images, openai
from minikin.server.errors import dialect_of, error_responses
from minikin.server.middleware import AccessMiddleware
from minikin.server.service import Service
from minikin.training.signals import as_ctrl_c

SWEEP_S = 60.0
log = logging.getLogger(__name__)


def create(service: Service) -> FastAPI:
    """All routes on one service, which starts and closes with the app."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
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
        description="Images from prompts and personal concepts: the native API, OpenAI's images and A1111's.",
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    app.include_router(reference.router)
    apis = (native, native_concepts, native_images, openai, a1111, a1111_options)
    for module in (probes, *apis, previews, live):
        app.include_router(module.router, responses=error_responses(dialect_of(f"{module.router.prefix}/")))
    app.add_exception_handler(Exception, http.on_unexpected)
    app.add_exception_handler(MinikinError, http.on_minikin_error)
    app.add_exception_handler(RequestValidationError, http.on_invalid)
    for kind in (HTTPException, StarletteHTTPException):
        app.add_exception_handler(kind, http.on_http_error)
    return app


def with_middleware(
    app: FastAPI, *, keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> AccessMiddleware:
    """The ASGI app for uvicorn: the app behind its access middleware."""
    service: Service = app.state.service
    return AccessMiddleware(app, keys=keys, hosts=hosts, origins=origins, limits=service.limits)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's errors: one line where no file can be opened, which asyncio repeats with tracebacks."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        log.warning("a connection waits, since no file can be opened: %s", error.strerror)
    else:
        loop.default_exception_handler(context)


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            await run_in_threadpool(service.sweep)
        except MinikinError as e:
            log.warning("sweeping: %s", e)
        except Exception:  # whatever it is: the loop must go on
            log.exception("sweeping")


def listening(guard: AccessMiddleware, host: str, port: int, **more: Any) -> Any:
    """The `uvicorn.Config` of every server, in tests too.

    more  other settings, by uvicorn's names
    """
    import uvicorn

    from minikin.server.protocol import fitted, protocol

    limits, accepted = fitted(guard.limits)
    settings: dict[str, Any] = {
        "log_level": "warning", "server_header": False, "date_header": True, "proxy_headers": False,
        "timeout_graceful_shutdown": 3, "timeout_keep_alive": 15, "http": protocol(limits),
        "backlog": accepted, "h11_max_incomplete_event_size": 32_768, "ws_max_size": 1 << 20, "lifespan": "on",
    }  # fmt: skip
    return uvicorn.Config(guard, host=host, port=port, **{**settings, **more})


def server(guard: AccessMiddleware, service: Service, host: str, port: int, **more: Any) -> Any:
    """A `uvicorn.Server` that drains as `serve` says; more: as for `listening`."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(
            self, sig: int, frame: Any
        ) -> None:  # uvicorn's re-raises the signal and exits with its number
            if service.draining:
                self.force_exit, self.should_exit = self.should_exit, True
                return
            service.drain()
            threading.Thread(target=self.leave, daemon=True).start()

        def leave(self) -> None:
            service.finish()
            self.should_exit = True

    return Server(listening(guard, host, port, **more))


def serve(guard: AccessMiddleware, service: Service, host: str, port: int) -> None:
    """Run until SIGTERM, SIGHUP or SIGINT; then accept no new request, finish the running ones, and exit.

    Until then it goes on listening: /readyz and new requests get 503, /livez 200. A second signal ends it.
    """
    running = server(guard, service, host, port)

    def hang_up(number: int, frame: Any) -> None:
        if not service.draining:  # a shell and the kernel may both send it: that is no second signal
            running.handle_exit(number, frame)

    with as_ctrl_c(hang_up):  # uvicorn knows no SIGHUP
        running.run()
