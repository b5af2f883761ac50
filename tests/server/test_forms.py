"""Forms at the open port (rows H4 and H12 of docs/robustness.md): which routes take them, how many parts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin.images.photos import Photo
from minikin.server.engine import JobInputs
from minikin.server.image_metadata import load_inputs, save_inputs
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.servers import Served, concept, served

PARTS = 64
assert Limits().parts == PARTS


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("forms") / "s") as s:
        yield s


def png() -> bytes:
    """An image that records what it was asked for."""
    file, message = io.BytesIO(), PngInfo()
    message.add_text("parameters", "a cat\nSteps: 4, Seed: 1")
    Image.new("RGB", (64, 64), "red").save(file, "PNG", pnginfo=message)
    return file.getvalue()


def code_of(answer: httpx.Response) -> str | None:
    error = answer.json().get("error") or {}
    return str(error["code"]) if error else None


FILE = ("file", ("tom.safetensors", concept("tom", 0)))
PHOTO, IMAGE = ("photos", ("a.png", png())), ("image[]", ("a.png", png()))
# path -> files of a form that is right, and its fields
RIGHT: dict[str, tuple[list[Any], dict[str, str]]] = {
    "/api/concepts": ([FILE], {}),
    "/api/concepts/teach": ([PHOTO], {"recipe": '{"name": "rex", "category": "dog"}'}),
    "/api/masks": ([PHOTO], {"category": "dog"}),
    "/api/recipe": ([("file", ("a.png", png()))], {}),
    "/v1/images/edits": ([IMAGE], {"prompt": "a cat"}),
    "/v1/images/variations": ([("image", ("a.png", png()))], {}),
}


def operations(server: Served) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and description of every operation that changes something."""
    for path, methods in server.app.openapi()["paths"].items():
        for method, response in methods.items():
            if method not in ("get", "head", "options"):
                yield path.replace("{", "").replace("}", ""), method, response


def test_h04_a_form_reaches_uploads_alone(server: Served) -> None:
    """A page elsewhere may send a form unasked: 415 on every route but those that take one."""
    taking = set()
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    with server.client() as c:
        for path, method, described in operations(server):
            for sent in (body, b""):
                response = c.request(method, path, content=sent,
                                 headers={"Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip
                if path in RIGHT:
                    assert response.status_code in (400, 422), (path, response.text)
                else:
                    assert response.status_code == 415, (method, path, response.text)
            if "multipart/form-data" in described.get("requestBody", {}).get("content", {}):
                taking.add(path)
    assert taking == set(RIGHT)


def test_h04_raw_bytes_and_other_multiparts(server: Served) -> None:
    with server.client() as c:
        for kind in (
            "application/octet-stream",
            "multipart/mixed; boundary=x",
            "Multipart/Form-Data; boundary=x",
        ):
            response = c.post("/api/paint", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
            assert response.status_code == 415, (kind, response.text)


@pytest.mark.parametrize("path", RIGHT)
def test_h12_a_form_of_65_parts(server: Served, path: str) -> None:
    """Otherwise right: with 64 files or fields it is understood, with one more of either it is 413."""
    files, fields = RIGHT[path]
    with server.client() as c:
        few = c.post(path, files=files, data=fields)
        assert few.status_code < 300, few.text
        again = [(name, ("a.png", b"")) for name in ["masks" if path.endswith("teach") else files[0][0]]]
        for more, code in ((PARTS, None), (PARTS + 1, "too_many_parts")):
            many = c.post(path, files=files + again * (more - len(files)), data=fields)
            assert (code_of(many) == "too_many_parts") == (code is not None), (more, many.text)
            assert code is None or many.status_code == 413
            extra = {f"x{k}": "" for k in range(more - len(fields))}
            many = c.post(path, files=files, data={**fields, **extra})
            assert (code_of(many) == "too_many_parts") == (code is not None), (more, many.text)


def test_h12_a_form_that_cannot_be_read(server: Served) -> None:
    with server.client() as c:
        for body in (b"--x\r\n", b"\r\n" * 1000, b"--" * 1000):
            response = c.post(
                "/api/recipe", content=body, headers={"Content-Type": "multipart/form-data; boundary=y"}
            )
            assert response.status_code in (400, 422) and response.json()["error"]["code"] != "invalid_json", (
                response.text
            )


def test_captions_of_photos(server: Served, tmp_path: Path) -> None:
    """They go with their photos, also over a restart; a list of another length is refused."""
    path = "/api/concepts/teach"
    form = RIGHT[path][1]
    with server.client() as c:
        for captions in ('["a", "b"]', "[1]", '{"a": 1}', '["%s"]' % ("x" * 501)):
            answer = c.post(path, files=[PHOTO], data={**form, "photo_captions": captions})
            assert answer.status_code == 422 and answer.json()["error"]["param"] == "photo_captions", captions
    photo = Photo("000.png", np.zeros((32, 32, 3), np.uint8), None, "a dog on a chair")
    save_inputs(JobInputs(photos=[photo, replace(photo, name="001.png", caption="")], folder=tmp_path))
    assert [p.caption for p in load_inputs(tmp_path, []).photos] == [photo.caption, ""]
    with server.client() as c:
        answer = c.post(path, files=[PHOTO], data={**form, "photo_captions": '["a dog"]'})
        assert answer.status_code == 202
