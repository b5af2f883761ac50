"""Rows K8 and K11-K14 of docs/robustness.md: clocks, numbers, memory, the job store, handles."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import minikin
from minikin.errors import NanOrInf, OutOfMemory, StorageError
from minikin.server import audit, decode
from minikin.server.errors import RequestRejected
from minikin.server.job_store import JobStore
from minikin.server.jobs import JobRequest
from minikin.server.limits import Limits
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.servers import served

ROOT = Path(minikin.__file__).parent


# ---- K8: clocks --------------------------------------------------------------------------------------

STAMPS = {  # where the clock on the wall is asked, and what for; durations are of the monotonic clock
    "files.py": "age of orphans, besides their lock", "server/api/a1111.py": "a stamp that is shown",
    "server/api/openai.py": "a stamp that is shown", "server/jobs.py": "stamps of jobs",
    "server/result_writer.py": "how long a job waited, since its stamp",
    "server/service.py": "the age of results, which outlives restarts",
    "server/job_store.py": "timestamps of events",
}  # fmt: skip


def test_the_wall_clock_is_for_stamps_only() -> None:
    matches = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if "time.time()" in p.read_text()}
    assert matches == set(STAMPS)


@pytest.fixture
def jumping(monkeypatch: Any) -> None:
    """A wall clock that is an hour off, to and fro, whenever it is asked."""
    real, jumps = time.time, itertools.cycle((0.0, 3600.0, -3600.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))


@pytest.mark.usefixtures("jumping")
def test_clocks_that_jump_harm_no_job(tmp_path: Path) -> None:
    """An hour to and fro between any two looks: every job ends, nothing expires, waits are not negative."""
    with served(FakeEngine(step_s=0.002), tmp_path / "s") as s, s.client() as c:
        for k in range(10):
            response = c.post("/api/paint?wait=true", json={"prompt": f"number {k}", "seed": k}).json()
            assert response["status"] == "completed", response
        assert s.service.sweep() == 0
        assert "minikin_queue_wait_seconds_sum -" not in c.get("/metrics").text


def test_expiry_is_not_blind_to_time(tmp_path: Path) -> None:
    """The control: what is older than it may be does expire."""
    with served(FakeEngine(), tmp_path / "s", limits=Limits(keep_s=0)) as s, s.client() as c:
        c.post("/api/paint?wait=true", json={"prompt": "a"})
        time.sleep(0.01)
        assert s.service.sweep() == 1


# ---- K11 and K12: numbers and memory, over HTTP ------------------------------------------------------


def test_numbers_that_are_not_finite_are_one_callers_error(tmp_path: Path) -> None:
    """500, named, not to be tried again; who shares the batch has the image; the next request works."""
    engine = FakeEngine(errors={"overflow": NanOrInf("1 of 1 images could not be decoded.")})
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        s.service.workers[0].warm.wait()
        bad = s.service.submit(JobRequest("paint", "a"), {"prompt": "overflow"})
        good = s.service.submit(JobRequest("paint", "b"), {"prompt": "fine", "seed": 4})
        engine.go.set()
        s.drained()
        rows = [s.service.store.job(j.id) for j in (bad, good)]
        assert [r and r["status"] for r in rows] == ["failed", "completed"]
        assert rows[0] and rows[0]["code"] == "non_finite_output"
        (p,) = s.service.store.images(good.id)
        with Image.open(io.BytesIO(s.service.read("b", p["id"]))) as image:
            assert read(image) == digest("fine", "", {}, 4)
        response = c.post("/v1/images/generations", json={"prompt": "overflow"})
        assert response.status_code == 500 and response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "non_finite_output"
        assert c.post("/v1/images/generations", json={"prompt": "fine"}).status_code == 200


def test_too_little_memory_for_a_single_image(tmp_path: Path) -> None:
    """503 that says no to another try; the next request works."""
    engine = FakeEngine(errors={"huge": OutOfMemory("Not enough memory on cpu for 1 images at once.")})
    with served(engine, tmp_path / "s") as s, s.client() as c:
        response = c.post("/v1/images/generations", json={"prompt": "huge"})
        assert response.status_code == 503 and response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "out_of_memory" and "Retry-After" not in response.headers
        assert c.post("/v1/images/generations", json={"prompt": "small"}).status_code == 200


# ---- K13: the job store ------------------------------------------------------------------------------


def row(k: int, text: str = "") -> dict[str, Any]:
    return {"id": f"{k:032x}", "kind": "paint", "client": "a", "dialect": "native", "task": "", "held": 0,
            "status": "queued", "recipe": f'"{text}"', "concepts": {}, "warnings": [],
            "created": float(k)}  # fmt: skip


def test_a_store_that_another_process_holds(tmp_path: Path) -> None:
    """Waited for; when that takes too long, an error, and what comes after works."""
    store = JobStore(tmp_path / "jobs.sqlite", wait_s=20)
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
    store.accept(row(1))
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite", wait_s=0.2)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="was not written: database is locked"):
        store.accept(row(2))
    other.execute("COMMIT")
    store.accept(row(2))
    assert [r["id"] for r in store.unfinished()] == [f"{k:032x}" for k in (1, 2)]
    store.close()
    other.close()


def test_damage_to_the_store_is_an_error_or_harmless(tmp_path: Path) -> None:
    """A hundred damaged copies: refused, with the path, and left as they are, or read; no other exception."""
    whole = tmp_path / "whole.sqlite"
    store = JobStore(whole)
    for k in range(20):
        store.accept(row(k, "x" * 500))
    store.close()
    data, rng, refused = whole.read_bytes(), random.Random(0), 0
    for k in range(100):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 10, 200))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{k}.sqlite"
        path.write_bytes(damaged)
        try:
            matches = JobStore(path)
            try:
                matches.unfinished()
                matches.accept(row(1000 + k))
            finally:
                matches.close()
        except StorageError as e:
            refused += 1
            assert "job store" in str(e) and e.exit_code == 7
    assert refused >= 30


def test_a_server_refuses_a_damaged_store_and_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    Service([FakeEngine()], folder).close(0)
    path = folder / audit.STORE
    damaged = path.read_bytes()[:100] + b"\xff" * 4000
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"Move it away to start with an empty one"):
        Service([FakeEngine()], folder)
    assert path.read_bytes() == damaged


def test_the_write_ahead_log_does_not_grow_without_end(tmp_path: Path) -> None:
    """12 MB of changes: the log is taken over at about 4 MB."""
    store = JobStore(tmp_path / "jobs.sqlite")
    store._db.execute("PRAGMA synchronous=OFF")
    for k in range(400):
        store.accept(row(k, "x" * 30_000))
    assert (tmp_path / "jobs.sqlite-wal").stat().st_size < 6 * 2**20
    assert (tmp_path / "jobs.sqlite").stat().st_size > 8 * 2**20
    store.close()


def test_a_full_disk_while_serving(tmp_path: Path, monkeypatch: Any) -> None:
    """507 in a sentence without paths; with space again, the next image is served without a restart."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            response = c.post("/v1/images/generations", json={"prompt": "a"})
            assert response.status_code == 507 and response.headers["x-should-retry"] == "false"
            assert response.json()["error"]["code"] == "storage_full"
            assert "nothing was overwritten" in response.text and str(tmp_path) not in response.text
        assert c.post("/v1/images/generations", json={"prompt": "a"}).status_code == 200


