"""A server that one person uses on their own machine: images stay, and there is one library of concepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin import events
from minikin.events import Event
from minikin.perfusion import library
from minikin.perfusion.concept_file import from_bytes
from minikin.server.engine import JobInputs, PreparedRequest
from minikin.server.limits import Limits
from tests.conftest import command
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, concept, served

SOON = Limits(keep_s=0)  # what does not stay is removed by the next sweep


class Teaching(FakeEngine):
    """Teaches concepts of random numbers, another one each time."""

    count = 0

    def run(self, kind: str, prepared: PreparedRequest, inputs: JobInputs) -> Iterator[Event]:
        if kind != "teach":
            yield from super().run(kind, prepared, inputs)
            return
        self.count += 1
        yield events.Progress("teaching", 1, 1)
        yield events.Done(from_bytes(concept(prepared.recipe.name, self.count), "taught"), {})  # type: ignore[attr-defined]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Iterator[Served]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    how = {"image_folder": tmp_path / "images", "one_library": True}
    with served(Teaching(), tmp_path / "s", limits=SOON, page=False, **how) as s:
        yield s


def paint(s: Served, kind: str = "paint", **recipe: Any) -> dict[str, Any]:
    with s.client() as c:
        response = c.post(f"/api/{kind}?wait=true", json=recipe)
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        return job


def teach(s: Served, photo: Path, name: str) -> dict[str, Any]:
    recipe = json.dumps({"name": name, "category": "cat"})
    with s.client() as c, open(photo, "rb") as f:
        response = c.post("/api/concepts/teach?wait=true", data={"recipe": recipe}, files={"photos": f})
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        return job


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def names_of(job: dict[str, Any]) -> list[str]:
    return [r["name"] for r in job["results"]]


# ---- images


def test_images_stay_under_the_names_of_the_command_line(here: Served, tmp_path: Path) -> None:
    job = paint(here, prompt="A <photo> of a cat!".replace("<photo>", "photo"), seed=7, n=2)
    assert names_of(job) == ["a-photo-of-a-cat-7.png", "a-photo-of-a-cat-8.png"]
    again = paint(here, prompt="a photo of a cat", seed=7)
    assert names_of(again) == ["a-photo-of-a-cat-7.2.png"]
    refined = paint(here, "refine", image=f"result:{job['results'][1]['id']}", seed=3)
    assert names_of(refined) == ["a-photo-of-a-cat-8-refined-3.png"]
    here.service.sweep()
    files = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert files == sorted([*names_of(job), *names_of(again), *names_of(refined)])
    with here.client() as c:
        listed = c.get("/api/jobs").json()["jobs"]
        assert [names_of(j) for j in listed] == [names_of(refined), names_of(again), names_of(job)]
        for result in job["results"]:
            response = c.get(result["url"])
            assert response.content == (tmp_path / "images" / result["name"]).read_bytes()
            assert response.headers["content-disposition"] == f'inline; filename="{result["name"]}"'
        images = c.get("/api/capabilities").json()["images"]
    assert images == {"folder": str(tmp_path / "images"), "hours": None}


@pytest.mark.parametrize("path", ["/api/paint?wait=true", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_images_of_every_api_stay(here: Served, tmp_path: Path, path: str) -> None:
    with here.client() as c:
        assert c.post(path, json={"prompt": "a cat", "seed": 7}).status_code == 200
        here.service.sweep()
        (file,) = (tmp_path / "images").iterdir()
        (job,) = c.get("/api/jobs").json()["jobs"]
        assert file.name == "a-cat-7.png" and names_of(job) == [file.name]
        assert c.get(job["results"][0]["url"]).content == file.read_bytes()


def test_images_are_there_after_a_restart(tmp_path: Path) -> None:
    how: dict[str, Any] = {"limits": SOON, "image_folder": tmp_path / "images"}
    with served(FakeEngine(), tmp_path / "s", **how) as s:
        job = paint(s, prompt="a cat", seed=1)
    with served(FakeEngine(), tmp_path / "s", **how) as s, s.client() as c:
        s.service.sweep()
        assert c.get(job["results"][0]["url"]).status_code == 200
    with served(FakeEngine(), tmp_path / "s", limits=SOON) as s:  # the same folder as a server for others
        s.service.sweep()
    assert (tmp_path / "images" / "a-cat-1.png").is_file()


def test_an_empty_store_deletes_no_image_of_the_person(tmp_path: Path) -> None:
    """A store that is damaged is moved away: the images it knew are not the server's to remove."""
    with served(FakeEngine(), tmp_path / "s", image_folder=tmp_path / "images") as s:
        paint(s, prompt="a cat", seed=1)
    for path in (tmp_path / "s").glob("jobs.sqlite*"):
        path.rename(tmp_path / path.name)
    with served(FakeEngine(), tmp_path / "s", image_folder=tmp_path / "images"):
        pass
    assert (tmp_path / "images" / "a-cat-1.png").is_file() and not list((tmp_path / "s" / "results").iterdir())


def test_what_the_person_deletes_is_gone_here_too(here: Served, tmp_path: Path) -> None:
    job = paint(here, prompt="a cat", seed=1, n=2)
    (tmp_path / "images" / "a-cat-1.png").unlink()
    with here.client() as c:
        assert names_of(c.get(f"/api/jobs/{job['id']}").json()) == ["a-cat-2.png"]
        assert c.get(job["results"][0]["url"]).status_code == 404
        here.service.sweep()
        assert names_of(c.get(f"/api/jobs/{job['id']}").json()) == ["a-cat-2.png"]


