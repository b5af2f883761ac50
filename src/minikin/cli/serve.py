"""minikin serve and minikin studio: the server, on one base, until it is told to stop."""

from __future__ import annotations

import threading
import time
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minikin.cli import display
from minikin.errors import BadRecipe
from minikin.files import data_folder

if TYPE_CHECKING:
    from minikin.server.service import Service

NEEDS = ("fastapi", "uvicorn", "websockets")


def run(
    *, base: str, host: str, port: int, keys: Sequence[str], folder: Path | None, devices: Sequence[str],
    dtype: str | None, hosts: Sequence[str] = (), origins: Sequence[str] = (), insecure: bool = False,
    page: bool = False, browser: bool = False,
) -> None:  # fmt: skip
    """Open the base on each device and serve it; with the page, and a browser that shows it."""
    missing = [name for name in NEEDS if not find_spec(name)]
    if missing:  # without websockets, uvicorn would serve all but /api/live and say nothing
        raise BadRecipe(
            f"The server is not installed: {', '.join(missing)} is missing. Install it with "
            "`pip install 'minikin[serve]'`."
        )
    from minikin.server.app import create, gated, serve
    from minikin.server.guard import check_exposure
    from minikin.server.service import Service
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    if page and not find_spec("gradio"):
        raise BadRecipe("The page is not installed. Install it with `pip install 'minikin[studio]'`.")
    check_exposure(host, keys, insecure=insecure)
    engines = [StudioEngine(Studio.open(base, device=d, dtype=dtype)) for d in devices or (None,)]
    service = Service(list(engines), folder or data_folder() / "server")
    app = create(service)
    if page:
        from minikin.page.app import mount

        mount(app)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    display.err.print(
        f"Serving {engines[0].name} on {address}\n"
        f"  OpenAI  {address}/v1    A1111  {address}/sdapi/v1    native  {address}/docs\n"
        f"  jobs and results: {service.folder}   end with Ctrl-C",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if page:
        display.err.print(f"  the page: {address}/", markup=False)
    if browser:
        _open_when_ready(service, f"{address.replace('0.0.0.0', '127.0.0.1')}/")
    try:
        serve(gated(app, keys=keys, hosts=[*hosts, host], origins=origins), service, host, port)
    finally:
        service.close(drain_s=0)


def _open_when_ready(service: Service, address: str) -> None:
    """Show the page once the first picture is painted: before that nothing would answer."""

    def wait() -> None:
        while service.ready == "warming up":
            time.sleep(0.1)
        if not service.draining:
            webbrowser.open(address)

    threading.Thread(target=wait, daemon=True).start()