def test_a_full_job_store_has_the_same_code(tmp_path: Path) -> None:
    """SQLite's own refusal, forced by the most pages that the file may have."""
    store = JobStore(tmp_path / "jobs.sqlite")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError) as e, store._change() as db:
        db.execute("CREATE TABLE more AS SELECT zeroblob(100000)")
    assert (e.value.code, e.value.exit_code) == ("storage_full", 7)
    store.close()


def test_a_newer_job_store_leaves_with_7(tmp_path: Path) -> None:
    """K13, as every store that cannot be used; it is not touched."""
    path = tmp_path / "jobs.sqlite"
    JobStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    before = path.read_bytes()
    with pytest.raises(StorageError, match="has version 99; this Minikin reads up to") as e:
        JobStore(path)
    assert (e.value.exit_code, path.read_bytes()) == (7, before)


# ---- K14: handles and processes ----------------------------------------------------------------------

NO_HANDLES = """
import os, resource, sys
from minikin.server import decode
from minikin.server.errors import RequestRejected
from minikin.server.limits import Limits
png = sys.stdin.buffer.read()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    decode.decode(png, "image", Limits())
except RequestRejected as e:
    print(e.status, e.code, bool(e.retry_s), len(held) > 200)
for handle in held:
    os.close(handle)
print(decode.decode(png, "image", Limits()).size)
"""


def test_k14_no_handle_left_in_truth() -> None:
    """RLIMIT_NOFILE of 256, all of them taken: 503 with a time to come back; with handles again, it works."""
    png = io.BytesIO()
    Image.new("RGB", (64, 64)).save(png, "PNG")
    response = subprocess.run(
        [sys.executable, "-c", NO_HANDLES], input=png.getvalue(), capture_output=True, check=False
    )
    assert response.stdout.decode().split("\n")[:2] == ["503 busy True True", "(64, 64)"], (
        response.stderr.decode()
    )


def test_k14_more_callers_than_handles(tmp_path: Path) -> None:
    """200 silent callers and 64 handles for them: who is beyond waits, and nothing falls over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        assert c.get("/readyz").status_code == 200
        callers = [socket.socket() for _ in range(200)]
        most = len(os.listdir("/proc/self/fd")) + 64
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        try:
            for caller in callers:
                caller.setblocking(False)
                caller.connect_ex(("127.0.0.1", int(s.url.rpartition(":")[2])))
            until = time.monotonic() + 300
            while (taken := handles()) < most - 4 and time.monotonic() < until:
                time.sleep(0.05)
            assert taken >= most - 4, "handles were never short"
        finally:
            for caller in callers:
                caller.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert c.post("/v1/images/generations", json={"prompt": "a"}).status_code == 200


def handles() -> int:
    """How many this process has; the most there may be when not even this can be asked."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 1_000_000


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_no_handle_or_process_left_for_the_decoder(monkeypatch: Any, number: int) -> None:
    """503 with a time to come back, no crash."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, "planted")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(RequestRejected) as e:
        decode.decode(b"\x89PNG\r\n\x1a\n", "image", Limits())
    assert (e.value.status, e.value.code) == (503, "busy") and e.value.retry_s
