"""The page: static files on the server's app, behind its access middleware.

    /            sends a browser to /studio/
    /studio/     index.html, one stylesheet, and ES modules that the browser loads as they are

The page is a client of the native API like any other: it sends requests, watches its jobs' events, and uses
/api/live for live generation. So all of its work waits in the server's queue. It asks no other host for
anything, and its policy allows no script and no style but the files of this folder.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PATH = "/studio"
STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-cache",  # a browser asks whether a file changed: modules of two versions do not mix
}


class Page(StaticFiles):
    """The page's files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def mount(app: FastAPI) -> FastAPI:
    """Put the page on a server's app (`server.app.create`); `with_middleware` then protects both."""

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    app.mount(PATH, Page(directory=STATIC, html=True))
    return app
