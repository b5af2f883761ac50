"""`minikin studio` as a process, on an engine that paints nothing: what it says, keeps, shares, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from minikin.perfusion import library
from tests.helpers.loads import free_port
from tests.helpers.servers import concept

ROOT = Path(__file__).parents[2]
STARTER = """
import signal
from contextlib import contextmanager
from minikin.cli import app, serve
from tests.helpers.fake_engine import FakeEngine

@contextmanager
def engines(*_):
    yield [FakeEngine()]

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it stays ignored where the tests themselves run under nohup
serve._engines = engines
app.main()
"""


@contextmanager
def studio(folder: Path, *options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """The command, ready, and a client; it writes its messages into `messages`."""
    port = free_port()
    command = [sys.executable, "-c", STARTER, "studio", "--no-browser", "--port", str(port), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "messages", "w") as messages:
        process = subprocess.Popen(command, cwd=folder, env=env, stderr=messages, text=True)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False, timeout=60
        ) as client:
            until = time.monotonic() + 240
            while "Ready after" not in (folder / "messages").read_text():
                assert process.poll() is None and time.monotonic() < until, (folder / "messages").read_text()
                time.sleep(0.1)
            yield client, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_images_and_concepts_are_the_persons(tmp_path: Path, cli: Any) -> None:
    with studio(tmp_path) as (client, process):
        client.post("/api/paint?wait=true", json={"prompt": "a cat", "seed": 7, "n": 2}).raise_for_status()
        client.post("/api/concepts", files={"file": concept("tom", 1)}).raise_for_status()
        assert json.loads(cli("concepts", "list", "--json")[1])["name"] == "tom"
        (tmp_path / "rex.safetensors").write_bytes(concept("rex", 2))
        assert library.follow(tmp_path / "rex.safetensors", "rex", None)
        names = {c["name"] for c in client.get("/api/concepts").json()["concepts"]}
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0
    assert names == {"tom", "rex"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a-cat-7.png", "a-cat-8.png"]
    messages = (tmp_path / "messages").read_text()
    for words in (
        "Opening the base tiny",
        f"images are saved in {tmp_path / 'out'}",
        "Warming up",
        "Ready after",
    ):
        assert words in messages, messages


@pytest.mark.slow
def test_where_others_come_it_is_a_server(tmp_path: Path) -> None:
    """With a key several people may use it: nothing of theirs goes into the operator's folders."""
    key = "a-key-of-16-characters-and-more"
    with studio(tmp_path, "--api-key", key) as (client, _):
        client.headers["X-API-Key"] = key
        client.post("/api/concepts", files={"file": concept("tom", 1)}).raise_for_status()
        assert client.get("/api/capabilities").json()["images"] == {"folder": None, "hours": 24}
    assert not (tmp_path / "out").exists() and library.locate("tom") is None
    assert "images are deleted after 24 hours; --out FOLDER keeps them" in (tmp_path / "messages").read_text()
