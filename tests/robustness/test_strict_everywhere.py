"""What strangers write as JSON, and names that no file system takes, end in one error of ours everywhere."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minikin.cluster import run_log
from minikin.cluster.prompts import Prompts
from minikin.cluster.run_log import RunLog
from minikin.distillation.sources import find as find_captions
from minikin.errors import BadConceptFile, BadModelFile, BadPhoto, BadRecipe, MinikinError
from minikin.generation.live import Live
from minikin.generation.source import SourceImage
from minikin.images.photos import load_photos
from minikin.models import safetensors_header
from minikin.models.loading import registry
from minikin.models.loading.single_file import read_header
from minikin.perfusion import library
from minikin.perfusion.index import Index
from minikin.recipes import Paint
from minikin.strict_json import BadJson
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.mutations import joined, seeds, split
from tests.helpers.servers import served

DEEP, LIST, HALF = "[" * 60_000, "[1, 2]", '{"prompt": "a \\ud800 cat"}'
HEADERS = {
    "deep": DEEP, "list": LIST,
    "half a pair": '{"a\\ud800": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}',
    "a tensor that is a list": '{"a": [1]}',
    "a shape of texts": '{"a": {"dtype": "F16", "shape": ["1"], "data_offsets": [0, 2]}}',
    "no offsets": '{"a": {"dtype": "F16", "shape": [1]}}',
    "a negative size": '{"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}',
    "metadata that is a list": '{"__metadata__": [1]}', "metadata of numbers": '{"__metadata__": {"a": 1}}',
    "a key twice": '{"a": 1, "a": 2}', "NaN": '{"a": NaN}',
    "empty objects": "{" + '"a":{},' * 3_000_000 + '"b":{}}',
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_checkpoints_and_loras(name: str, tmp_path: Path) -> None:
    raw = HEADERS[name].encode()
    with pytest.raises(BadJson):
        safetensors_header.parse(raw)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(BadModelFile, match="is not a safetensors checkpoint"):
        read_header(path)


@pytest.mark.parametrize("text", [DEEP, LIST, HALF, "5", '{"_class_name": ["a"]}', "{}"])
def test_folders_of_models(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(BadModelFile):
        registry.add(tmp_path, "x")
    (registry.models_folder()).mkdir(parents=True, exist_ok=True)
    (registry.models_folder() / "odd.json").write_text(text)
    assert "odd" not in registry.entries()


# ---- fleets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [DEEP[:90_000], LIST, '{"prompt": 5}', HALF, '{"prompt": NaN}', '{"prompt": "a", "prompt": "b"}', "\xff"],
)
def test_lines_of_prompts(line: str, tmp_path: Path) -> None:
    """An error of that line alone."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(line.encode("latin-1") + b'\n{"prompt": "a cat"}\n')
    first, second = next(Prompts(path, {}).chunks(2))
    assert first.error is not None and first.recipe is None and second.recipe is not None
    json.dumps(first._asdict(), ensure_ascii=False).encode()


HEAD = {"manifest": 1, "base": "tiny", "fingerprint": "9f"}
DIGEST = "c1d4" * 8
KEY = "pictures"  # word: key of the file


@pytest.mark.parametrize(
    "record",
    [LIST, DEEP, HALF, '{"line": "7"}', '{"line": true, "asked": "c1d4c1d4c1d4c1d4"}',
    '{"line": 7, "asked": "zz"}',
     '{"line": 7, "asked": 5}', '{"line": 7, "asked": "c1d4c1d4c1d4c1d4", "IMAGES": 5}',
     '{"line": 7, "asked": "c1d4c1d4c1d4c1d4", "IMAGES": [5]}',
     '{"line": 7, "asked": "c1d4c1d4c1d4c1d4", "IMAGES": [{"file": 5, "bytes": 1}]}'],
)  # fmt: skip
def test_logs_that_are_no_logs(record: str, tmp_path: Path) -> None:
    record = record.replace("IMAGES", KEY)
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(HEAD)}\n{record}\n")
    with pytest.raises(BadRecipe, match=r"is not the log of a run \(line 2\)"):
        RunLog(tmp_path, {"base": "tiny"})
    (tmp_path / "manifest.jsonl").write_text(f"{record}\n")
    with pytest.raises(BadRecipe, match=r"is not the log of a run \(line 1\)"):
        list(run_log.read(tmp_path / "manifest.jsonl"))


