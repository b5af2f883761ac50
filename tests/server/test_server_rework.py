"""Refining and inpainting over all three dialects, painted by the embedded base."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

from minikin.errors import BadRecipe
from minikin.events import Progress
from minikin.generation.lineage import task_name
from minikin.images.metadata import recorded
from minikin.models.base import Base
from minikin.recipes import Inpaint, Paint, Refine
from minikin.server import image_metadata
from minikin.server.engine import JobInputs
from minikin.server.errors import RequestRejected
from minikin.server.limits import Limits, check_paint
from minikin.server.studio_engine import StudioEngine
from minikin.studio import Studio
from tests.helpers.servers import Served, served

BOX = (40, 40, 90, 90)
FAST: dict[str, Any] = {"preset": "turbo", "steps": 2}


@pytest.fixture(scope="module")
def server(tiny: Base, tmp_path_factory: Any) -> Iterator[Served]:
    with served(StudioEngine(Studio(tiny)), tmp_path_factory.mktemp("img2img") / "s") as s:
        yield s


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as c:
        yield c


@pytest.fixture(scope="module")
def draft(http: httpx.Client) -> bytes:
    body = {"prompt": "a red car in the snow", "seed": 7, **FAST}
    response = http.post("/api/paint?wait=true", json=body).json()
    return http.get(response["results"][0]["url"]).content


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def coded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def mask(size: tuple[int, int] = (128, 128)) -> Image.Image:
    cover = Image.new("L", size, 0)
    cover.paste(255, BOX)
    return cover


def outside(a: Image.Image, b: Image.Image) -> tuple[int, int]:
    """Pixels that differ outside the box, and inside."""
    other = (np.asarray(a.convert("RGB")) != np.asarray(b.convert("RGB"))).any(-1)
    left, top, right, bottom = BOX
    inside = other[top:bottom, left:right].sum()
    return int(other.sum() - inside), int(inside)


def done(http: httpx.Client, kind: str, **body: Any) -> Image.Image:
    response = http.post(f"/api/{kind}?wait=true", json=body)
    assert response.status_code == 200, response.text
    return opened(http.get(response.json()["results"][0]["url"]).content)


def test_refining_takes_the_recipe_of_the_image(http: httpx.Client, draft: bytes) -> None:
    """Prompt, seed and preset are the draft's; the record holds its draft, and both its dialects."""
    image = done(http, "refine", image=base64.b64encode(draft).decode(), strength=0.3)
    matches = recorded({k: v for k, v in image.info.items() if isinstance(v, str)})
    assert matches.prompt == "a red car in the snow" and matches.settings["Preset"] == "turbo"
    assert matches.settings["Denoising strength"] == "0.3" and matches.recipe["seed"] == 7
    assert matches.recipe["work"] == "refine" and matches.recipe["parent"]["made"]["seed"] == 7
    assert image.size == (128, 128) and image.convert("RGB") != opened(draft).convert("RGB")


def test_refining_larger_and_several(http: httpx.Client, draft: bytes) -> None:
    body = {"image": base64.b64encode(draft).decode(), "size": "1.5x", "n": 2, "strength": 0.2}
    response = http.post("/api/refine?wait=true", json=body).json()
    assert [(r["width"], r["height"], r["seed"]) for r in response["results"]] == [(192, 192, 7), (192, 192, 8)]
    assert response["progress"]["steps"] == 2, "one step each: ceil(2 x 0.2)"


def test_inpainting_moves_nothing_outside_the_mask(http: httpx.Client, draft: bytes) -> None:
    image = done(http, "inpaint", image=base64.b64encode(draft).decode(), mask=coded(mask()),
                 prompt="a yellow duck", **FAST)  # fmt: skip
    away, within = outside(image, opened(draft))
    assert away == 0 and within > 1000
    assert recorded(dict(image.info)).recipe["mask"]["png"]


