"""What a server keeps of concepts and requests, and for how long."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from minikin import events
from minikin.perfusion.concept_file import from_bytes
from minikin.server import retention
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, concept, served

KEYS = ("the-first-key-of-two", "the-second-key-of-two")
pytestmark = pytest.mark.usefixtures("quick_disk")


def upload(c: httpx.Client, data: bytes, who: str = "a") -> httpx.Response:
    return c.post("/api/concepts", files={"file": ("x", data)}, headers={"X-Minikin-Client": who})


def stored_hashes(s: Served) -> set[str]:
    return {path.stem for path in (s.folder / "concepts").iterdir()}


# ---- concepts ----------------------------------------------------------------------------------


def test_what_is_deleted_while_a_job_needs_it_goes_with_that_job(tmp_path: Path) -> None:
    """Not before, or a restart could not take the job up; and not for ever."""
    engine, data = FakeEngine(), concept("tom", 1)
    sha256 = hashlib.sha256(data).hexdigest()
    with served(engine, tmp_path / "s") as s, s.client(headers={"X-Minikin-Client": "a"}) as c:
        upload(c, data)
        engine.go.clear()
        job = c.post("/api/paint", json={"prompt": "a <tom>"}).json()
        assert c.delete("/api/concepts/tom").status_code == 200
        s.service.sweep()
        assert stored_hashes(s) == {sha256} and c.get("/api/concepts/tom").status_code == 404
        engine.go.set()
        s.drained()
        response = c.get(f"/api/jobs/{job['id']}").json()
        assert response["status"] == "completed" and response["concepts"] == {"tom": sha256}
        assert stored_hashes(s) == set()


def test_names_of_the_client_s_concepts_as_words_are_noticed(tmp_path: Path) -> None:
    """Of its own, not of another client's."""
    with served(FakeEngine(), tmp_path / "s") as s:
        for who, names in (("a", ["tom"]), ("b", [])):
            with s.client(headers={"X-Minikin-Client": who}) as c:
                if who == "a":
                    upload(c, concept("tom", 1), who)
                answer = c.post("/api/paint?wait=true", json={"prompt": "a photo of Tom on the beach"}).json()
                assert [w for w in answer["warnings"] if "'tom' is a word here" in w] == answer["warnings"]
                assert len(answer["warnings"]) == len(names)


def test_what_is_deleted_while_concepts_are_listed_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    """Not a 404 for the whole list."""
    with served(FakeEngine(), tmp_path / "s") as s, s.client(headers={"X-Minikin-Client": "a"}) as c:
        for name in ("ann", "tom"):
            assert upload(c, concept(name, 1)).status_code == 201
        concept_store_, plain = s.service.concept_store, s.service.concept_store.pinned

        def pinned(name: str, entry: Any) -> Any:
            if name == "tom":
                concept_store_.delete("a", "tom")
            return plain(name, entry)

        monkeypatch.setattr(concept_store_, "pinned", pinned)
        response = c.get("/api/concepts")
        assert response.status_code == 200 and [item["name"] for item in response.json()["concepts"]] == ["ann"]


def test_a_start_and_an_end_remove_what_nobody_has(tmp_path: Path) -> None:
    """As when the process was killed between a job's end and the removal."""
    place = tmp_path / "s" / "concepts"
    place.mkdir(parents=True, mode=0o755)
    stray = place / f"{'a' * 64}.safetensors"
    stray.write_bytes(b"")
    with served(FakeEngine(), tmp_path / "s"):
        assert not stray.exists()
        stray.write_bytes(b"")
    assert not stray.exists()


def test_copies_of_the_library_are_for_jobs_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """A job can be taken up when the library has changed; later the copy goes."""
    library, engine = tmp_path / "home" / "concepts", FakeEngine()
    library.mkdir(parents=True)
    monkeypatch.setenv("MINIKIN_HOME", str(tmp_path / "home"))
    (library / "kim.safetensors").write_bytes(concept("kim", 2))
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        assert c.post("/api/paint", json={"prompt": "a <kim>"}).status_code == 202
        s.service.sweep()
        assert len(stored_hashes(s)) == 1
        engine.go.set()
        s.drained()
        s.service.sweep()
        assert stored_hashes(s) == set()


def test_one_uploads_what_another_deletes(tmp_path: Path, monkeypatch: Any) -> None:
    """The same content, between the moment it is nobody's and the moment its file goes."""
    data = concept("tom", 1)
    with served(FakeEngine(), tmp_path / "s") as s:
        concept_store_, response = s.service.concept_store, s.service.store.contents
        entry = concept_store_.put("a", data)

        def meanwhile() -> set[str]:
            matches = response()
            other.start()
            other.join(0.3)
            return matches

        other = threading.Thread(target=concept_store_.put, args=("b", data))
        monkeypatch.setattr(s.service.store, "contents", meanwhile)
        concept_store_.delete("a", "tom")
        other.join()
        monkeypatch.undo()
        assert concept_store_.data(concept_store_.find("b", "tom")) == data and stored_hashes(s) == {
            entry.sha256
        }


def test_a_concept_that_is_deleted_while_its_job_is_taken(tmp_path: Path, monkeypatch: Any) -> None:
    """Between looking it up and writing the job down: refused, not taken for ever."""
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s, s.client(headers={"X-Minikin-Client": "a"}) as c:
        upload(c, concept("tom", 1))
        prepare = engine.prepare

        def slow(*args: Any, **kwargs: Any) -> Any:
            assert c.delete("/api/concepts/tom").status_code == 200
            return prepare(*args, **kwargs)

        monkeypatch.setattr(engine, "prepare", slow)
        assert c.post("/api/paint", json={"prompt": "a <tom>"}).status_code == 404
        assert s.service.store.unfinished() == [] and stored_hashes(s) == set()


