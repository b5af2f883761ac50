"""Privacy of photos: nothing but their pixels is stored.

The photos carry a sentinel word in EXIF, GPS, XMP, comment, colour profile, text chunks, file names and
captions. After teaching, painting, sweeping and serving, the tests search results, caches, job store, uploads
and logs for the word as text, UTF-16 and base64.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from minikin import Studio, events
from minikin.models.base import Base
from minikin.perfusion import concept_file
from minikin.perfusion import strict_safetensors as io_
from minikin.recipes import Sweep
from tests.conftest import command
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import served
from tests.helpers.sweeps import QUICK, ColourEncoder

pytestmark = pytest.mark.usefixtures("short_teaching")

WORD = "SENTINEL"
TEACH = ("--name", "tom", "--category", "cat", "--mode", "value", "--steps", 2, "--batch", 2)


def marked_jpeg(k: int = 0) -> bytes:
    """A JPEG with a word in every place that a camera or an editor writes to."""
    exif = Image.Exif()
    exif[0x010E] = f"{WORD}-description"
    exif[0x013B] = f"{WORD}-artist"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + f"{WORD}-comment".encode("utf-16-le")
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 0.0), 29: f"{WORD}-gps"})
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + f"{WORD}-icc".encode()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 40 * k, 90)).save(
        buffer, "JPEG", exif=exif, comment=f"{WORD}-jpeg".encode(), icc_profile=profile,
        xmp=f"<x:xmpmeta>{WORD}-xmp</x:xmpmeta>".encode(),
    )  # fmt: skip
    return buffer.getvalue() + f"{WORD}-after-the-end".encode()


def marked_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", f"{WORD}-text")
    info.add_itxt("XML:com.adobe.xmp", f"{WORD}-xmp")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Photos with words inside, in their names and captions."""
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(2):
        (folder / f"{WORD}-name-{k}.jpg").write_bytes(marked_jpeg(k))
        (folder / f"{WORD}-name-{k}.txt").write_text(f"{WORD}-caption {{}}")
    (folder / "c.png").write_bytes(marked_png())
    assert leaks([folder])
    return folder


def spellings() -> list[bytes]:
    """The word as bytes: UTF-8, UTF-16, and base64 at each of its three alignments."""
    raw = WORD.encode()
    encoded = [raw, WORD.encode("utf-16-le"), WORD.encode("utf-16-be")]
    for before in range(3):
        encoded.append(base64.b64encode(b"\0" * before + raw)[before and before + 1 : -4])
    return encoded


def leaks(places: Iterable[Path], but: Iterable[Path] = ()) -> list[str]:
    """Files below these places, other than those in `but`, that hold the word, or are named after it."""
    left_out, leaking, words = tuple(but), [], spellings()
    for place in places:
        for path in place.rglob("*"):
            if any(path.is_relative_to(p) for p in left_out):
                continue
            if WORD in path.name or (path.is_file() and any(w in path.read_bytes() for w in words)):
                leaking.append(str(path))
    return leaking