def test_every_step_has_a_preview(server: Served, draft: bytes) -> None:
    """Of the size of what comes out; under a mask in its place, with every byte outside as it was."""
    engine, source = server.service.engine, opened(draft).convert("RGB")
    for recipe, inputs, size in (
        (Refine(prompt="a duck", strength=1, size="1.5x", **FAST), JobInputs({"image": source}), (192, 192)),
        (Inpaint(prompt="a duck", only_masked=True, **FAST), JobInputs({"image": source, "mask": mask()}),
         (128, 128)),
    ):  # fmt: skip
        prepared = engine.prepare(task_name(recipe), recipe, {}, inputs)
        run = engine.run(task_name(recipe), prepared, inputs)
        looks = [event.preview() for event in run if isinstance(event, Progress) and event.preview]
        assert [look.size for look in looks] == [size] * 2
        if "mask" in inputs.images:
            away, within = outside(looks[0], source)
            assert away == 0 and within > 1000


def test_an_image_is_extended_without_a_mask(http: httpx.Client, draft: bytes) -> None:
    image = done(http, "inpaint", image=base64.b64encode(draft).decode(), extend="right=32", **FAST)
    assert image.size == (160, 128)
    stored = image.crop((0, 0, 128, 128)).convert("RGB")
    assert stored.tobytes() == opened(draft).convert("RGB").tobytes()


def test_an_image_of_this_server_is_refined(http: httpx.Client) -> None:
    response = http.post("/api/paint?wait=true", json={"prompt": "a blue boat", "seed": 3, **FAST}).json()
    id_ = response["results"][0]["id"]
    again = done(http, "refine", image=f"result:{id_}", strength=0.2)
    assert recorded(dict(again.info)).recipe["parent"]["made"]["recipe"]["prompt"] == "a blue boat"


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("refine", {}, "carries no prompt"),
        ("refine", {"prompt": "x", "size": "64x4096"}, "64 to 2048"),
        ("refine", {"prompt": "x", "size": "2048", "n": 10, "steps": 50, "strength": 1}, "megapixel-steps"),
        ("refine", {"prompt": "x", "n": 11}, "at most 10 images"),
        ("refine", {"prompt": "x", "steps": 51}, "at most 50 steps"),
        ("refine", {"prompt": "x", "strength": 0}, "strength"),
        ("inpaint", {"prompt": "x"}, "Say what to paint"),
        ("inpaint", {"prompt": "x", "extend": "right=2000"}, "64 to 2048"),
        ("inpaint", {"prompt": "x", "extend": "sideways=2"}, "expects sides and pixels"),
        ("inpaint", {"prompt": "x", "mask": coded(mask((64, 64)))}, "must be of one size"),
        ("inpaint", {"prompt": "x", "mask": coded(Image.new("L", (128, 128)))}, "black everywhere"),
        ("inpaint", {"prompt": "x", "mask": coded(mask()), "width": 256}, "keeps its size"),
        ("inpaint", {"prompt": "<nobody>", "mask": coded(mask())}, "Unknown concept 'nobody'"),
    ],
)  # fmt: skip
def test_refused_at_the_door(http: httpx.Client, kind: str, more: dict[str, Any], words: str) -> None:
    body = {"image": coded(Image.new("RGB", (128, 128), "red")), **more}
    response = http.post(f"/api/{kind}", json=body)
    assert response.status_code == 422 and words in response.json()["error"]["message"], response.text


def test_limits_apply_to_the_resulting_image() -> None:
    limits, at = Limits(cost=10.0), (1000, 1000)
    check_paint(Refine(prompt="x", steps=20, strength=0.5), limits, 512, at)  # 10 megapixel-steps
    with pytest.raises(RequestRejected, match="12 megapixel-steps"):
        check_paint(Refine(prompt="x", steps=24, strength=0.5), limits, 512, at)
    with pytest.raises(RequestRejected, match="2000x2000"):
        check_paint(Refine(prompt="x", steps=20, strength=0.5, size="2x"), limits, 512, at)
    with pytest.raises(RequestRejected, match="1500x1000"):
        check_paint(Inpaint(prompt="x", steps=10, extend="left=500"), limits, 512, at)


