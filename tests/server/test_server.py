"""The server's native API, its line, its store: on an engine that draws what was asked."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from minikin.errors import BadRecipe, OutOfMemory, StorageError
from minikin.models import memory
from minikin.recipes import Paint
from minikin.server import audit
from minikin.server.audit import RESULTS, STORE
from minikin.server.batch_size import BatchSizer
from minikin.server.engine import PreparedRequest
from minikin.server.errors import RequestRejected
from minikin.server.job_store import JobStore
from minikin.server.jobs import Job, JobRequest
from minikin.server.limits import Limits
from minikin.server.queue import JobQueue
from minikin.server.service import Service
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.servers import concept, served


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def until(true: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


# ---- painting ----------------------------------------------------------------------------------


def test_paints_what_was_asked_and_tells_how_far_it_is(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        response = c.post("/api/paint", json={"prompt": "a cat", "n": 3, "seed": 5, "task": "mine"})
        assert response.status_code == 202
        id_ = response.json()["id"]
        assert response.headers["location"] == f"/api/jobs/{id_}" and len(id_) == 32
        observed = []
        with c.stream("GET", f"/api/jobs/{id_}/events") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    observed.append(json.loads(line[5:]))
        end = observed[-1]
        assert end["status"] == "completed" and end["task"] == "mine"
        steps = [item["progress"]["step"] for item in observed]
        assert steps == sorted(steps) and steps[-1] == end["progress"]["steps"] == 12
        assert [r["seed"] for r in end["results"]] == [5, 6, 7]
        for r in end["results"]:
            got = c.get(r["url"])
            assert (
                got.headers["content-type"] == "image/png"
                and got.headers["x-content-type-options"] == "nosniff"
            )
            assert hashlib.sha256(got.content).hexdigest() == r["sha256"]
            assert read(opened(got.content)) == digest("a cat", "", {}, r["seed"])
            assert "Seed: " + str(r["seed"]) in opened(got.content).info["parameters"]
        assert [j["id"] for j in c.get("/api/jobs").json()["jobs"]] == [id_]


def test_waiting_for_the_answer(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        response = c.post("/api/paint?wait=true", json={"prompt": "a cat", "size": "64x72"})
        assert response.status_code == 200 and response.json()["status"] == "completed"
        assert (response.json()["results"][0]["width"], response.json()["results"][0]["height"]) == (64, 72)


@pytest.mark.parametrize("kind", ["paint", "refine"])
def test_previews_while_it_runs(tmp_path: Path, kind: str) -> None:
    engine = FakeEngine()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    more = {"image": base64.b64encode(buffer.getvalue()).decode()} if kind == "refine" else {}
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        id_ = c.post(f"/api/{kind}", json={"prompt": "a cat", **more}).json()["id"]
        until(lambda: c.get(f"/api/jobs/{id_}").json()["preview"])
        engine.go.set()
        until(lambda: c.get(f"/api/jobs/{id_}").json()["status"] == "completed")
        assert c.get(f"/api/jobs/{id_}").json()["preview"] is None


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"prompt": "a", "n": 11}, 422, "over_limit", "at most 10 images"),
        ({"prompt": "a", "n": 10**6}, 422, "invalid_request", "at most 1000"),
        ({"prompt": "a", "n": True}, 422, "invalid_request", "cannot be true or false"),
        ({"prompt": "a", "steps": 51}, 422, "over_limit", "at most 50 steps"),
        ({"prompt": "a", "width": 4096}, 422, "over_limit", "64 to 2048"),
        ({"prompt": "a", "n": 10, "size": "2048", "steps": 50}, 422, "too_expensive", "megapixel-steps"),
        ({"prompt": "a", "base": "sdxl"}, 404, "model_not_found", "base is 'fake'"),
        ({"prompt": "a", "device": "cuda"}, 422, "bad_recipe", "set by the server"),
        ({"prompt": "a", "colour": 1}, 422, "invalid_request", "colour"),
        ({"prompt": "a <tom>"}, 422, "unknown_name", "Unknown concept 'tom'"),
        ({"prompt": "a <tom>", "concepts": {"tom": "sha256:" + "0" * 64}}, 404, "not_found", "no concept"),
        ({"prompt": "".join(f"<c{i}>" for i in range(9))}, 422, "bad_recipe", "At most 8 concepts"),
        ({}, 422, "invalid_request", "prompt"),
    ],
)  # fmt: skip
def test_refusals_before_anything_waits(
    refusing: Any, body: dict[str, Any], status: int, code: str, words: str
) -> None:
    response = refusing.post("/api/paint", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert words in response.json()["error"]["message"]
    assert "/" not in response.json()["error"]["message"].replace("://", "") or code in ("over_limit",)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: Any) -> Any:
    with served(FakeEngine(), tmp_path_factory.mktemp("r") / "s") as s, s.client() as c:
        yield c
        assert not s.service.store.jobs("local", 10)


# ---- cancelling --------------------------------------------------------------------------------


def test_a_running_job_is_left_within_a_step(tmp_path: Path) -> None:
    engine = FakeEngine(step_s=0.01, steps=40)
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.steps_done = 0
        id_ = c.post("/api/paint", json={"prompt": "long", "steps": 40}).json()["id"]
        until(lambda: engine.steps_done >= 2)
        engine.go.clear()  # however long the request takes
        at = engine.steps_done
        response = c.delete(f"/api/jobs/{id_}").json()
        engine.go.set()
        assert response["status"] == "cancelled" and not response["results"]
        again = c.post("/api/paint?wait=true", json={"prompt": "short", "steps": 1}).json()
        assert again["status"] == "completed"
        assert engine.steps_done - at <= 3, (
            "the step before it was held, the one it was in, and the short one's"
        )


def test_a_waiting_job_is_gone_at_once_and_mates_go_on(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        first = c.post("/api/paint", json={"prompt": "first"}).json()["id"]
        until(lambda: c.get(f"/api/jobs/{first}").json()["status"] == "running")
        second, third = (c.post("/api/paint", json={"prompt": p}).json() for p in ("second", "third"))
        assert (second["queue_position"], third["queue_position"]) == (0, 1)
        assert c.delete(f"/api/jobs/{second['id']}").json()["status"] == "cancelled", "while the engine is held"
        assert c.get(f"/api/jobs/{third['id']}").json()["queue_position"] == 0
        engine.go.set()
        s.drained()
        got = c.get(f"/api/jobs/{third['id']}").json()
        assert read(opened(c.get(got["results"][0]["url"]).content)) == digest("third", "", {}, 0)


def test_a_caller_who_goes_away_cancels(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        with pytest.raises(Exception, match="timed out"):
            c.post("/api/paint?wait=true", json={"prompt": "left"}, timeout=1.0)
        until(lambda: [j["status"] for j in s.service.store.jobs("local", 1)] == ["cancelled"])
        engine.go.set()


# ---- the line ----------------------------------------------------------------------------------


def waiting(line: JobQueue, client: str, n: int, group: Any = "g") -> Job:
    job = Job(
        JobRequest("paint", client), PreparedRequest(Paint(prompt=client), {}, group, 1, 1000), list(range(n))
    )
    line.put(job)
    return job


def test_clients_take_turns() -> None:
    """InvokeAI's order: A1, B1, C1, A2, C2, A3; each piece alone, so that only the order counts."""
    line = JobQueue(Limits(batch=1))
    for client, n in (("A", 3), ("B", 1), ("C", 2)):
        waiting(line, client, n)
    order = [f"{p.job.request.client}{p.number + 1}" for _ in range(6) for p in line.take(0)]
    assert order == ["A1", "B1", "C1", "A2", "C2", "A3"]
    assert line.take(0) == []


