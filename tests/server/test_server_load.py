"""Many clients at once over the three dialects: nothing lost or mixed up, no 5xx, an audit without findings."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from minikin.server import audit
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.loads import free_port, start
from tests.helpers.servers import Served, concept, served

CLIENTS, CONCEPTS = 16, 10
ROOMY = Limits(waiting=200, waiting_per_client=32)


class Swapping(FakeEngine):
    """The positive control: now and then it gives two rows of a batch each other's images."""

    def paint(self, rows: Any, on_step: Any) -> Any:
        images = super().paint(rows, on_step)
        return [*images[1:], images[0]] if len(rows) > 1 else images


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent = self.right = self.cancelled = self.busy = 0
        self.wrong: list[str] = []

    def add(self, name: str, by: int = 1) -> None:
        with self.lock:
            setattr(self, name, getattr(self, name) + by)


def run_client(s: Served, k: int, requests: int, tally: Tally) -> None:
    """One client with its concepts, whose names other clients use, too; a random API for each request."""
    rng = random.Random(k)
    with s.client(headers={"X-Minikin-Client": f"client{k}"}) as c:
        shas = {}
        for name in (f"pet{i}" for i in rng.sample(range(CONCEPTS), 3)):
            data = concept(name, hash((k, name)) % 2**31)
            response = c.post("/api/concepts", files={"file": ("x", data)})
            shas[name] = hashlib.sha256(data).hexdigest()
            assert response.json()["sha256"] == shas[name]
        for _ in range(requests):
            name, seed, n = rng.choice([*shas]), rng.randrange(2**32), rng.choice([1, 1, 2, 4])
            prompt = f"client {k} paints <{name}> {rng.random()}"
            tally.add("sent")
            try:
                got = ask(c, rng.choice(["native", "openai", "a1111", "cancel"]), prompt, seed, n, tally)
            except Exception as e:
                tally.wrong.append(repr(e))
                return
            for i, image in enumerate(got):
                right = read(image) == digest(prompt, "", {name: shas[name]}, seed + i)
                tally.add("right") if right else tally.wrong.append(f"{prompt} seed {seed + i}")


def ask(c: httpx.Client, dialect: str, prompt: str, seed: int, n: int, tally: Tally) -> list[Image.Image]:
    """The images of one request; [] for one that was cancelled or told to come back."""
    if dialect == "openai":
        response = c.post(
            "/v1/images/generations", json={"prompt": prompt, "seed": seed, "n": n, "size": "64x64"}
        )
        files = (
            [base64.b64decode(d["b64_json"]) for d in response.json()["data"]] if response.is_success else []
        )
    elif dialect == "a1111":
        body = {"prompt": prompt, "seed": seed, "batch_size": n, "width": 64, "height": 64}
        response = c.post("/sdapi/v1/txt2img", json=body)
        files = [base64.b64decode(i) for i in response.json()["images"]] if response.is_success else []
    else:
        response = c.post("/api/paint", json={"prompt": prompt, "seed": seed, "n": n})
        files = follow(c, response.json()["id"], dialect == "cancel", tally) if response.is_success else []
        if dialect == "cancel" and response.is_success and not files:
            return []
    if response.status_code == 429:
        tally.add("busy")
        return []
    assert response.is_success, response.text
    assert len(files) == n, f"{len(files)} of {n} images"
    return [Image.open(io.BytesIO(f)) for f in files]


def follow(c: httpx.Client, id_: str, cancel: bool, tally: Tally) -> list[bytes]:
    if cancel:
        time.sleep(random.random() * 0.05)
        c.delete(f"/api/jobs/{id_}")
    while (response := c.get(f"/api/jobs/{id_}").json())["status"] in ("queued", "running"):
        time.sleep(0.02)
    if response["status"] == "cancelled" and cancel:
        tally.add("cancelled")
        return []
    assert response["status"] == "completed", response
    return [c.get(r["url"]).content for r in response["results"]]


def load(engine: FakeEngine, folder: Path, requests: int) -> Tally:
    tally = Tally()
    with served(engine, folder, limits=ROOMY) as s:
        threads = [threading.Thread(target=run_client, args=(s, k, requests, tally)) for k in range(CLIENTS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(600)  # however busy the machine is
        assert not any(t.is_alive() for t in threads), "a client never got its answer"
        s.drained()
    return tally


@pytest.mark.parametrize(
    "requests", [pytest.param(12, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)]
)
def test_sixteen_clients(requests: int, tmp_path: Path) -> None:
    """So many requests of each client, whatever time they take."""
    engine = FakeEngine(step_s=0.005)
    tally = load(engine, tmp_path / "s", requests)
    assert not tally.wrong, tally.wrong[:5]
    assert tally.right > 50 and tally.cancelled, vars(tally)
    assert max(engine.batches) > 2, "waiting images share batches"


def test_the_load_test_can_fail(tmp_path: Path) -> None:
    """Two rows swapped in a batch are detected."""
    assert load(Swapping(step_s=0.02), tmp_path / "s", 3).wrong


# ---- a process of its own ----------------------------------------------------------------------


@pytest.mark.slow
def test_kill_and_restart(tmp_path: Path) -> None:
    """kill -9 at random moments: after the restart every accepted job ends once, with its own images."""
    folder, port, rng = tmp_path / "s", free_port(), random.Random(0)
    by_prompt: dict[str, tuple[str, int]] = {}
    for turn in range(3):
        process, c = start(folder, port, step_s=0.02)
        for k in range(8):
            prompt, seed = f"turn {turn} number {k}", rng.randrange(1000)
            response = c.post("/api/paint", json={"prompt": prompt, "seed": seed, "n": 2})
            if response.status_code == 202:
                by_prompt[response.json()["id"]] = (prompt, seed)
        time.sleep(rng.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process, c = start(folder, port)
    for id_, (prompt, seed) in by_prompt.items():
        while (response := c.get(f"/api/jobs/{id_}").json())["status"] in ("queued", "running"):
            time.sleep(0.02)
        if response["status"] == "failed":
            assert response["error"]["code"] == "poison"
            continue
        assert response["status"] == "completed"
        for i, r in enumerate(response["results"]):
            assert read(Image.open(io.BytesIO(c.get(r["url"]).content))) == digest(prompt, "", {}, seed + i)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert audit.problems(folder) == []


@pytest.mark.slow
def test_a_signal_lets_the_work_in_hand_be_finished(tmp_path: Path) -> None:
    process, c = start(tmp_path / "s", free_port(), step_s=0.1)
    response: dict[str, Any] = {}

    def hold() -> None:
        response["answer"] = c.post("/api/paint?wait=true", json={"prompt": "last", "steps": 50})

    thread = threading.Thread(target=hold)
    thread.start()
    while [j["status"] for j in c.get("/api/jobs").json()["jobs"]] != ["running"]:
        assert thread.is_alive()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert response["answer"].json()["status"] == "completed"
    assert process.wait(20) == 0
    assert audit.problems(tmp_path / "s") == []
