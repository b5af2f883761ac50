"""minikin serve: the server, on one base, until it is told to stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minikin.cli import display
from minikin.errors import BadRecipe
from minikin.files import data_folder


def run(
    *, base: str, host: str, port: int, keys: Sequence[str], folder: Path | None, devices: Sequence[str],
    dtype: str | None, hosts: Sequence[str], origins: Sequence[str], insecure: bool,
) -> None:  # fmt: skip
    """Open the base on each device and serve it."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise BadRecipe("The server is not installed. Install it with `pip install 'minikin[serve]'`.") from e
    from minikin.server.app import create, gated, serve
    from minikin.server.guard import check_exposure
    from minikin.server.service import Service
    from minikin.server.studio_engine import StudioEngine
    from minikin.studio import Studio

    check_exposure(host, keys, insecure=insecure)
    engines = [StudioEngine(Studio.open(base, device=d, dtype=dtype)) for d in devices or (None,)]
    service = Service(list(engines), folder or data_folder() / "server")
    app = create(service)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    display.err.print(
        f"Serving {engines[0].name} on {address}\n"
        f"  OpenAI  {address}/v1    A1111  {address}/sdapi/v1    native  {address}/docs\n"
        f"  jobs and results: {service.folder}   end with Ctrl-C",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    try:
        serve(gated(app, keys=keys, hosts=[*hosts, host], origins=origins), service, host, port)
    finally:
        service.close(drain_s=0)