def test_what_waits_is_taken_together_up_to_the_limits() -> None:
    line = JobQueue(Limits(batch=4))
    for client in "ABC":
        waiting(line, client, 3)
    waiting(line, "D", 1, group="other")
    sizes = [len(line.take(0)) for _ in range(4)]
    assert sorted(sizes) == [1, 1, 4, 4]


def test_what_waits_is_taken_together_up_to_the_memory_that_is_free() -> None:
    """4,000 bytes an image: of 10,000 that are free, four fifths are two of them; never more than fit."""
    free = [10_000]
    room = BatchSizer(4.0, lambda: free[0], nullcontext)
    line = JobQueue(Limits())
    waiting(line, "A", 9)

    def taken() -> int:
        return len(line.take(0, lambda prepared: room.fits(prepared.pixels)))

    assert taken() == 2
    free[0] = 25_000
    assert taken() == 5
    free[0] = 100  # not even one: it is tried all the same
    assert taken() == 1


def test_memory_of_an_image_is_measured() -> None:
    """From the first batch on; more counts at once, less by and by, and a batch too large as what it was."""
    free, took = [1_000_000], [0]

    @contextmanager
    def peak() -> Iterator[Any]:
        yield SimpleNamespace(before=500, bytes=500 + took[0])

    room = BatchSizer(10.0, lambda: free[0], peak)
    assert room.fits(10_000) == 8
    took[0] = 80_000
    with room.measuring(1000):
        pass
    assert room.fits(10_000) == 1 and room.bytes_per_pixel == 80
    took[0] = 0
    for _ in range(50):
        with room.measuring(1000):
            pass
    assert room.fits(10_000) == 32, "never less than a quarter of what was estimated"
    with pytest.raises(OutOfMemory), room.measuring(320_000):
        raise OutOfMemory("Too much.")
    assert room.fits(10_000) == 25, "that many were tried and did not fit"
    nobody_tells = BatchSizer(10.0, lambda: None, peak)
    assert nobody_tells.fits(1 << 20) == 8


