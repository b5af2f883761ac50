"""The commands serve and studio: an HTTP server on one base, until Ctrl-C."""

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
from minikin.cli.options import ImageOptions, ServerOptions
from minikin.errors import BadRecipe, extra
from minikin.files import data_folder

if TYPE_CHECKING:
    from minikin.server.engine import Engine
    from minikin.server.service import Service
    from minikin.studio import Studio

MAX_EXPORT_BYTES = 1 << 30  # of a U-Net that is exported by default
NEEDS = ("fastapi", "uvicorn", "websockets", "h11")


def run(
    server: ServerOptions, options: ImageOptions, *, origins: Sequence[str] = (), insecure: bool = False,
    page: bool = False, browser: bool = False, out: Path | None = None, replicas: int = 0,
    address: str | None = None,
) -> None:  # fmt: skip
    """Open the base on each device, or in each replica, and serve it until Ctrl-C.

    page, browser  also serve the page, and open it in a browser
    out            folder that keeps the images; by default out/ where one person alone reaches the page
    Raises BadRecipe for options that contradict each other or an extra that is missing.
    """
    _check_installed()
    from minikin.generation.content_filter import open_filtering
    from minikin.server.app import create, serve, with_middleware
    from minikin.server.middleware import LOOPBACK, check_exposure, keys_of
    from minikin.server.service import Service

    host, port = server.host, server.port
    keys = keys_of(server.api_key)
    check_exposure(host, keys, insecure=insecure)
    if address and not replicas:
        raise BadRecipe("--address is the cluster of the replicas: say how many with --replicas.")
    if server.live_backend and replicas:
        raise BadRecipe("--live-backend works in this process alone: leave it out with --replicas.")
    marking = options.marking()
    personal = page and host in LOOPBACK and not keys and not server.allow_host
    images = out or (Path("out") if personal else None)
    display.err.print(f"Opening the base {server.base} ...")
    with _engines(server, replicas, address, page) as engines:
        studio = getattr(engines[0], "studio", None)
        filtering = open_filtering(options.filter, studio.base if studio else None)
        folder = server.folder or data_folder() / "server"
        service = Service(
            engines, folder, marking=marking, filtering=filtering, image_folder=images, one_library=personal
        )
        app = create(service)
        if page:
            from minikin.web.app import mount

            mount(app)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _announce(service, where, replicas, page=page)
        _when_ready(service, f"{where.replace('0.0.0.0', '127.0.0.1')}/", browser)
        hosts = [*(server.allow_host or ()), host]
        try:
            serve(with_middleware(app, keys=keys, hosts=hosts, origins=origins), service, host, port)
        finally:
            service.close(drain_s=0)


def _check_installed() -> None:
    """Raise BadRecipe where the extra of the server is missing."""
    missing = [name for name in NEEDS if not find_spec(name)]
    if missing:  # without websockets, uvicorn would serve all but /api/live and say nothing
        raise BadRecipe(
            f"The server is not installed: {', '.join(missing)} is missing. Install it with {extra('serve')}."
        )


def _announce(service: Service, where: str, replicas: int, *, page: bool) -> None:
    """Say what is served at this address, and where images are kept."""
    many = f" with {replicas} replicas" if replicas else ""
    display.err.print(
        f"Serving {service.engine.name}{many} on {where}\n"
        f"  OpenAI  {where}/v1    A1111  {where}/sdapi/v1    native  {where}/docs\n"
        f"  jobs: {service.folder}   end with Ctrl-C",
        soft_wrap=True,
    )
    if saved := service.writer.image_folder:
        display.err.print(f"  images are saved in {saved.path}", soft_wrap=True)
    elif page:
        hours = service.limits.keep_s / 3600
        display.err.print(f"  images are deleted after {hours:.0f} hours; --out FOLDER keeps them")
    if service.filtering:
        display.err.print(f"  content filter: {service.filtering.mode}, by {service.filtering.filter.name}")
    if page:
        display.err.print(f"  the page: {where}/")


@contextmanager
def _engines(
    server: ServerOptions, replicas: int, address: str | None, page: bool
) -> Iterator[list[Engine]]:  # fmt: skip
    """One engine per device of this process, or one per replica of a Ray cluster."""
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    if not replicas:
        studios = [Studio.open(server.base, device=d, dtype=server.dtype) for d in server.device or (None,)]
        backend = server.live_backend
        yield [StudioEngine(s, backend or (_fast_backend(s) if page else "eager")) for s in studios]
        return
    if server.device and len(server.device) > 1:
        raise BadRecipe("Ray gives each replica its GPU: give --device once, or not at all.")
    from minikin.cluster.engine import remote_engines
    from minikin.cluster.paint_worker import studio_engine
    from minikin.cluster.pool import Cluster

    cluster = Cluster(replicas, address)
    with cluster.joined() as ray:
        device = server.device[0] if server.device else None
        opening = partial(studio_engine, server.base, device, server.dtype)
        yield remote_engines(ray, opening, replicas, cluster.share(ray))


def _fast_backend(studio: Studio) -> str:
    """The backend of live images when no option names one: OpenVINO for a small base on a CPU, else eager.

    The export of a small U-Net takes seconds, once, and a copy of its weights in memory. The export of a
    large one takes too long to start without being asked.
    """
    base = studio.base
    size = sum(p.numel() * p.element_size() for p in base.denoiser.parameters())
    small = base.device.type == "cpu" and size <= MAX_EXPORT_BYTES
    return "openvino" if small and find_spec("openvino") else "eager"


def _when_ready(service: Service, address: str, browser: bool) -> None:
    """Say what happens until the server is warm, and then open the page in a browser if asked for."""

    def wait() -> None:
        backend = getattr(service.engine, "live_engine", "eager")
        once = "" if backend == "eager" else f", and live images run on {backend} (exported once, then cached)"
        display.err.print(f"Warming up: the first images are painted{once} ...", soft_wrap=True)
        started = time.monotonic()
        while service.ready == "warming up" and not service.draining:
            time.sleep(0.1)
        if not service.draining:
            display.err.print(f"Ready after {time.monotonic() - started:.0f} s.")
            if browser:
                webbrowser.open(address)

    threading.Thread(target=wait, daemon=True).start()