def test_on_a_folder_that_is_away_nothing_is_forgotten(here: Served, tmp_path: Path) -> None:
    job = paint(here, prompt="a cat", seed=1)
    (tmp_path / "images").rename(tmp_path / "away")
    here.service.sweep()
    (tmp_path / "away").rename(tmp_path / "images")
    with here.client() as c:
        assert c.get(job["results"][0]["url"]).status_code == 200


def test_a_cancelled_job_leaves_no_file(tmp_path: Path) -> None:
    engine = FakeEngine(batch_size=1)
    with served(engine, tmp_path / "s", image_folder=tmp_path / "images") as s, s.client() as c:
        job = c.post("/api/paint", json={"prompt": "a cat", "n": 3}).json()
        while not list((tmp_path / "images").glob("*.png")):
            pass
        engine.go.clear()
        c.delete(f"/api/jobs/{job['id']}")
        engine.go.set()
        s.drained()
        ended = c.get(f"/api/jobs/{job['id']}").json()["status"]
    assert ended == "completed" or list((tmp_path / "images").iterdir()) == []


def test_a_server_for_others_deletes_and_says_when(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s", limits=SOON) as s, s.client() as c:
        s.service.limits = replace(s.service.limits, keep_s=24 * 3600)
        assert c.get("/api/capabilities").json()["images"] == {"folder": None, "hours": 24}
        job = paint(s, prompt="a cat", seed=7)
        assert names_of(job) == ["a-cat-7.png"], "the name for a download"
        s.service.limits = replace(s.service.limits, keep_s=-1)
        s.service.sweep()
        assert c.get(job["results"][0]["url"]).status_code == 404


# ---- concepts


def test_taught_here_it_is_on_the_command_line(
    here: Served, photo: Path, monkeypatch: Any, capsys: Any
) -> None:
    job = teach(here, photo, "tom")
    code, out, err = command(monkeypatch, capsys, "concepts", "list", "--json")
    assert code == 0, err
    row = json.loads(out)
    assert (row["name"], row["sha256"]) == ("tom", job["result"]["concept"]["sha256"])
    assert library.find("tom").category == "cat"
    with here.client() as c:
        assert c.delete("/api/concepts/tom").status_code == 200
    assert library.locate("tom") is None


def test_taught_on_the_command_line_it_is_here(here: Served, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "rex.safetensors"
    path.parent.mkdir()
    path.write_bytes(concept("rex", 1))
    assert library.follow(path, "rex", None)
    with here.client() as c:
        (listed,) = c.get("/api/concepts").json()["concepts"]
        assert listed["name"] == "rex" and listed["mine"]
        assert paint(here, prompt="a photo of <rex>")["concepts"] == {"rex": listed["sha256"]}


def test_teaching_a_name_again_loses_nothing(here: Served, photo: Path) -> None:
    first, second = teach(here, photo, "tom"), teach(here, photo, "tom")
    assert "now <tom-old>" in " ".join(second["warnings"])
    with here.client() as c:
        by_name = {row["name"]: row["sha256"] for row in c.get("/api/concepts").json()["concepts"]}
    assert by_name == {
        name: job["result"]["concept"]["sha256"] for name, job in (("tom", second), ("tom-old", first))
    }


def test_a_file_beside_the_page_is_not_shadowed_in_silence(here: Served, photo: Path) -> None:
    Path("tom.safetensors").write_bytes(concept("tom", 99))
    job = teach(here, photo, "tom")
    assert job["result"]["concept"]["name"] == "tom-new" and "<tom-new>" in " ".join(job["warnings"])
    assert library.find("tom-new").name == "tom-new"


def test_concepts_of_before_move_into_the_library(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        c.post("/api/concepts", files={"file": concept("tom", 1)})
        assert library.locate("tom") is None, "a server keeps its clients' concepts for itself"
    with served(FakeEngine(), tmp_path / "s", one_library=True) as s, s.client() as c:
        (row,) = c.get("/api/concepts").json()["concepts"]
        assert row["name"] == "tom" and library.locate("tom") is not None


def test_the_copy_in_the_library_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tom.safetensors"
    path.write_bytes(concept("tom", 1))
    assert library.follow(path, "tom", None)
    before = path.read_bytes()
    path.write_bytes(concept("tom", 2))
    assert library.follow(path, "tom", before)
    copy = library.path_in_library("tom")
    assert copy and copy.read_bytes() == path.read_bytes()
    path.write_bytes(concept("tom", 3))
    assert not library.follow(path, "tom", concept("tom", 4)), "another one is not replaced"
    assert copy.read_bytes() == concept("tom", 2)


# ---- what is running


def test_what_runs_is_listed_and_of_others_no_more_than_that(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        job = c.post("/api/paint", json={"prompt": "a secret cat"}).json()
        while c.get(f"/api/jobs/{job['id']}").json()["status"] != "running":
            pass
        mine = c.get("/api/jobs?unfinished=true").json()
        assert [(j["id"], j["about"]) for j in mine["jobs"]] == [(job["id"], "a secret cat")]
        assert mine["others"] == []
        theirs = c.get("/api/jobs?unfinished=true", headers={"X-Minikin-Client": "other"})
        assert theirs.json() == {"jobs": [], "others": [{"kind": "paint", "step": 0, "steps": 4}]}
        engine.go.set()
        s.drained()
        assert c.get("/api/jobs?unfinished=true").json() == {"jobs": [], "others": []}
        first = c.get("/api/jobs").json()["jobs"][0]
        assert c.get(f"/api/jobs?before={first['created']}").json()["jobs"] == []
