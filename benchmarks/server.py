"""The server against its bare engine: throughput with eight clients, and the overhead of a request.

The bare engine generates the same images in full batches. The overhead is the time of a single request to an
engine that takes no time, without encoding and writing its image.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import timed

CLIENTS, EACH, STEPS = 8, 3, 6
PROMPTS = [f"a photo of a {thing} on the beach" for thing in ("cat", "dog", "car", "chair")]


def run() -> list[dict[str, Any]]:
    return [*_throughput(), *_overhead()]


def _throughput() -> list[dict[str, Any]]:
    from minikin import Studio
    from minikin.recipes import Paint
    from minikin.server.engine import Row
    from minikin.server.jobs import JobRequest
    from minikin.server.service import Service
    from minikin.server.studio_engine import StudioEngine

    engine = StudioEngine(Studio.open("tiny", device="cpu"))
    total = CLIENTS * EACH

    def recipe(k: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[k % len(PROMPTS)], "seed": k, "steps": STEPS}

    def bare() -> float:
        started = time.perf_counter()
        rows = [Row(engine.prepare("paint", Paint(**recipe(k)), {}), k) for k in range(total)]
        for i in range(0, total, CLIENTS):
            engine.paint(rows[i : i + CLIENTS], lambda done, preview: None)
        return total / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        service = Service([engine], Path(folder) / "s")
        service.start()
        service.workers[0].warm.wait()

        def client(c: int) -> None:
            """Submits all its requests at once, then waits for them."""
            jobs = [service.submit(JobRequest("paint", f"c{c}"), recipe(c * EACH + i)) for i in range(EACH)]
            for job in jobs:
                job.finished.wait()

        def served() -> float:
            threads = [threading.Thread(target=client, args=(c,)) for c in range(CLIENTS)]
            started = time.perf_counter()
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            return total / (time.perf_counter() - started)

        pairs = [(bare(), served()) for _ in range(3)]  # in turn, so that other load affects both
        service.close()
    ratio = statistics.median(b / a for a, b in pairs)
    return [
        {"what": f"bare engine, batches of {CLIENTS}, {STEPS} steps",
         "value": f"{statistics.median(a for a, _ in pairs):.1f}/s"},
        {"what": f"{CLIENTS} clients through the service",
         "value": f"{statistics.median(b for _, b in pairs):.1f}/s"},
        {"what": "service / bare engine", "value": f"{ratio:.2f}", "bar": ">= 0.9", "holds": ratio >= 0.9},
    ]  # fmt: skip


def _overhead() -> list[dict[str, Any]]:
    import socket

    import httpx
    import uvicorn
    from tests.helpers.fake_engine import FakeEngine, draw

    from minikin import files
    from minikin.server.app import create, with_middleware
    from minikin.server.service import Service

    with tempfile.TemporaryDirectory() as folder:
        service = Service([FakeEngine(steps=1)], Path(folder) / "s")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        app = with_middleware(create(service))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not (server.started and not service.ready):
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as c:
            whole = timed(
                lambda: c.post("/api/paint?wait=true", json={"prompt": "a"}).raise_for_status(), 100, 10
            )
        server.should_exit = True
        thread.join()
        image, path = draw(bytes(range(64)), (64, 64)), Path(folder) / "image.png"

        def encode() -> None:
            buffer = io.BytesIO()
            image.save(buffer, "PNG", compress_level=1)
            files.atomic_write(path, buffer.getvalue())

        writing = timed(encode, 30)
    cost = whole["median_ms"] - writing["median_ms"]
    return [
        {"what": "one request, engine of no time (median)", "value": f"{whole['median_ms']:.1f} ms"},
        {"what": "of it encoding and writing the image", "value": f"{writing['median_ms']:.1f} ms"},
        {"what": "overhead of a request (median)", "value": f"{cost:.1f} ms", "bar": "<= 15 ms",
         "holds": cost <= 15},
    ]  # fmt: skip