@pytest.mark.parametrize(
    ("images", "done"),
    [([{"file": "a.png", "bytes": 3}], 1), ([], 0), (None, 0), ([{"file": "a.png", "bytes": 4}], 0),
     ([{"file": "a\0.png", "bytes": 3}], 0), ([{"file": "x" * 5_000, "bytes": 3}], 0),
     ([{"file": "/etc/hostname", "bytes": 1}], 0)],
)  # fmt: skip
def test_an_edited_log_skips_no_line(images: Any, done: int, tmp_path: Path) -> None:
    """A line counts as done when its images, at least one, are there: an empty list once did."""
    (tmp_path / "a.png").write_bytes(b"abc")
    record = {"line": 7, "id": None, "asked": DIGEST} | ({} if images is None else {KEY: images})
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(HEAD)}\n{json.dumps(record)}\n")
    log = RunLog(tmp_path, {"base": "tiny"})
    log.close()
    assert len(log.done) == done


@pytest.mark.parametrize("row", [DEEP, LIST, HALF, '{"text": "a", "text": "b"}', '{"text": NaN}'])
def test_captions(row: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(f"{row}\n")
    with pytest.raises(BadRecipe, match=r"c\.jsonl line 1 is not a JSON object"):
        find_captions(str(tmp_path / "c.jsonl"))


# ---- names ---------------------------------------------------------------------------------------

LONG = "x" * 5_000


NAMES = {
    "long": LONG, "long file": f"{LONG}.safetensors", "NUL": "a\0b", "user": "~nobody-of-this-name/x",
    "deep": f"../{LONG}/x", "no hub id": "a--b/..c",
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names_that_no_file_system_takes(case: str) -> None:
    """Too long, with a NUL, of users that do not exist: an error in words."""
    name = NAMES[case]
    for read in (load_photos, SourceImage.of, library.resolve, registry.open_base, registry.add, find_captions):
        with pytest.raises(MinikinError):
            read(name)  # type: ignore[operator]


def test_a_library_with_odd_files_is_listed(tmp_path: Path, monkeypatch: Any) -> None:
    """A name that is no UTF-8, and a header with half a pair, once were a 500 for every client."""
    monkeypatch.setenv("MINIKIN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = library.library_folder()
    folder.mkdir(parents=True)
    header, body = split(seeds()[2])
    (folder / "tom.safetensors").write_bytes(joined(header, body))
    (folder / "half.safetensors").write_bytes(joined(header.replace("cat", "\\ud800"), body))
    (folder / "deep.safetensors").write_bytes(joined(header[:-1] + ',"minikin.format":' + "[" * 50_000, b""))
    points = '{"minikin.points":"' + "[" * 4_000 + '",'
    (folder / "points.safetensors").write_bytes(
        joined(header.replace("{", "{", 1).replace('"__metadata__":{', '"__metadata__":' + points, 1), body)
    )
    with open(os.fsencode(folder) + b"/caf\xe9.safetensors", "wb") as f:
        f.write(joined(header, body))
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        for route in ("/api/concepts", "/api/capabilities", "/sdapi/v1/loras", "/v1/models"):
            assert c.get(route).status_code in (200, 404), route
        names = {row["name"] for row in c.get("/api/concepts").json()["concepts"]}
        assert "tom" in names and not any("\udce9" in n for n in names)
    assert [e.name for e in Index(tmp_path / "i.sqlite").search(folder, "tom")] == ["tom"]
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    assert Index(tmp_path / "i.sqlite").search(odd) == [] and library.names()
    with pytest.raises(BadConceptFile):
        library.resolve(str(folder / "half.safetensors")) and __import__("minikin").Concept.load(
            folder / "half.safetensors"
        )


# ---- the server ----------------------------------------------------------------------------------


def test_requests_that_once_were_a_500(tmp_path: Path) -> None:
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        for origin in ("http://[", "http://[::1", "//[", "null", "http://a]b"):
            assert c.get("/api/capabilities", headers={"Origin": origin}).status_code == 403
        image = Path(tmp_path / "a.png")
        Image.new("RGB", (64, 64)).save(image)
        files = {"image": ("a.png", image.read_bytes())}
        data = {"prompt": "a cat", "concepts": "tom@sha256:12345678", "concepts[tom]": "sha256:12345678"}
        for fields in (data, dict(reversed(data.items()))):
            response = c.post("/v1/images/edits", data=fields, files=files)
            assert response.status_code in (400, 422) and "not both" in response.text
        for body in (DEEP, LIST, HALF, "{}" * 10):
            response = c.post("/api/paint", content=body, headers={"Content-Type": "application/json"})
            assert 400 <= response.status_code < 500


@pytest.mark.parametrize("name", ["self", "changes", "__class__", "n", "batch"])
def test_live_messages_that_name_our_own_arguments(name: str) -> None:
    with Live(lambda recipe: iter(()), Paint.make(prompt="")) as live:
        if name in ("n", "batch"):  # are always 1 here
            assert live.change(None, **{name: 5}) == 1
        else:
            with pytest.raises(BadRecipe):
                live.change(None, **{name: 1})


def test_photos_and_records_of_long_names(tmp_path: Path) -> None:
    with pytest.raises(BadPhoto):
        load_photos(tmp_path / LONG)
