"""The gallery's API: images searched, marked as favourites, shrunk and deleted, each client's alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.generation.content_filter import Filtering, Verdict
from minikin.server import job_store
from minikin.server.archive import zipped
from minikin.server.errors import not_found
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("gallery")
    with served(FakeEngine(), folder / "s", image_folder=folder / "images") as s:
        yield s


def names(answer: Any) -> list[str]:
    return [image["name"] for image in answer.json()["images"]]


def test_images_are_found_marked_and_deleted(server: Served) -> None:
    with server.client() as c:
        for prompt, n in (("a cat", 2), ("A red Car 100% Über", 1)):
            body = {"prompt": prompt, "seed": 7, "n": n, "width": 512, "height": 256}
            c.post("/api/paint?wait=true", json=body).raise_for_status()
        listed = c.get("/api/images")
        assert listed.json()["total"] == 3
        assert names(listed) == ["a-red-car-100-ber-7.png", "a-cat-7.png", "a-cat-8.png"]
        assert names(c.get("/api/images", params={"limit": 1, "offset": 1})) == ["a-cat-7.png"]
        for search in ("red car 100%", "über"):
            assert names(c.get("/api/images", params={"search": search})) == ["a-red-car-100-ber-7.png"]
        assert c.get("/api/images", params={"search": "dog"}).json() == {"images": [], "total": 0}
        cat = listed.json()["images"][1]
        assert cat["about"] == "a cat" and cat["kind"] == "paint" and not cat["favourite"]
        address = f"/api/images/{cat['id']}"
        assert c.patch(address, json={"favourite": True}).json()["favourite"] is True
        assert names(c.get("/api/images", params={"favourite": True})) == ["a-cat-7.png"]
        thumbnail = c.get(f"{address}/thumbnail")
        assert Image.open(io.BytesIO(thumbnail.content)).size == (256, 128)
        file = server.folder.parent / "images" / "a-cat-7.png"
        assert file.is_file()
        other = {"X-Minikin-Client": "other"}
        assert c.get("/api/images", headers=other).json()["total"] == 0
        for method, body in (("PATCH", {"favourite": True}), ("DELETE", None)):
            assert c.request(method, address, json=body, headers=other).status_code == 404
        assert file.is_file() and c.delete(address).json()["deleted"] is True
        assert not file.exists() and names(c.get("/api/images")) == ["a-red-car-100-ber-7.png", "a-cat-8.png"]
        assert c.get("/api/images", params={"favourite": True}).json()["total"] == 0
        for method in ("PATCH", "DELETE"):
            assert c.request(method, address, json={"favourite": True}).status_code == 404
        jobs = c.get("/api/jobs").json()["jobs"]
        assert [len(job["results"]) for job in jobs] == [1, 1], "a deleted image is in no job's results"


def test_a_file_with_other_content_stays(server: Served) -> None:
    """Another program took the name, or the person changed the image: the entry goes, the file is theirs."""
    folder = server.folder.parent / "images"
    with server.client() as c:
        body = {"prompt": "two dogs", "seed": 7, "n": 2}
        first, second = c.post("/api/paint?wait=true", json=body).json()["results"]
        (folder / "two-dogs-7.png").write_bytes(b"of another program")
        (folder / "two-dogs-8.png").unlink()
        for image in (first, second):
            assert c.delete(f"/api/images/{image['id']}").json()["deleted"] is True
            assert not server.service.writer.path(image["id"]).is_symlink()
        assert (folder / "two-dogs-7.png").read_bytes() == b"of another program"
        assert c.get("/api/images", params={"search": "two dogs"}).json()["total"] == 0


def test_without_its_folder_nothing_is_deleted(server: Served) -> None:
    """A disk that is taken out would bring the file back, and no image would be listed for it."""
    folder, away = server.folder.parent / "images", server.folder.parent / "away"
    with server.client() as c:
        (image,) = c.post("/api/paint?wait=true", json={"prompt": "a boat", "seed": 7}).json()["results"]
        folder.rename(away)
        answer = c.delete(f"/api/images/{image['id']}")
        away.rename(folder)
        assert answer.status_code == 507
        assert "a-boat-7.png was not deleted: its folder is not there" in answer.json()["error"]["message"]
        assert names(c.get("/api/images", params={"search": "boat"})) == ["a-boat-7.png"]
        assert c.delete(f"/api/images/{image['id']}").json()["deleted"] is True
        assert not (folder / "a-boat-7.png").exists()


def test_the_family_of_an_image(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was made from and what was made from that; deleted ones and other clients' are left out."""
    with server.client() as c:

        def image_of(kind: str, **body: Any) -> str:
            (image,) = c.post(f"/api/{kind}?wait=true", json={"seed": 7, **body}).json()["results"]
            return str(image["id"])

        draft = image_of("paint", prompt="a tree")
        refined = image_of("refine", image=f"result:{draft}")
        first, second = (image_of("inpaint", image=f"result:{refined}", extend="left=8") for _ in range(2))
        rows = [("", draft), (draft, refined), (refined, first), (refined, second)]
        for id_ in (draft, first):
            answer = c.get(f"/api/images/{id_}/family").json()
            assert [(image["parent"], image["id"]) for image in answer["images"]] == rows
            assert answer["more"] is False
        with monkeypatch.context() as few:
            few.setattr(job_store, "MAX_FAMILY", 3)  # the image itself and its ancestors are among them
            for id_, others in ((draft, rows[:3]), (second, [*rows[:2], rows[3]])):
                answer = c.get(f"/api/images/{id_}/family").json()
                assert [(image["parent"], image["id"]) for image in answer["images"]] == others
                assert answer["more"] is True
            few.setattr(job_store, "MAX_FAMILY", 2)
            answer = c.get(f"/api/images/{second}/family").json()
            assert [image["id"] for image in answer["images"]] == [refined, second]
        c.delete(f"/api/images/{refined}").raise_for_status()
        images = c.get(f"/api/images/{second}/family").json()["images"]
        assert [(image["parent"], image["id"]) for image in images] == [rows[0], *rows[2:]]
        assert c.get(f"/api/images/{refined}/family").status_code == 404
        other = {"X-Minikin-Client": "other"}
        assert c.get(f"/api/images/{draft}/family", headers=other).status_code == 404