class Teaching(FakeEngine):
    """Teaches a concept at once, when it is let."""

    def run(self, kind: str, prepared: Any, inputs: Any) -> Any:
        while not self.go.wait(0.01):
            yield events.Progress(kind, 0, 1)
        yield events.Done(from_bytes(concept(prepared.recipe.name, 1)), {})


def test_full_concept_store_is_refused_before_teaching(tmp_path: Path) -> None:
    """Concepts in training count; one whose training has begun is stored even if the quota is full by then."""
    engine, image = Teaching(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")
    with served(engine, tmp_path / "s", limits=Limits(concepts_per_client=2)) as s, s.client() as c:

        def teach(name: str) -> httpx.Response:
            recipe = json.dumps({"name": name, "category": "cat"})
            files = {"photos": ("a.png", image.getvalue())}
            return c.post("/api/concepts/teach", data={"recipe": recipe}, files=files)

        engine.go.clear()
        jobs = [teach("tom"), teach("kim")]
        assert [response.status_code for response in jobs] == [202, 202]
        response = teach("ann")
        assert response.status_code == 422 and response.json()["error"]["code"] == "concept_quota_exceeded"
        for k in range(2):  # uploads are not kept waiting for them
            assert c.post("/api/concepts", files={"file": ("x", concept(f"pet{k}", k))}).status_code == 201
        engine.go.set()
        s.drained()
        for job, name in zip(jobs, ("tom", "kim"), strict=True):
            response = c.get(f"/api/jobs/{job.json()['id']}").json()
            assert response["status"] == "completed" and response["result"]["concept"]["name"] == name, response
            assert c.get(f"/api/concepts/{name}").status_code == 200
        assert teach("ann").json()["error"]["code"] == "concept_quota_exceeded"


def test_one_key_has_a_number_of_concepts_whatever_its_names(tmp_path: Path) -> None:
    """Names are free: the key counts, too, and another key is not touched by that."""
    limits = Limits(concepts_per_client=2, concepts_per_key=3)
    with served(FakeEngine(), tmp_path / "s", limits=limits, keys=KEYS) as s:

        def status(key: str, who: str, number: int) -> int:
            headers = {"X-API-Key": key, "X-Minikin-Client": who}
            with s.client(headers=headers) as c:
                response = c.post("/api/concepts", files={"file": ("x", concept(f"pet{number}", number))})
            assert response.status_code == 201 or response.json()["error"]["code"] == "concept_quota_exceeded"
            return response.status_code

        assert [status(KEYS[0], "a", k) for k in range(3)] == [201, 201, 422]
        assert [status(KEYS[0], who, k) for k, who in enumerate(("b", "c", "d"))] == [201, 422, 422]
        assert status(KEYS[1], "a", 0) == 201


@pytest.mark.parametrize(
    ("held", "stay"),
    [
        ({"k a": 4}, "k a: 3"),  # the oldest goes
        ({"k a": 1, "m a": 5}, "k a: 1, m a: 2"),
        ({"k a": 2, "k b": 2, "k c": 2, "m a": 1}, "k a: 0, k b: 1, k c: 1, m a: 1"),
        ({"k": 3, "m": 3}, "k: 1, m: 2"),
        ({"k a": 1, "k b": 4}, "k a: 1, k b: 2"),  # by name within a key
    ],
)
def test_results_of_who_has_most_go_first(held: dict[str, int], stay: str) -> None:
    """Three fit: by key, then by client; the oldest of it goes first, and the newest stays longest."""
    rows = [
        {"id": f"{client} {k}", "client": client, "bytes": 10, "made": 100.0 + k}
        for k in range(6) for client, count in held.items() if k < count
    ]  # fmt: skip
    gone = set(retention.expired(rows, Limits(keep_bytes=30, keep_s=1000), 200.0))
    left = {c: sum(row["client"] == c and row["id"] not in gone for row in rows) for c in held}
    assert ", ".join(f"{client}: {count}" for client, count in left.items()) == stay
    assert all(f"{client} {held[client] - 1}" not in gone for client in held if left[client])
    aged = retention.expired(rows, Limits(keep_bytes=1000, keep_s=98.5), 200.0)
    assert sorted(aged) == sorted(row["id"] for row in rows if row["made"] < 101.5)


# ---- requests ----------------------------------------------------------------------------------


def test_requests_go_when_their_time_is_over(tmp_path: Path) -> None:
    """Prompts are nowhere in the folder any more, in no row, no free page and no log of the store."""
    with served(FakeEngine(), tmp_path / "s", limits=Limits(keep_s=0)) as s, s.client() as c:
        response = [
            c.post("/api/paint?wait=true", json={"prompt": f"sentinel {k} " * 40}).json() for k in range(9)
        ]
        assert b"sentinel" in everything(s.folder)
        s.service.sweep()
        assert c.get("/api/jobs").json() == {"jobs": []}
        assert c.get(f"/api/jobs/{response[0]['id']}").status_code == 404
        assert b"sentinel" not in everything(s.folder)
        assert s.service.store._rows("SELECT * FROM ledger") == []


def test_requests_stay_for_their_time(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", limits=Limits(keep_bytes=1)) as s, s.client() as c:
        response = c.post("/api/paint?wait=true", json={"prompt": "a"}).json()
        assert s.service.sweep() == 1
        assert c.get(f"/api/jobs/{response['id']}").json()["status"] == "completed"


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