def test_what_is_free_of_a_container(monkeypatch: Any, tmp_path: Path) -> None:
    """What its limit leaves, where that is less than the machine has."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = memory.free(torch.device("cpu"))
    if machine is None:
        pytest.skip("this system does not tell what is free")
    for name, text in (("max", "5000"), ("current", "4000"), ("stat", "anon 1\ninactive_file 1500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free(torch.device("cpu")) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu")) == pytest.approx(machine, rel=0.2)


def test_progress_is_that_of_the_stage() -> None:
    """Within a stage it never falls; a new one begins at its own count (teaching stood at 3072 of 60)."""
    job = Job(JobRequest("teach", "A"), PreparedRequest(Paint(prompt=""), {}, None, 60, 1000), [])
    response = []
    for done, stage in (
        (10, "covariance"),
        (3072, "covariance"),
        (1, "teaching"),
        (9, "teaching"),
        (8, "teaching"),
    ):
        job.step(done, stage=stage)
        response.append(job.done)
    assert response == [10, 3072, 1, 9, 9]


def test_a_full_line_says_when_to_come_back(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s", limits=Limits(waiting_per_client=2, waiting=3)) as s, s.client() as c:
        engine.go.clear()
        first = c.post("/api/paint", json={"prompt": "0"}).json()["id"]
        until(lambda: c.get(f"/api/jobs/{first}").json()["status"] == "running")
        response = [c.post("/api/paint", json={"prompt": "x", "steps": k + 5}) for k in range(3)]
        assert [t.status_code for t in response] == [202, 202, 429]
        assert (
            response[-1].json()["error"]["code"] == "client_queue_full"
            and int(response[-1].headers["retry-after"]) >= 1
        )
        other = {"X-Minikin-Client": "other"}
        more = [c.post("/api/paint", json={"prompt": "y"}, headers=other) for _ in range(2)]
        assert [t.status_code for t in more] == [202, 429] and more[1].json()["error"]["code"] == "queue_full"
        engine.go.set()
        s.drained()


# ---- errors of the engine ----------------------------------------------------------------------


def test_one_bad_row_spoils_nothing_but_itself(tmp_path: Path) -> None:
    engine = FakeEngine(errors={"bad": BadRecipe("No such thing."), "worse": RuntimeError("/secret/path")})
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        c.post("/api/paint", json={"prompt": "hold"})
        ids = {
            p: c.post("/api/paint", json={"prompt": p}).json()["id"] for p in ("good", "bad", "worse", "fine")
        }
        engine.go.set()
        s.drained()
        got = {p: c.get(f"/api/jobs/{i}").json() for p, i in ids.items()}
        assert [got[p]["status"] for p in ids] == ["completed", "failed", "failed", "completed"]
        assert got["bad"]["error"] == {"code": "bad_recipe", "message": "No such thing."}
        assert (
            got["worse"]["error"]["code"] == "internal_error"
            and "secret" not in got["worse"]["error"]["message"]
        )


def test_too_little_memory_halves_the_batch(tmp_path: Path) -> None:
    class Small(FakeEngine):
        def paint(self, rows: Any, on_step: Any) -> Any:
            if len(rows) > 2:
                raise OutOfMemory("Too much.")
            return super().paint(rows, on_step)

    with served(Small(), tmp_path / "s") as s, s.client() as c:
        response = c.post("/api/paint?wait=true", json={"prompt": "many", "n": 8}).json()
        assert response["status"] == "completed" and len(response["results"]) == 8
        assert s.service.engine.batches[-4:] == [2, 2, 2, 2]  # type: ignore[attr-defined]


# ---- concepts ----------------------------------------------------------------------------------


def test_two_clients_with_different_concepts_of_one_name(tmp_path: Path) -> None:
    """At once, in one batch, over one line: each sees its own, and names contents by hash when it wants."""
    with served(FakeEngine(), tmp_path / "s", keys=["k1", "k2"]) as s:
        clients = {k: s.client(headers={"X-API-Key": k}) for k in ("k1", "k2")}
        files = {k: concept("tom", i) for i, k in enumerate(clients)}
        shas = {k: hashlib.sha256(f).hexdigest() for k, f in files.items()}
        for k, c in clients.items():
            response = c.post("/api/concepts", files={"file": ("x.safetensors", files[k])})
            assert response.status_code == 201 and response.json()["sha256"] == shas[k]
            assert [e["name"] for e in c.get("/api/concepts").json()["concepts"]] == ["tom"]
        s.service.engine.go.clear()  # type: ignore[attr-defined]
        prompt = "a photo of <tom>"
        jobs = [
            (k, c.post("/api/paint", json={"prompt": prompt, "n": 4}).json()["id"]) for k, c in clients.items()
        ]
        s.service.engine.go.set()  # type: ignore[attr-defined]
        s.drained()
        for k, id_ in jobs:
            for r in clients[k].get(f"/api/jobs/{id_}").json()["results"]:
                got = read(opened(clients[k].get(r["url"]).content))
                assert got == digest(prompt, "", {"tom": shas[k]}, r["seed"])
                other = clients["k2" if k == "k1" else "k1"]
                assert other.get(r["url"]).status_code == 404
            assert other.get(f"/api/jobs/{id_}").status_code == 404
            assert other.delete(f"/api/jobs/{id_}").status_code == 404
        stolen = clients["k1"].post("/api/paint", json={"prompt": f"<tom@sha256:{shas['k2']}>"})
        assert stolen.status_code == 404
        for c in clients.values():
            c.close()


def test_contents_by_hash(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        shas = []
        for k in range(2):
            response = c.post("/api/concepts", files={"file": ("x", concept("tom", k))}, data={"name": "tom"})
            shas.append(response.json()["sha256"])

        def paint_bytes(prompt: str, **more: Any) -> bytes:
            response = c.post("/api/paint?wait=true", json={"prompt": prompt, **more}).json()
            return read(opened(c.get(response["results"][0]["url"]).content))

        newest = digest("<tom>", "", {"tom": shas[1]}, 0)
        older = digest("<tom>", "", {"tom": shas[0]}, 0)
        assert paint_bytes("<tom>") == newest
        assert paint_bytes(f"<tom@sha256:{shas[0][:12]}>") == older
        assert paint_bytes("<tom>", concepts={"tom": f"sha256:{shas[0]}"}) == older
        placed = digest("<tom@left:0.8>", "", {"tom": shas[0]}, 0)
        assert paint_bytes(f"<tom@sha256:{shas[0]}@left:0.8>") == placed
        both = c.post("/api/paint", json={"prompt": f"<tom@sha256:{shas[0]}> <tom@sha256:{shas[1]}>"})
        assert both.status_code == 422 and "two contents" in both.json()["error"]["message"]
        assert c.get("/api/concepts/tom").content == concept("tom", 1)
        assert c.get(f"/api/concepts/sha256:{shas[0]}").content == concept("tom", 0)
        assert len(c.delete("/api/concepts/tom").json()["deleted"]) == 2
        assert c.post("/api/paint", json={"prompt": "<tom>"}).status_code == 422
        assert not list((tmp_path / "s" / "concepts").iterdir())
        refused = c.post("/api/concepts", files={"file": ("x", b"nonsense")})
        assert refused.status_code == 415 and refused.json()["error"]["code"] == "unsupported_concept_format"


# ---- the store ---------------------------------------------------------------------------------


def test_jobs_survive_a_restart(tmp_path: Path) -> None:
    """What waited and what ran are painted after the restart; who held the line is told it was cancelled."""
    folder, engine = tmp_path / "s", FakeEngine()
    service = Service([engine], folder)
    engine.go.clear()
    for worker in service.workers:
        worker.warm.set()
    ran = service.submit(JobRequest("paint", "a"), {"prompt": "ran", "n": 2, "seed": 3})
    service.store.start([ran.id])
    waited = service.submit(JobRequest("paint", "a"), {"prompt": "waited"})
    held = service.submit(JobRequest("paint", "a", blocking=True), {"prompt": "held"})
    poison = service.submit(JobRequest("paint", "a"), {"prompt": "poison"})
    for _ in range(3):
        service.store.start([poison.id])
    (service.results / ("f" * 32 + ".png")).write_bytes(b"of a killed process")
    (service.inputs / ("e" * 32)).mkdir()  # of a job that had ended just before
    service.store.close()  # as after kill -9: nothing was tidied up
    service._folder_lock.__exit__(None, None, None)
    with served(FakeEngine(), folder) as s:
        s.drained()
        assert not list(service.inputs.iterdir())
        rows = {j.id: s.service.store.job(j.id) for j in (ran, waited, held, poison)}
        assert [rows[j.id]["status"] for j in (ran, waited, held, poison)] == [
            "completed", "completed", "cancelled", "failed"
        ]  # fmt: skip
        assert rows[poison.id]["code"] == "poison" and rows[ran.id]["attempts"] == 2
        image_files = s.service.store.images(ran.id)
        observed = [read(opened((s.folder / "results" / f"{p['id']}.png").read_bytes())) for p in image_files]
        assert observed == [digest("ran", "", {}, seed) for seed in (3, 4)]


def test_a_server_that_ends_leaves_waiting_jobs_for_the_next(tmp_path: Path) -> None:
    folder, engine = tmp_path / "s", FakeEngine()
    with served(engine, folder, limits=Limits(drain_s=0.2), drained=False) as s, s.client() as c:
        engine.go.clear()
        id_ = c.post("/api/paint", json={"prompt": "late"}).json()["id"]
        until(lambda: c.get(f"/api/jobs/{id_}").json()["status"] == "running")
        s.service.drain()
        response = c.post("/api/paint", json={"prompt": "new"})
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        assert c.get("/readyz").status_code == 503 and c.get("/livez").status_code == 200
    with served(FakeEngine(), folder) as s, s.client() as c:
        s.drained()
        assert c.get(f"/api/jobs/{id_}").json()["status"] == "completed"


def test_one_server_a_folder(tmp_path: Path) -> None:
    service = Service([FakeEngine()], tmp_path / "s")
    with pytest.raises(Exception, match="Another process"):
        Service([FakeEngine()], tmp_path / "s")
    service.close(0)


def test_a_job_that_was_cancelled_as_it_was_begun_stays_so(tmp_path: Path) -> None:
    """The worker takes it, the cancel's end is written first, then its start comes: the end stands."""
    (tmp_path / RESULTS).mkdir()
    store = JobStore(tmp_path / STORE)
    none = {"kind": "paint", "client": "me", "dialect": "native", "task": "", "held": 0, "status": "queued"}
    for id_ in ("a", "b"):
        store.accept({"id": id_, **none, "recipe": "{}", "concepts": {}, "warnings": [], "created": 0.0})
    store.end("a", "cancelled")
    store.start(["a", "b"])
    assert [store.job(i)["status"] for i in "ab"] == ["cancelled", "running"]  # type: ignore[index]
    store.close()
    assert audit.problems(tmp_path, drained=False) == []


