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
from PIL import Image

from minikin.models.identity import Origin
from minikin.perfusion.concept import Concept
from minikin.perfusion.concept_file import to_bytes
from minikin.server import app as app_
from minikin.server import audit, metrics
from minikin.server.app import create, with_middleware
from minikin.server.engine import Engine, OnStep, Preview, Row
from minikin.server.limits import Limits
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine

_started, _open = 0, 0  # servers of this process


@dataclass
class Served:
    """A server that listens."""

    url: str
    service: Service
    app: Any
    folder: Path
    server: uvicorn.Server
    thread: threading.Thread

    def client(self, **kwargs: Any) -> httpx.Client:
        """Without certificates: reading them took longer than most of these tests' requests."""
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False, **kwargs)

    def drained(self, seconds: float = 300.0) -> None:
        """Wait until every job has ended."""
        until = time.monotonic() + seconds
        while self.service._unfinished() and time.monotonic() < until:
            time.sleep(0.01)
        assert not self.service._unfinished(), f"still at work after {seconds:g} s"

    def left(self, seconds: float = 300.0) -> None:
        """Wait until no caller is there any more and no request is at work: what was sent has become jobs."""
        state = self.server.server_state
        until = time.monotonic() + seconds
        while (state.connections or state.tasks) and time.monotonic() < until:
            time.sleep(0.01)
        assert not state.connections and not state.tasks, f"still there after {seconds:g} s"


@contextmanager
def served(
    engine: Engine, folder: Path, *, limits: Limits | None = None, keys: Sequence[str] = (),
    drained: bool = True, page: bool = False, engines: Sequence[Engine] = (), **how: Any,
) -> Iterator[Served]:  # fmt: skip
    """Inside, the server runs, with one engine or several, its `Service` told `how`.

    Afterwards the audit must find nothing, and the metrics agree with it: a process has one set of
    counters, so that is looked at where no other server ran beside this one.
    """
    global _started, _open
    service = Service(list(engines) or [engine], folder, limits, **how)
    before, since = metrics.text().decode(), audit.last_event(folder)
    alone, _started, _open = (not _open) and _started + 1, _started + 1, _open + 1
    app = create(service)
    if page:
        from minikin.web.app import mount

        mount(app)
    listener = socket.create_server(("127.0.0.1", 0))  # stays ours from here on
    port = listener.getsockname()[1]
    guard = with_middleware(app, keys=keys)
    quiet = {"log_level": "critical", "timeout_graceful_shutdown": 2}
    server = app_.server(guard, service, "127.0.0.1", port, **quiet)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    server_ = Served(f"http://127.0.0.1:{port}", service, app, folder, server, thread)
    until = time.monotonic() + 300
    while not (server.started and not service.ready) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield server_
    except BaseException:
        service.close(0)  # what a failed test leaves in hand is not waited for
        raise
    finally:
        server.should_exit = True
        thread.join(120)
        service.close(0)
        _open -= 1
    wrong = audit.problems(folder, drained=drained)
    if alone == _started and service.limits.keep_s > 60:  # else its lines may be gone
        wrong += audit.disagreements(folder, metrics.text().decode(), before, since)
    assert not wrong, wrong


class Watched(FakeEngine):
    """Goes on to the next step when somebody has looked at the image, or after `patience` seconds."""

    patience = 0.0

    def paint(self, rows: Sequence[Row], on_step: OnStep) -> list[Image.Image]:
        def step(done: int, preview: Preview) -> None:
            looked = threading.Event()

            def look(row: int) -> Any:
                looked.set()
                return preview(row)

            on_step(done, look)
            if done < rows[0].prepared.steps:
                looked.wait(self.patience)

        return super().paint(rows, step)


def concept(name: str, seed: int, category: str = "cat") -> bytes:
    """A small concept file of its own content, of no base in particular."""
    g = torch.Generator().manual_seed(seed)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    origin = Origin("tiny", "0" * 64, "0" * 64)
    none = torch.zeros(16)
    delta = {layer: torch.randn(32, generator=g)}
    return to_bytes(Concept(name, category, "value", origin, (), none, none, delta))