def test_images_are_downloaded_as_one_file(server: Served) -> None:
    """Each with its recipe inside, all recipes beside them; a name that comes twice gets a number, and what is
    not there any more is named."""
    with server.client() as c:
        body = {"prompt": "a ship", "seed": 7, "n": 2}
        ids = [image["id"] for image in c.post("/api/paint?wait=true", json=body).json()["results"]]
        answer = c.post("/api/images/archive", json={"ids": [*ids, ids[0]]})
        with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
            assert file.testzip() is None
            assert file.namelist() == ["a-ship-7.png", "a-ship-8.png", "recipes.json"]
            assert Image.open(file.open("a-ship-8.png")).info["parameters"].startswith("a ship")
            recipes = json.loads(file.read("recipes.json"))
        assert [(r["prompt"], r["seed"]) for r in recipes.values()] == [("a ship", 7), ("a ship", 8)]
        (server.folder.parent / "images" / "a-ship-7.png").unlink()
        answer = c.post("/api/images/archive", json={"ids": ["0" * 32, *ids]})
        with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
            assert file.namelist() == ["a-ship-8.png", "recipes.json", "missing.txt"]
            assert file.read("missing.txt").decode().split("\n")[1:] == ["0" * 32, "a-ship-7.png", ""]
        other = {"X-Minikin-Client": "other"}
        assert c.post("/api/images/archive", json={"ids": ids}, headers=other).status_code == 404
        for wrong in ([], ["x"] * 201):
            assert c.post("/api/images/archive", json={"ids": wrong}).status_code == 422
    parts = zipped([("a.png", {}, "1"), ("a.png", {}, "2"), ("b.png", {}, "gone")], read_but_gone)
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as file:
        assert file.namelist() == ["a.png", "a-2.png", "recipes.json", "missing.txt"]


def read_but_gone(id_: str) -> bytes:
    if id_ == "gone":
        raise not_found("image", id_)
    return id_.encode()


class Flagging:
    """A content filter that objects to every second image."""

    name = "flagging"
    count = 0

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        self.count += len(images)
        return [Verdict(self.count % 2 == 0) for _ in images]


def test_the_content_filters_verdict_is_listed(tmp_path: Path) -> None:
    how = Filtering(Flagging(), "flag")
    with served(FakeEngine(), tmp_path / "s", filtering=how) as s, s.client() as c:
        results = c.post("/api/paint?wait=true", json={"prompt": "a cat", "n": 2}).json()["results"]
        images = c.get("/api/images").json()["images"]
        assert [image["filter"] for image in images] == [result["filter"] for result in results]
        assert [image["filter"] and image["filter"]["action"] for image in images] == [None, "flagged"]


def test_an_older_store_gets_favourites_and_families(tmp_path: Path) -> None:
    """A store without the tables, as earlier versions wrote it, is opened and completed."""
    import sqlite3

    from minikin.server.job_store import JobStore

    JobStore(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as db:
        db.executescript("DROP TABLE favourites; DROP TABLE parents")
    store = JobStore(tmp_path / "db")
    store.set_favourite("x", True)
    assert store.gallery("local", "", True, 10, 0) == (0, []) and store.family("local", "x") == ([], False)
    store.close()


def test_an_image_is_deleted_where_many_come(tmp_path: Path) -> None:
    """Without a person's folder its file is the server's own; the audit finds nothing amiss afterwards."""
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        (image,) = c.post("/api/paint?wait=true", json={"prompt": "a cat"}).json()["results"]
        assert c.delete(f"/api/images/{image['id']}").status_code == 200
        assert c.get(image["url"]).status_code == 404 and not list((tmp_path / "s" / "results").iterdir())