def test_stores_that_cannot_be_used(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    with pytest.raises(StorageError, match="cannot be used|is damaged"):
        JobStore(damaged)
    assert damaged.read_bytes().endswith(b"\xff")
    newer = tmp_path / "newer.sqlite"
    JobStore(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(StorageError, match="version 99"):
        JobStore(newer)


def test_results_are_swept(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", limits=Limits(keep_bytes=1)) as s, s.client() as c:
        url = c.post("/api/paint?wait=true", json={"prompt": "a"}).json()["results"][0]["url"]
        assert c.get(url).status_code == 200
        assert s.service.sweep() == 1
        assert c.get(url).status_code == 404


def test_the_audit_finds_planted_problems(tmp_path: Path) -> None:
    """Its positive controls: each planted fault is told, and only then."""
    folder = tmp_path / "s"
    with served(FakeEngine(), folder) as s, s.client() as c:
        response = c.post("/api/paint?wait=true", json={"prompt": "a", "n": 2}).json()
    job, (item, two) = response["id"], [r["id"] for r in response["results"]]
    assert audit.problems(folder) == []
    db = sqlite3.connect(folder / "jobs.sqlite")

    def planted(*statements: str) -> str:
        db.executescript(";".join(statements))
        return "; ".join(audit.problems(folder))

    assert "ended 2 times" in planted(f"INSERT INTO ledger (job, event, at) VALUES ('{job}', 'failed', 0)")
    assert "never ended" in planted(f"DELETE FROM ledger WHERE job='{job}' AND event!='accepted'")
    assert "never ended" not in "; ".join(audit.problems(folder, drained=False))
    assert "without an event" in planted(f"DELETE FROM ledger WHERE job='{job}'")
    (folder / "results" / f"{item}.png").write_bytes(b"another")
    assert f"image {item} of job {job} does not have" in planted()
    (folder / "results" / f"{two}.png").unlink()
    assert f"image {two} of job {job} has no file" in planted()
    (folder / "results" / "stray.png").write_bytes(b"")
    assert "stray.png belongs to no job" in planted()
    assert "completed with 1 of 2" in planted(f"DELETE FROM pictures WHERE id='{two}'")
    (folder / "inputs" / job).mkdir()
    assert f"images of job {job} are left" in planted()
    assert "are left" not in "; ".join(audit.problems(folder, drained=False))
    (folder / "concepts" / f"{'a' * 64}.safetensors").write_bytes(b"another")
    assert "concept tom (aaaaaaaa) does not have" in planted(
        f"INSERT INTO shelf VALUES ('x', '{'a' * 64}', 'tom', 0)"
    )
    assert "concept kim (bbbbbbbb) has no file" in planted(
        f"INSERT INTO shelf VALUES ('x', '{'b' * 64}', 'kim', 0)"
    )
    db.close()


def test_every_server_of_these_tests_ends_with_the_audit(tmp_path: Path) -> None:
    """`served` fails for a planted fault; and nobody here runs a server past it, but for those in this list."""
    with pytest.raises(AssertionError, match="belongs to no job"), served(FakeEngine(), tmp_path / "s") as s:
        (s.folder / "results" / "stray.png").write_bytes(b"")
    here = Path(__file__).parents[1]
    runs = ("Service(", "uvicorn.Server(", "minikin.server.app", "-m minikin serve")
    matches = {p.name for p in here.rglob("*.py") if any(r in p.read_text() for r in runs)}
    assert matches == {
        "servers.py",  # `served`: the audit at its end
        "test_imports.py",  # imports alone
        "loads.py",  # `running`: the same, of a process
        "killed.py",  # `test_kills` runs the audit
        "test_finishing.py",  # the audit of a server that must end at once
        "test_every_job_ends.py",  # the same, at the end of each
        "test_faults.py", "test_server.py",  # stores that are refused; the restart ends inside `served`
        # the gate around an app that `served` runs
        "test_open_port.py", "test_server_guard.py", "test_admission.py", "test_hostile_bodies.py",
    }  # fmt: skip


def test_finishing_that_fails_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    """A full disk: the job fails with 507's words, nothing is half there, the next one is painted."""
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        from minikin import files

        whole = files.atomic_write
        monkeypatch.setattr(files, "atomic_write", lambda *_: (_ for _ in ()).throw(StorageError("/x is full")))
        response = c.post("/api/paint?wait=true", json={"prompt": "a"})
        assert (
            response.status_code == 507
            and "/x" not in response.text
            and "nothing was overwritten" in response.text
        )
        monkeypatch.setattr(files, "atomic_write", whole)
        assert c.post("/api/paint?wait=true", json={"prompt": "a"}).status_code == 200


def test_many_threads_submit_and_cancel(tmp_path: Path) -> None:
    """The audit finds nothing when submissions, cancellations and batches race."""
    with served(
        FakeEngine(step_s=0.001), tmp_path / "s", limits=Limits(waiting_per_client=500, waiting=500)
    ) as s:
        done: list[str] = []

        def run(k: int) -> None:
            for i in range(12):
                job = s.service.submit(JobRequest("paint", f"c{k}"), {"prompt": f"{k} {i}", "n": 1 + i % 3})
                if i % 3 == 0:
                    s.service.cancel(job)
                assert job.finished.wait(10)
                done.append(job.status)

        threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(done) == 72 and set(done) == {"completed", "cancelled"}


def test_refused_is_an_error_like_others() -> None:
    assert isinstance(RequestRejected("x", status=400, code="y"), Exception)
