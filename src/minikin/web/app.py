"""The page: a Gradio app with five sections, mounted on the server's app behind its access middleware.

    /            sends a browser to /studio/
    /studio/     Gradio: the theme, the tabs, and one HTML component for each section
    /page/       the sections' scripts

A section works like any other client: it sends requests to the native API, watches its jobs' events, and uses
/api/live for live generation. So all work of the page waits in the server's queue, and Gradio's own queues,
uploads, files and proxies are not needed: those routes are closed.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from minikin.web import theme

SECTIONS = {
    "paint": "Paint", "inpaint": "Inpaint", "concepts": "Concepts", "teach": "Teach", "recipe": "Recipe",
}  # fmt: skip
PATH = "/studio"
# Gradio's routes that the page needs, the heartbeat of a tab among them; all others are closed
OPEN = ("/", "/config", "/theme.css", "/manifest.json", "/robots.txt")
OPEN_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; font-src 'self' data:; "
    "connect-src 'self' ws: wss:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


class Closed:
    """ASGI middleware that passes only the routes of Gradio that the page needs; others are 404."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == "/favicon.ico":  # else Gradio's
            await icon()(scope, receive, send)
            return
        is_open = path in OPEN or path.startswith(OPEN_BELOW)
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not is_open:
            await Response("There is nothing here.", 404, media_type="text/plain")(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


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
    """The script that starts a section when it is on the page."""
    started = f'document.documentElement.classList.add("mk-{name}-started")'
    return f'import("/page/{name}.js").then(m => {{ m.start(element); {started}; }});'


def icon() -> FileResponse:
    """The page's icon, at the addresses where browsers look for one."""
    return FileResponse(theme.WEB / "icon.svg", media_type="image/svg+xml")


def mount(app: FastAPI) -> FastAPI:
    """Put the page on a server's app (`server.app.create`); `with_middleware` then protects both."""
    import gradio as gr

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    app.add_api_route("/favicon.ico", icon, include_in_schema=False)
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
