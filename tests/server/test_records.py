"""Records of other tools over HTTP: shown, taken over by forms, painted when the request says nothing, kept."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minikin.images import metadata
from minikin.server import decode
from minikin.server.api import native_concepts
from minikin.server.engine import JobInputs
from minikin.server.image_metadata import load_inputs, save_inputs
from minikin.server.limits import Limits
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.servers import Served, served
from tests.unit.test_records import NOT_UNDERSTOOD, PROMPTS, TOOLS, infotext, png, with_exif


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Any:
    with served(FakeEngine(), tmp_path_factory.mktemp("records") / "s") as s:
        yield s


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


JPEG = with_exif("JPEG", b"UNICODE\0" + infotext(PROMPTS[1]).encode("utf-16-be"))


def test_png_info_of_any_file(server: Served) -> None:
    """A JPEG of A1111 gives its infotext unchanged, other tools the same as A1111 would write it."""
    with server.client() as c:
        answer = c.post("/sdapi/v1/png-info", json={"image": b64(JPEG)}).json()
        assert answer["info"] == infotext(PROMPTS[1]) and answer["parameters"]["Seed"] == "123"
        for name in ("comfyui", "swarmui in jpeg", "invokeai"):
            answer = c.post("/sdapi/v1/png-info", json={"image": b64(TOOLS[name])}).json()
            assert answer["info"].startswith("a cat\nNegative prompt: rain\n")
            assert answer["parameters"]["Steps"] == "20"
            assert "{" not in answer["info"]
        answer = c.post("/sdapi/v1/png-info", json={"image": b64(NOT_UNDERSTOOD["json"])}).json()
        assert answer["info"] == "" and answer["parameters"] == {} and "hello" in answer["items"]["parameters"]


@pytest.mark.parametrize("name", ["comfyui", "swarmui", "fooocus", "invokeai", "novelai"])
def test_a_form_takes_the_recipe_over(server: Served, name: str) -> None:
    """`fields` of /api/recipe: size, guidance, sampler, schedule and steps by the names of our options."""
    with server.client() as c:
        fields = c.post("/api/recipe", files={"file": ("x", TOOLS[name])}).json()["fields"]
    expected = {
        "prompt": "a cat",
        "negative": "rain",
        "seed": 123,
        "steps": 20,
        "guidance": 7.0,
        "width": 512,
        "height": 768,
    }
    assert fields.items() >= expected.items()
    sampler = "Euler" if name == "novelai" else "DPM++ 2M"
    assert (fields["scheduler"], fields["schedule"]) == (sampler, "Karras")


def test_a_form_takes_our_own_recipe_over(server: Served) -> None:
    recipe = {
        "prompt": "a cat",
        "guidance": 3.5,
        "scheduler": "Euler a",
        "steps": 7,
        "base": "/tmp/x",
        "device": "cuda",
    }
    with server.client() as c:
        record = png(minikin={"recipe": recipe, "seed": 5, "preset": "quality"})
        fields = c.post("/api/recipe", files={"file": ("x", record)}).json()["fields"]
        assert fields == {"prompt": "a cat", "guidance": 3.5, "scheduler": "Euler a", "steps": 7, "seed": 5,
        "width": 64,
                          "height": 64, "preset": "quality"}  # fmt: skip
        wild = png(minikin={"recipe": {**recipe, "steps": 10**9, "guidance": "x", "width": -5}, "seed": "y"})
        fields = c.post("/api/recipe", files={"file": ("x", wild)}).json()["fields"]
        assert not {"steps", "guidance", "seed", "base", "device"} & set(fields)


def test_without_a_prompt_the_recorded_one_is_painted(server: Served) -> None:
    """Over every API; what is not understood is not painted."""
    with server.client() as c:
        for data, prompt, negative in ((JPEG, PROMPTS[1], "rain"), (TOOLS["comfyui"], "a cat", "rain")):
            body = {"init_images": [b64(data)], "prompt": "", "seed": 5, "denoising_strength": 0.5}
            answer = c.post("/sdapi/v1/img2img", json=body).json()
            info = json.loads(answer["info"])
            assert (info["prompt"], info["negative_prompt"]) == (prompt, negative)
            job = c.post("/api/refine?wait=true", json={"image": b64(data), "seed": 5}).json()
            image = decode.decode(c.get(job["results"][0]["url"]).content, "x", Limits())
            assert read(image) == digest(prompt, negative, {}, 5)
        answer = c.post("/api/refine?wait=true", json={"image": b64(NOT_UNDERSTOOD["json"])})
        assert answer.status_code in (400, 422) and "carries no prompt" in answer.text


def test_records_of_inputs_outlive_a_restart(tmp_path: Path) -> None:
    for name in ("comfyui", "swarmui in jpeg", "comfyui in webp", "novelai"):
        image = decode.decode(TOOLS[name], "image", Limits())
        folder = tmp_path / name
        save_inputs(JobInputs({"image": image}, [], folder))
        again = load_inputs(folder, ["image"]).images["image"]
        assert metadata.recorded(metadata.texts_of(again)) == metadata.recorded(metadata.texts_of(image))


def test_photos_are_taken_as_on_the_command_line(server: Served, tmp_path: Path) -> None:
    """Animated ones are refused, masks are read by alpha or brightness, an opaque alpha is no mask."""
    frames = [Image.new("RGBA", (64, 64), c) for c in ("red", "blue")]
    film, still, mask = io.BytesIO(), io.BytesIO(), io.BytesIO()
    frames[0].save(film, "WEBP", save_all=True, append_images=frames[1:])
    frames[0].save(still, "PNG")
    Image.fromarray(np.repeat(np.uint8([[0, 1]]), 32, 1).repeat(64, 0)).convert("RGBA").save(mask, "PNG")
    with server.client() as c:
        files = [("photos", ("a.webp", film.getvalue()))]
        answer = c.post("/api/masks", files=files, data={"category": "cat"})
        assert answer.status_code == 422 and "is animated" in answer.text
    image, grey = (decode.decode(f.getvalue(), "image", Limits()) for f in (still, mask))
    assert native_concepts._photo(0, image, None, "").mask is None
    photo = native_concepts._photo(0, image, grey, "")
    assert photo.mask is not None and photo.mask.mean() == 0.5 and photo.mask.max() == 1
