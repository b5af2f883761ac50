"""How many images are decoded at once, whichever call brings them."""

from __future__ import annotations

import base64
import io
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin.server import decode
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served


def test_few_children_at_once_and_503_for_who_waits_too_long(tmp_path: Path, monkeypatch: Any) -> None:
    """Also for the calls that never wait in the line; and when those before have ended, all is as it was."""
    now, most, go, real = [0], [0], threading.Event(), subprocess.run
    lock = threading.Lock()

    def run(*args: Any, **kwargs: Any) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            go.wait(300)
            return real(*args, **kwargs)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(subprocess, "run", run)
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("parameters", "a cat\nSteps: 4, Seed: 1")
    Image.new("RGB", (16, 16)).save(buffer, "PNG", pnginfo=info)
    data = buffer.getvalue()
    limits = Limits(decode_wait_s=0.3)
    with (
        served(FakeEngine(), tmp_path / "s", limits=limits) as s,
        s.client() as c,
        ThreadPoolExecutor(16) as pool,
    ):

        def ask(k: int) -> Any:
            # three clients: the last free place is for one that has none at work, so two could fill only two
            who = {"X-Minikin-Client": "abc"[k % 3]}
            if k % 2:
                return c.post("/api/recipe", files={"file": ("x", data)}, headers=who)
            image = base64.b64encode(data).decode()
            return c.post("/sdapi/v1/png-info", json={"image": image}, headers=who)

        pending = [pool.submit(ask, k) for k in range(12)]
        end = time.monotonic() + 240
        while time.monotonic() < end and (
            now[0] < decode.MAX_CHILDREN or sum(item.done() for item in pending) < 12 - decode.MAX_CHILDREN
        ):
            time.sleep(0.01)
        assert now[0] == most[0] == decode.MAX_CHILDREN
        go.set()
        response = [item.result() for item in pending]
        busy = [item for item in response if item.status_code == 503]
        assert len(busy) == 12 - decode.MAX_CHILDREN
        assert all(int(item.headers["retry-after"]) >= 1 and "busy" in item.text for item in busy)
        assert {item.status_code for item in response if item not in busy} == {200}
        assert ask(0).status_code == ask(1).status_code == 200