def test_openai_edits_and_variations(server: Served, draft: bytes) -> None:
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

    def file(image: Image.Image | bytes) -> tuple[str, bytes, str]:
        return "x.png", image if isinstance(image, bytes) else base64.b64decode(coded(image)), "image/png"

    quick = {"preset": "turbo", "num_inference_steps": 2, "seed": 1}
    response = theirs.images.edit(image=file(draft), prompt="a blue car in the snow", extra_body=quick)
    assert opened(base64.b64decode(response.data[0].b64_json)).size == (128, 128)  # type: ignore[index, arg-type]
    holes = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    holes.paste((0, 0, 0, 0), BOX)
    response = theirs.images.edit(image=file(draft), mask=file(holes), prompt="a duck", extra_body=quick)
    away, within = outside(opened(base64.b64decode(response.data[0].b64_json)), opened(draft))  # type: ignore[index, arg-type]
    assert away == 0 and within > 500
    response = theirs.images.create_variation(image=file(draft), n=2, extra_body=quick)
    assert "a red car in the snow" in response.data[1].infotext  # type: ignore[index, union-attr]


def test_webui_img2img_and_inpainting(server: Served, draft: bytes) -> None:
    webui = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    quick: dict[str, Any] = {"steps": 3, "seed": 1, "sampler_name": "Euler", "cfg_scale": 3}
    size = {"width": 160, "height": 128}
    response = webui.img2img(images=[opened(draft)], prompt="a car", denoising_strength=0.4, **size, **quick)
    assert response.image.size == (160, 128) and "Denoising strength: 0.4" in response.info["infotexts"][0]
    response = webui.img2img(images=[opened(draft)], mask_image=mask(), prompt="a duck", denoising_strength=1.0,
                         inpaint_full_res=False, mask_blur=2, **quick)  # fmt: skip
    away, within = outside(response.image, opened(draft))
    assert response.image.size == (128, 128) and away == 0 and within > 1000
    response = webui.img2img(
        images=[opened(draft)], prompt="", denoising_strength=0.0, width=128, height=128, **quick
    )
    assert response.info["prompt"] == "a red car in the snow", "an empty prompt is the image's own"


def test_inputs_keep_how_they_were_painted(draft: bytes, tmp_path: Path) -> None:
    """What a restart reads back: the record stays, other metadata goes."""
    source = opened(draft)
    source.info["Software"] = "secret"
    image_metadata.save_inputs(JobInputs({"image": source, "mask": mask()}, folder=tmp_path))
    back = image_metadata.load_inputs(tmp_path, ("image", "mask")).images
    assert back["image"].info["minikin"] == source.info["minikin"] and "Software" not in back["image"].info
    assert back["mask"].tobytes() == mask().tobytes()


def test_a_record_is_not_burst_by_its_mask() -> None:
    noise = np.random.default_rng(0).random((800, 800)) > 0.5
    cover = base64.b64encode(base64.b64decode(coded(Image.fromarray(noise)))).decode()
    facts = {"recipe": {}, "mask": {"png": cover}}
    info, _ = image_metadata.image_texts(
        facts, Inpaint(prompt="x", extend="left=8"), Image.new("RGB", (8, 8)), 1
    )
    assert len(cover) > 30_000 and sum(len(c[1]) for c in info.chunks) < 2_000


def test_live_painting_uses_the_warm_backend(tiny: Base) -> None:
    """The quickest preset at the base's own size; every other one is an export that takes its time."""
    engine = StudioEngine(Studio(tiny), live_engine="openvino")
    assert engine.live_preset == engine.describe()["live"] == "lcm-lora"
    usual = {"prompt": "a cat", "preset": "lcm-lora", "steps": 1}
    assert engine.with_live_engine(Paint(**usual)).backend == "openvino"
    for other in ({"preset": "quality"}, {"width": 64}, {"prompt": "a cat <lora:style>"}):
        assert engine.with_live_engine(Paint(**{**usual, **other})).backend == "eager", other
    assert StudioEngine(Studio(tiny)).with_live_engine(Paint(**usual)).backend == "eager"


def test_a_kind_that_is_none() -> None:
    from minikin.server.job_types import recipe_model

    with pytest.raises(BadRecipe, match="Known: paint, refine, inpaint, teach, masks"):
        recipe_model("dream")
