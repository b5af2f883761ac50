"""minikin serve and minikin studio: the server, on one base, until it is told to stop."""

from __future__ import annotations

import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minikin.cli import display
from minikin.errors import BadRecipe, extra
from minikin.files import data_folder
from minikin.images.encode import MARKED, Marking
from minikin.recipes import Mode

if TYPE_CHECKING:
    from minikin.server.engine import Engine
    from minikin.server.service import Service
    from minikin.studio import Studio

EXPORTED_UNASKED = 1 << 30  # bytes of a U-Net
NEEDS = ("fastapi", "uvicorn", "websockets", "h11")


def run(
    *, base: str, host: str, port: int, keys: Sequence[str], folder: Path | None, devices: Sequence[str],
    dtype: str | None, hosts: Sequence[str] = (), origins: Sequence[str] = (), insecure: bool = False,
    live_engine: str | None = None, page: bool = False, browser: bool = False, marking: Marking = MARKED,
    filter: Mode | None = None, replicas: int = 0, address: str | None = None,
) -> None:  # fmt: skip
    """Open the base on each device, or in each replica, and serve it; with the page, and a browser for it.

    live_engine  of what is painted live; None chooses, see `_quick`. Replicas have PyTorch's
    """
    missing = [name for name in NEEDS if not find_spec(name)]
    if missing:  # without websockets, uvicorn would serve all but /api/live and say nothing
        raise BadRecipe(
            f"The server is not installed: {', '.join(missing)} is missing. Install it with {extra('serve')}."
        )
    from minikin.generation.content_filter import open_filtering
    from minikin.server.app import create, gated, serve
    from minikin.server.middleware import check_exposure
    from minikin.server.service import Service

    if page and not find_spec("gradio"):
        raise BadRecipe(f"The page is not installed. Install it with {extra('studio')}.")
    check_exposure(host, keys, insecure=insecure)
    if address and not replicas:
        raise BadRecipe("--address is where replicas are: say how many with --replicas.")
    if live_engine and replicas:
        raise BadRecipe("--live-engine is of engines in this process: leave it out with --replicas.")
    with _engines(base, devices, dtype, replicas, address, live_engine, page) as engines:
        own = getattr(engines[0], "studio", None)  # the filter is the service's: it looks at everything
        filtering = open_filtering(filter, own.base if own else None)
        service = Service(engines, folder or data_folder() / "server", marking=marking, filtering=filtering)
        app = create(service)
        if page:
            from minikin.web.app import mount

            mount(app)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        many = f" with {replicas} replicas" if replicas else ""
        display.err.print(
            f"Serving {engines[0].name}{many} on {where}\n"
            f"  OpenAI  {where}/v1    A1111  {where}/sdapi/v1    native  {where}/docs\n"
            f"  jobs and results: {service.folder}   end with Ctrl-C",
            soft_wrap=True,
        )  # fmt: skip
        if filtering:
            display.err.print(f"  content filter: {filtering.mode}, by {filtering.filter.name}")
        if page:
            display.err.print(f"  the page: {where}/")
        if browser:
            _open_when_ready(service, f"{where.replace('0.0.0.0', '127.0.0.1')}/")
        try:
            serve(gated(app, keys=keys, hosts=[*hosts, host], origins=origins), service, host, port)
        finally:
            service.close(drain_s=0)


@contextmanager
def _engines(
    base: str, devices: Sequence[str], dtype: str | None, replicas: int, address: str | None,
    live_engine: str | None, page: bool,
) -> Iterator[list[Engine]]:  # fmt: skip
    """One engine a device of this process, or a replica of a fleet."""
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    if not replicas:
        studios = [Studio.open(base, device=d, dtype=dtype) for d in devices or (None,)]
        yield [StudioEngine(s, live_engine or (_quick(s) if page else "eager")) for s in studios]
        return
    if len(devices) > 1:
        raise BadRecipe("Replicas take the GPUs they are given: say --device once, or not at all.")
    from minikin.cluster.engine import remote_engines
    from minikin.cluster.paint_worker import studio_engine
    from minikin.cluster.pool import Cluster

    fleet = Cluster(replicas, address)
    with fleet.joined() as ray:
        opening = partial(studio_engine, base, devices[0] if devices else None, dtype)
        yield remote_engines(ray, opening, replicas, fleet.share(ray))


def _quick(studio: Studio) -> str:
    """OpenVINO on a CPU where it is installed: its export of a small base takes seconds, once, and a copy of
    the weights in memory; that of a large one is for who asks for it."""
    base = studio.base
    size = sum(p.numel() * p.element_size() for p in base.unet.parameters())
    small = base.device.type == "cpu" and size <= EXPORTED_UNASKED
    return "openvino" if small and find_spec("openvino") else "eager"


def _open_when_ready(service: Service, address: str) -> None:
    """Show the page once the first image is painted: before that nothing would answer."""

    def wait() -> None:
        while service.ready == "warming up":
            time.sleep(0.1)
        if not service.draining:
            webbrowser.open(address)

    threading.Thread(target=wait, daemon=True).start()
