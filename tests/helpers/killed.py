"""Work for helpers/kills.py, all small: teaching, distilling, sweeping, the training loop, serving.

Imported once by the server that child processes are forked from; so it builds its base here, and they have it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minikin import events
from minikin.distillation import export
from minikin.distillation.distill import distill
from minikin.files import atomic_write
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.perfusion import concept_file
from minikin.perfusion.train import teach
from minikin.recipes import Distill, Teach
from minikin.server import audit
from minikin.server.jobs import JobRequest
from minikin.server.service import Service
from minikin.training import checkpoint
from tests.conftest import build_pipeline
from tests.helpers.distillings import captions_file
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.kills import Work, digest

torch.set_num_threads(1)  # before anything runs: a fork copies no threads
PAUSE = 0.01  # s in steps that take none, so that a kill meets them


@cache
def base() -> Base:
    with tempfile.TemporaryDirectory() as folder:
        return Base(build_pipeline("sd15", Path(folder), flat=True), "sd15")


def photos() -> list[Photo]:
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    return [Photo(f"{k}.png", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), mask) for k in range(2)]


# ---- teaching ----------------------------------------------------------------------------------------


def _teach(folder: Path, done: Any) -> None:
    torch.set_num_threads(1)
    recipe = Teach(name="tom", category="cat", mode="value", batch=2, steps=10)
    opened = base()
    done.value = 0
    run = teach(opened, photos(), recipe, None, checkpoint=folder / "checkpoint.safetensors", resume=True,
                save_every=2)  # fmt: skip
    for event in run:
        if isinstance(event, events.Progress):
            done.value = event.done
        elif isinstance(event, events.Done):
            concept_file.save(event.result, folder / "tom.safetensors")


# ---- distilling --------------------------------------------------------------------------------------


def _distill(folder: Path, done: Any) -> None:
    torch.set_num_threads(1)
    data = captions_file(folder)
    recipe = Distill.make(
        data=str(data), base="sd15", method="lcm-lora", rank=4, batch=2, steps=5, teacher_steps=2,
        save_minutes=0, lr=1e-2,
    )  # fmt: skip
    out, opened = folder / "out", base()
    done.value = 0
    for event in distill(opened, recipe, out, resume=True):
        if isinstance(event, events.Progress) and event.stage == "lcm-lora":
            done.value = event.done


def _saved_steps(folder: Path) -> int:
    paths = sorted(folder.rglob("checkpoint.safetensors"))
    return int(checkpoint.read(paths[0])[1]["state"]["step"]) if paths else 0


# ---- sweeping ----------------------------------------------------------------------------------------


def _sweep(folder: Path, done: Any) -> None:
    from minikin.evaluation.cache import Cache
    from tests.helpers.sweeps import Painter, run, task_on

    torch.set_num_threads(1)
    task = task_on(base())
    cached = len(Cache(folder / "cache.jsonl"))

    def after(n: int) -> None:
        done.value = cached + n - 1  # this set is generated, but not yet reported
        time.sleep(PAUSE / 5)

    done.value = 0
    points, _ = run(task, folder, Painter(after=after))
    atomic_write(folder / "points.json", json.dumps({k: repr(v) for k, v in sorted(points.items())}).encode())


def _swept(folder: Path) -> int:
    from minikin.evaluation.cache import Cache

    return len(Cache(folder / "cache.jsonl")) if (folder / "cache.jsonl").exists() else 0


# ---- the training loop ----------------------------------------------------------------------------------


def _train(folder: Path, done: Any) -> None:
    from tests.training.test_trainer import trained

    torch.set_num_threads(1)

    def step(ctx: Any) -> None:
        done.value = ctx.step
        time.sleep(PAUSE)

    done.value = 0
    trained(folder, step, steps=40, save_minutes=0)


# ---- serving -----------------------------------------------------------------------------------------


def _serve(folder: Path, done: Any) -> None:
    """Continue the unfinished jobs; accept twelve more and note each; return when all have ended."""
    service = Service([FakeEngine(step_s=PAUSE / 2)], folder / "s")
    service.start()
    noted = folder / "accepted.txt"
    before = len(noted.read_text().split()) if noted.exists() else 0
    done.value = 0
    for k in range(before, 12):
        job = service.submit(
            JobRequest("paint", f"client{k % 3}"), {"prompt": f"number {k}", "seed": k, "n": 2}
        )
        with open(noted, "a") as f:
            f.write(f"{job.id}\n")
    while service._unfinished():
        time.sleep(0.005)
    service.close()


def _served(folder: Path) -> str:
    """Every job that was accepted and noted ended once, with its own images."""
    from PIL import Image

    from minikin.server.job_store import JobStore
    from tests.helpers.fake_engine import digest as image_digest
    from tests.helpers.fake_engine import read

    if problems := audit.problems(folder / "s"):
        return f"the audit: {problems}"
    store = JobStore(folder / "s" / audit.STORE)
    try:
        for k, id_ in enumerate((folder / "accepted.txt").read_text().split()):
            row = store.job(id_)
            if row is None or row["status"] not in ("completed", "failed"):
                return f"number {k} is {row and row['status']}"
            if row["status"] == "failed" and row["code"] != "poison":
                return f"number {k} failed: {row['message']}"
            for i, p in enumerate(store.images(id_)):
                with Image.open(folder / "s" / audit.RESULTS / f"{p['id']}.png") as image:
                    if read(image) != image_digest(f"number {k}", "", {}, k + i):
                        return f"number {k} has another's image"
    finally:
        store.close()
    return "all ended"


# ---- positive controls -------------------------------------------------------------------------------


def _in_place(folder: Path, done: Any) -> None:
    """Writes its file in place, slowly."""
    done.value = 0
    for n in range(20):
        with open(folder / "state.json", "w") as f:
            f.write("[" + "1," * 50_000)
            f.flush()
            time.sleep(PAUSE)
            f.write(f"{n}]")
        done.value = n


def _forgetful(folder: Path, done: Any) -> None:
    """Goes on from where it was, with other numbers than it had; alike as long as nobody kills it."""
    path = folder / "state.json"
    n, total = json.loads(path.read_text()) if path.exists() else (0, 0)
    rng = np.random.default_rng(n)
    done.value = 0
    while n < 30:
        time.sleep(PAUSE)
        n, total = n + 1, total + int(rng.integers(1 << 30))
        done.value = n
        atomic_write(path, json.dumps([n, total]).encode())


def _seldom(folder: Path, done: Any) -> None:
    """Saves every tenth step only."""
    path = folder / "state.json"
    n = json.loads(path.read_text())[0] if path.exists() else 0
    done.value = n
    while n < 40:
        time.sleep(PAUSE)
        n += 1
        done.value = n
        if n % 10 == 0:
            atomic_write(path, json.dumps([n]).encode())


def _count(folder: Path) -> int:
    path = folder / "state.json"
    return int(json.loads(path.read_text())[0]) if path.exists() else 0


def _text(folder: Path) -> str:
    return (folder / "state.json").read_text()


def _lora(folder: Path) -> str:
    return digest(folder / "out" / export.LORA_NAME)


def _concept(folder: Path) -> str:
    return digest(folder / "tom.safetensors")


def _points(folder: Path) -> str:
    return (folder / "points.json").read_text()


def _weights(folder: Path) -> str:
    return digest(folder / "checkpoint.safetensors")


def _nothing(folder: Path) -> int:
    return 0


WORKS = {
    "teach": Work(_teach, _saved_steps, _concept, interval=2),
    "distill": Work(_distill, _saved_steps, _lora, interval=1),
    "sweep": Work(_sweep, _swept, _points, interval=1),
    "build": Work(_train, _saved_steps, _weights, interval=1),
    "serve": Work(_serve, _nothing, _served),
}
PLANTED = {
    "in place": Work(_in_place, _nothing, _text, interval=10**9),
    "forgetful": Work(_forgetful, _count, _text, interval=1),
    "seldom": Work(_seldom, _count, _text, interval=2),
}
if os.environ.get("MINIKIN_KILLS"):
    base()  # in the server that children are forked from
