"""A real server on a free port of this machine, and what its tests share."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from minikin.concepts.concept import Concept, Origin
from minikin.concepts.file import to_bytes
from minikin.server import ledger
from minikin.server.app import create, gated
from minikin.server.engine import Engine
from minikin.server.limits import Limits
from minikin.server.service import Service


@dataclass
class Served:
    """A server that listens."""

    url: str
    service: Service
    app: Any
    folder: Path

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **kwargs)

    def drained(self, seconds: float = 10.0) -> None:
        """Wait until every job has ended."""
        until = time.monotonic() + seconds
        while self.service._live() and time.monotonic() < until:
            time.sleep(0.01)


@contextmanager
def served(
    engine: Engine, folder: Path, *, limits: Limits | None = None, keys: Sequence[str] = (),
    drained: bool = True, page: bool = False,
) -> Iterator[Served]:  # fmt: skip
    """Inside, the server runs; afterwards the ledger must be in order."""
    service = Service([engine], folder, limits)
    app = create(service)
    if page:
        from minikin.page.app import mount

        mount(app)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = uvicorn.Config(
        gated(app, keys=keys), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    one = Served(f"http://127.0.0.1:{port}", service, app, folder)
    until = time.monotonic() + 30
    while not (server.started and not service.ready) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield one
    finally:
        server.should_exit = True
        thread.join(30)
        service.close(0)
    wrong = ledger.problems(folder, drained=drained)
    assert not wrong, wrong


def concept(name: str, seed: int, category: str = "cat") -> bytes:
    """A small concept file of its own content, of no base in particular."""
    g = torch.Generator().manual_seed(seed)
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    origin = Origin("tiny", "0" * 64, "0" * 64)
    none = torch.zeros(16)
    delta = {site: torch.randn(32, generator=g)}
    return to_bytes(Concept(name, category, "row", origin, (), none, none, delta))
