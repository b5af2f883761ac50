"""The page: a Gradio app of five sections on the server's own app, behind its one gate.

    /            sends a browser to /studio/
    /studio/     Gradio: the theme, the tabs, and one HTML component for each section
    /page/       the sections' scripts

A section works as every other client does: it sends requests to the native API, watches its jobs' events,
and paints live over /api/live. So whatever the page does waits in the one line, and what Gradio could do by
itself (queues, uploads, files, proxies) is not needed: those of its paths are closed.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from minikin.web import theme

SECTIONS = {
    "paint": "Paint", "inpaint": "Inpaint", "concepts": "Concepts", "teach": "Teach", "recipe": "Recipe",
}  # fmt: skip
PATH = "/studio"
# of Gradio's own: the page, its parts, and the sign of life a tab sends; everything else is closed
OPEN = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
OPEN_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; font-src 'self' data:; "
    "connect-src 'self' ws: wss:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


class Closed:
    """Lets through what the page needs of Gradio; the rest is not there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        known = path in OPEN or path.startswith(OPEN_BELOW)
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not known:
            await Response("There is nothing here.", 404, media_type="text/plain")(scope, receive, send)
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, told)


def blocks() -> Any:
    """The Gradio app by itself."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    with gr.Blocks(title="Minikin", analytics_enabled=False) as app:
        gr.HTML(theme.section("head"), elem_id="head", js_on_load=_starting("head"))
        with gr.Tabs(elem_id="sections"):
            for name, label in SECTIONS.items():
                with gr.Tab(label, id=name, elem_id=f"tab-{name}", render_children=True):
                    gr.HTML(theme.section(name), elem_id=name, js_on_load=_starting(name))
    return app


def _starting(name: str) -> str:
    """The script that makes a section work, once it is there."""
    return f'import("/page/{name}.js").then(m => m.start(element));'


def mount(app: FastAPI) -> FastAPI:
    """Put the page on a server's app (`server.app.create`); `gated` then guards both."""
    import gradio as gr

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    app.mount("/page", StaticFiles(directory=theme.WEB))
    gr.mount_gradio_app(
        app, blocks(), PATH, theme=theme.theme(), ssr_mode=False, footer_links=[],
        run_history=False, show_error=False, pwa=False, mcp_server=False, enable_monitoring=False,
        # not Gradio's own `css`: it rewrites selectors, and those for narrow screens lose to the others
        head='<link rel="icon" type="image/svg+xml" href="/page/icon.svg">'
        '<link rel="stylesheet" href="/page/page.css">',
    )  # fmt: skip
    mounted: Any = app.routes[-1]
    mounted.app = Closed(mounted.app)
    return app