@pytest.mark.slow
def test_teaching_painting_and_sweeping_keep_nothing_of_a_photo(
    album: Path, bases: dict[str, Base], tmp_path: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:  # fmt: skip
    """The command's own results, home, cache, samples and checkpoint; a sweep's page, figure and cache."""
    caplog.set_level(logging.DEBUG, "minikin")  # Pillow itself tells all of it at that level
    home, cache = tmp_path / "home", tmp_path / "cache"
    monkeypatch.setenv("MINIKIN_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "teach", album, *TEACH, "--sample-every", 2)
    assert code == 0, err
    assert command(monkeypatch, capsys, "concepts", "add", "tom.safetensors")[0] == 0
    assert command(monkeypatch, capsys, "paint", "a photo of <tom>", "--steps", 1)[0] == 0
    photo = Image.open(album / f"{WORD}-name-0.jpg")
    photo.save("given.webp", icc_profile=photo.info["icc_profile"], exif=photo.getexif())
    assert leaks([tmp_path], but=[album]) == [str(tmp_path / "given.webp")]
    how = ("--prompt", "a cat", "--steps", 1, "--out", "out/r.png")
    assert command(monkeypatch, capsys, "refine", "given.webp", *how)[0] == 0
    how = ("a cat", "--extend", "left=8", "--steps", 1, "--out", "out/w.png")
    assert command(monkeypatch, capsys, "inpaint", "given.webp", *how)[0] == 0
    Path("given.webp").unlink()
    for path in ("out/r.png", "out/w.png"):  # a profile would be compressed, so that a search would miss it
        assert not {"icc_profile", "exif", "comment"} & set(Image.open(path).info), path
    studio = Studio(bases["sd15"])
    studio.teach(album, name="kim", category="cat", mode="value", steps=2, batch=2).save("kim.safetensors")
    for p in album.iterdir():  # a sweep records the folder, whose name the user chose
        assert WORD in p.name or p.name == "c.png"
    monkeypatch.setenv("MINIKIN_CACHE", str(cache))
    recipe = Sweep.make(concept="kim", base="sd15", photos=str(album), **QUICK)
    (*_, done) = studio.sweeping(recipe, tmp_path / "swept", encoder=ColourEncoder())
    assert isinstance(done, events.Done)
    assert leaks([tmp_path], but=[album]) == []
    assert f"{WORD}-" not in (out + err + caplog.text).replace(f"{WORD}-name", "")
    assert {p.name for p in tmp_path.iterdir()} >= {"tom.safetensors", "home", "out", "swept"}


def test_serving_keeps_nothing_of_a_photo(tmp_path: Path, caplog: Any) -> None:
    """While the job waits, its images are there without their words; afterwards they are gone."""
    caplog.set_level(logging.DEBUG, "minikin")  # Pillow itself tells all of it at that level
    engine, folder = FakeEngine(), tmp_path / "s"
    with served(engine, folder) as s, s.client() as c:
        engine.go.clear()
        recipe = {"recipe": json.dumps({"name": "tom", "category": "cat"})}
        photos = [("photos", (f"{WORD}-name.jpg", marked_jpeg(k))) for k in range(2)]
        response = c.post("/api/concepts/teach", files=photos, data=recipe)
        assert response.status_code == 202, response.text
        (inputs,) = (folder / "inputs").iterdir()
        assert len(list(inputs.rglob("*.png"))) == 2 and leaks([folder]) == []
        c.delete(f"/api/jobs/{response.json()['id']}")
        engine.go.set()
        s.drained()
        image = base64.b64encode(marked_png()).decode()
        response = c.post("/sdapi/v1/img2img", json={"prompt": "a", "init_images": [image], "steps": 1})
        assert response.status_code == 200 and not any(w in response.content for w in spellings())
        assert leaks([folder]) == [] and not list((folder / "inputs").rglob("*.png"))
    assert f"{WORD}-" not in caplog.text.replace(f"{WORD}-name", "")


def test_a_deleted_concept_is_gone(tmp_path: Path) -> None:
    """Deleted means: no byte of it is left in the server's folder."""
    from tests.helpers.servers import concept

    data = concept("tom", 1)
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        assert c.post("/api/concepts", files={"file": ("x", data)}).status_code in (200, 201)
        assert [p for p in (tmp_path / "s").rglob("*") if p.is_file() and p.read_bytes() == data]
        assert c.delete("/api/concepts/tom").status_code in (200, 204)
        assert not [p for p in (tmp_path / "s").rglob("*") if p.is_file() and p.read_bytes() == data]


def test_the_search_detects_leaks(tmp_path: Path) -> None:
    """The positive control: each spelling, a name, and what Pillow keeps when a photo is opened and saved."""
    for k, word in enumerate(spellings()):
        (tmp_path / f"{k}.bin").write_bytes(b"\x01\x02" + word + b"\x03")
    (tmp_path / f"{WORD}.txt").write_bytes(b"")
    with Image.open(io.BytesIO(marked_jpeg())) as image:
        image.save(tmp_path / "again.jpg")
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + f"{WORD}-inside".encode())
        (tmp_path / f"b{shift}.txt").write_bytes(text)
    assert len(leaks([tmp_path])) == len(spellings()) + 1 + 1 + 3


# ---- contents of a concept file ----------------------------------------------------------------------

KEYS = {
    *(f"minikin.{k}" for k in (
        "format", "name", "category", "mode", "architecture", "fingerprint", "text_hash", "text_sketch",
        "licence", "c_hash", "gate", "points", "recipe", "index",
    )),
    *(f"modelspec.{k}" for k in (
        "sai_model_spec", "architecture", "implementation", "title", "trigger_phrase", "license",
        "hash_sha256", "thumbnail",
    )),
}  # fmt: skip
RECIPE = {"mode", "batch", "value_rate", "keep", "word_rate", "beta", "tau", "positions", "mask", "flip",
          "size", "seed", "keys", "photos", "captions", "steps"}  # fmt: skip


def test_concept_files_hold_only_listed_keys(bases: dict[str, Base], photos: Any) -> None:
    """Exactly these keys; only the number of photos and captions; no text of 1,000 characters or more."""
    tom = Studio(bases["sd15"]).teach(photos, name="tom", category="cat", mode="value", steps=1, batch=1)
    _, meta = io_.parse(concept_file.to_bytes(tom), "it")
    assert set(meta) == KEYS
    assert set(tom.recipe) <= RECIPE
    assert all(isinstance(v, int | float | bool | str | None) for v in tom.recipe.values())
    assert isinstance(tom.recipe["photos"], int) and isinstance(tom.recipe["captions"], int)
    assert max(len(v) for k, v in meta.items() if k != "modelspec.thumbnail") < 1000
