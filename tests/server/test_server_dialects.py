"""OpenAI's and A1111's dialects, spoken by the clients people have: `openai` and `webuiapi`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import webuiapi
from PIL import Image

from minikin.errors import BaseMismatch
from tests.helpers.fake_engine import FakeEngine, digest, read
from tests.helpers.servers import Served, Watched, concept, served


class Recorder(Watched):
    """Keeps what work that is done alone was given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[tuple[str, Any, Any]] = []

    def run(self, kind: str, prepared: Any, inputs: Any) -> Any:
        self.seen.append((kind, prepared.recipe, dict(inputs.images)))
        yield from super().run(kind, prepared, inputs)


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    engine = Recorder(errors={"other-base": BaseMismatch("Taught on another base.")})
    with served(engine, tmp_path_factory.mktemp("d") / "s") as s:
        yield s


@pytest.fixture(scope="module")
def theirs(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def webui(server: Served) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")


def decoded(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def png(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    file.name = "image.png"
    return file


# ---- OpenAI ------------------------------------------------------------------------------------


def test_openai_generate(theirs: openai.OpenAI) -> None:
    reply = theirs.images.generate(
        model="gpt-image-1", prompt="a cat", n=2, size="128x64",
        extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "dogs"},
    )  # fmt: skip
    assert reply.data is not None
    assert [d.seed for d in reply.data] == [7, 8]  # type: ignore[attr-defined]
    for d in reply.data:
        image = decoded(d.b64_json or "")
        assert image.size == (128, 64)
        assert read(image) == digest("a cat", "dogs", {}, d.seed)  # type: ignore[attr-defined]
        assert "Steps: 3" in d.infotext  # type: ignore[attr-defined]


def test_openai_urls_formats_and_models(theirs: openai.OpenAI, server: Served) -> None:
    reply = theirs.images.generate(model="dall-e-2", prompt="a cat")
    assert reply.data and reply.data[0].url and reply.data[0].b64_json is None
    with server.client() as c:
        assert c.get(reply.data[0].url).headers["content-type"] == "image/png"
    for kind in ("jpeg", "webp"):
        reply = theirs.images.generate(prompt="a cat", output_format=kind, output_compression=80)  # type: ignore[arg-type]
        assert reply.data and decoded(reply.data[0].b64_json or "").format == kind.upper()
    names = [m.id for m in theirs.models.list()]
    assert names == ["fake", "fake:quality", "fake:turbo"]
    assert theirs.models.retrieve("fake:turbo").owned_by == "minikin"
    with pytest.raises(openai.NotFoundError, match="no model 'sdxl'"):
        theirs.models.retrieve("sdxl")
    reply = theirs.images.generate(prompt="a cat", model="fake:turbo")
    assert "Preset" in reply.data[0].infotext  # type: ignore[index]


def test_openai_streams(theirs: openai.OpenAI, server: Served) -> None:
    """Of three steps all but the last are due to be seen."""
    server.service.engine.patience = 20.0  # type: ignore[attr-defined]
    parameters: dict[str, Any] = {"seed": 3, "num_inference_steps": 3}
    try:
        stream = theirs.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=parameters)
        events = list(stream)
    finally:
        server.service.engine.patience = 0.0  # type: ignore[attr-defined]
    assert [e.type for e in events][-1] == "image_generation.completed"
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    assert [e.partial_image_index for e in partial] == [0, 1]
    assert read(decoded(events[-1].b64_json)) == digest("a cat", "", {}, 3)


def test_openai_edits(theirs: openai.OpenAI, server: Served) -> None:
    """Without a mask refine; with a transparent mask, or a transparent image, inpaint."""
    observed = server.service.engine.seen  # type: ignore[attr-defined]
    source_image = Image.new("RGB", (64, 48), (10, 20, 30))
    reply = theirs.images.edit(image=png(source_image), prompt="brighter", extra_body={"seed": 1})
    assert reply.data and decoded(reply.data[0].b64_json or "").size == (64, 48)
    kind, recipe, inputs = observed[-1]
    assert (kind, recipe.prompt, recipe.seed, recipe.strength) == ("refine", "brighter", 1, 0.75)
    assert inputs["image"].getpixel((5, 5)) == (10, 20, 30)
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 48))
    theirs.images.edit(image=[png(source_image)], mask=png(mask), prompt="a hat")
    kind, _, inputs = observed[-1]
    assert kind == "inpaint" and [inputs["mask"].getpixel((x, 5)) for x in (5, 60)] == [255, 0]
    holed = Image.new("RGBA", (64, 48), (1, 2, 3, 255))
    holed.paste((0, 0, 0, 0), (32, 0, 64, 48))
    theirs.images.edit(image=png(holed), prompt="a hat")
    kind, _, inputs = observed[-1]
    assert kind == "inpaint" and [inputs["mask"].getpixel((x, 5)) for x in (5, 60)] == [0, 255]
    with pytest.raises(openai.BadRequestError, match="must be equal"):
        theirs.images.edit(image=png(source_image), mask=png(Image.new("RGBA", (8, 8))), prompt="a hat")
    events = list(theirs.images.edit(image=png(source_image), prompt="x", stream=True))
    assert events[-1].type == "image_edit.completed"


def test_openai_variations(theirs: openai.OpenAI, server: Served) -> None:
    """By the image's own prompt, which is inside what we painted."""
    first = theirs.images.generate(prompt="a blue cat")
    file = io.BytesIO(base64.b64decode(first.data[0].b64_json))  # type: ignore[index, arg-type]
    file.name = "cat.png"
    reply = theirs.images.create_variation(image=file, n=2)
    assert reply.data and len(reply.data) == 2
    kind, recipe, _ = server.service.engine.seen[-1]  # type: ignore[attr-defined]
    assert (kind, recipe.prompt, recipe.n, recipe.strength) == ("refine", "a blue cat", 2, 0.5)


@pytest.mark.parametrize(
    ("parameters", "error", "code"),
    [
        ({"prompt": "a", "size": "huge"}, openai.BadRequestError, "bad_recipe"),
        ({"prompt": "a", "n": 11}, openai.BadRequestError, "invalid_request"),
        ({"prompt": "a", "extra_body": {"sed": 1}}, openai.BadRequestError, "invalid_request"),
        ({"prompt": "a", "model": "sdxl"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": "<nobody>"}, openai.BadRequestError, "unknown_name"),
        ({"prompt": "other-base"}, openai.BadRequestError, "concept_base_mismatch"),
        ({"prompt": "a", "stream": True, "n": 2}, openai.BadRequestError, "invalid_request"),
    ],
)
def test_openai_errors_in_its_envelope(
    theirs: openai.OpenAI, parameters: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        theirs.images.generate(**parameters)
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["code"] == code
    assert caught.value.request_id


def test_openai_retries_only_what_is_worth_it(tmp_path: Path) -> None:
    """The stock client tries every 5xx three times, unless told not to."""
    engine = FakeEngine(errors={"bad": RuntimeError("x")})
    with served(engine, tmp_path / "s") as s:
        client = openai.OpenAI(base_url=f"{s.url}/v1", api_key="any")  # max_retries=2, its default
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="bad")
        assert len(s.service.store.jobs("local", 10)) == 1


# ---- A1111 -------------------------------------------------------------------------------------


def test_webui_txt2img(webui: webuiapi.WebUIApi) -> None:
    reply = webui.txt2img(
        prompt="a cat", negative_prompt="dogs", seed=5, steps=3, width=64, height=128, batch_size=2
    )
    assert (
        reply.info["all_seeds"] == [5, 6]
        and reply.info["seed"] == 5
        and reply.info["sampler_name"] == "Euler a"
    )
    assert "Seed: 6" in reply.info["infotexts"][1] and reply.info["width"] == 64
    for image, seed in zip(reply.images, (5, 6), strict=True):
        assert read(image) == digest("a cat", "dogs", {}, seed) and image.size == (64, 128)
    info = webui.png_info(reply.image)
    assert info.info.startswith("a cat\nNegative prompt: dogs\nSteps: 3")
    again = webui.txt2img(prompt="a cat", seed=-1, width=64, height=64)
    assert again.info["seed"] >= 0


def test_webui_img2img_and_inpaint(webui: webuiapi.WebUIApi, server: Served) -> None:
    source_image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    reply = webui.img2img(images=[source_image], prompt="x", denoising_strength=0.3, seed=2, steps=4)
    kind, recipe, _ = server.service.engine.seen[-1]  # type: ignore[attr-defined]
    assert (kind, recipe.strength, recipe.seed, recipe.steps) == ("refine", 0.3, 2, 4)
    assert reply.info["denoising_strength"] == 0.3
    webui.img2img(images=[source_image], mask_image=mask, prompt="x", mask_blur=6, inpainting_mask_invert=1)
    kind, recipe, inputs = server.service.engine.seen[-1]  # type: ignore[attr-defined]
    assert (kind, recipe.feather) == ("inpaint", 6)
    assert [inputs["mask"].getpixel((x, 5)) for x in (5, 60)] == [0, 255]


def test_webui_lists(webui: webuiapi.WebUIApi, server: Served) -> None:
    options = webui.get_options()
    assert options["sd_model_checkpoint"] == webui.get_sd_models()[0]["title"] == webui.util_get_current_model()
    webui.util_set_model("fake")
    with server.client() as c:
        reply = c.post("/sdapi/v1/options", json={"outdir_samples": "/etc"})
        assert reply.status_code == 422 and reply.json()["error"] == "unsupported_field"
        c.post("/api/concepts", files={"file": ("x", concept("tom", 3))})
    assert "Euler a" in [x["name"] for x in webui.get_samplers()]
    assert "karras" in [x["name"] for x in webui.get_schedulers()]
    assert webui.get_loras()[0]["name"] == "style"
    assert "tom" in webui.get_embeddings()["loaded"]
    assert webui.get_cmd_flags() == {} and webui.get_scripts() == {"txt2img": [], "img2img": []}
    for name in ("upscalers", "latent_upscale_modes", "hypernetworks", "face_restorers", "realesrgan_models",
                 "prompt_styles", "sd_vae"):  # fmt: skip
        got = getattr(webui, f"get_{name}", None)
        assert got is None or got() == []
    webui.refresh_checkpoints()
    webui.util_wait_for_ready(check_interval=0.05)


@pytest.mark.parametrize(
    "parameters",
    [{"script_name": "x"}, {"alwayson_scripts": {"x": {}}}, {"override_settings": {"outdir": "/"}},
              {"enable_hr": True}, {"styles": ["x"]}],
)  # fmt: skip
def test_webui_refuses_what_is_not_here(webui: webuiapi.WebUIApi, parameters: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="unsupported_field"):
        webui.txt2img(prompt="a", width=64, height=64, **parameters)
    with pytest.raises(RuntimeError, match="501"):
        webui.extra_single_image(image=Image.new("RGB", (8, 8)))


def test_webui_interrupts_its_own_alone(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s:
        apis = {
            name: webuiapi.WebUIApi(baseurl=f"{s.url}/sdapi/v1", username=name, password="any")
            for name in ("ann", "bob")
        }
        engine.go.clear()
        reply: dict[str, Any] = {}

        def run(name: str) -> None:
            reply[name] = apis[name].txt2img(prompt=name, seed=1, width=64, height=64)

        threads = [threading.Thread(target=run, args=(name,)) for name in apis]
        for live, thread in enumerate(threads, 1):
            thread.start()
            while len(s.service._unfinished()) < live or not s.service.running():
                assert thread.is_alive()
                time.sleep(0.01)
        state = apis["ann"].get_progress()
        assert state["state"]["job_count"] == 1 and 0 < state["progress"] < 1
        apis["ann"].interrupt()
        threads[0].join(30)
        assert reply["ann"].info["interrupted"] and "bob" not in reply
        engine.go.set()
        threads[1].join(30)
        assert read(reply["bob"].image) == digest("bob", "", {}, 1)


def test_webui_interrupts_a_task_by_its_name(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine, tmp_path / "s") as s, s.client() as c:
        engine.go.clear()
        reply: dict[str, Any] = {}

        def run(name: str) -> None:
            body = {"prompt": name, "seed": 1, "width": 64, "height": 64, "force_task_id": name}
            reply[name] = c.post("/sdapi/v1/txt2img", json=body).json()

        threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
        for t in threads:
            t.start()
        while len(s.service.unfinished("local")) < 2:
            time.sleep(0.01)
        assert c.get("/sdapi/v1/progress?id_task=two").json()["state"]["job"] == "two"
        c.post("/sdapi/v1/interrupt?id_task=two")
        threads[1].join(30)
        engine.go.set()
        threads[0].join(30)
        assert (
            json.loads(reply["two"]["info"])["interrupted"]
            and not json.loads(reply["one"]["info"])["interrupted"]
        )


# ---- concepts over all three -------------------------------------------------------------------


def test_concepts_over_all_dialects(server: Served, theirs: openai.OpenAI, webui: webuiapi.WebUIApi) -> None:
    shas = []
    with server.client() as c:
        for k in (10, 11):
            reply = c.post("/api/concepts", files={"file": ("x", concept("pet", k))})
            shas.append(reply.json()["sha256"])
        want = {
            pin: digest("a <pet>", "", {"pet": sha}, 4) for pin, sha in zip(("old", "new"), shas, strict=True)
        }
        assert hashlib.sha256(concept("pet", 11)).hexdigest() == shas[1]
        for pin, more in (("new", {}), ("old", {"concepts": {"pet": shas[0]}})):
            native = c.post("/api/paint?wait=true", json={"prompt": "a <pet>", "seed": 4, **more}).json()
            assert read(Image.open(io.BytesIO(c.get(native["results"][0]["url"]).content))) == want[pin]
            reply = theirs.images.generate(prompt="a <pet>", extra_body={"seed": 4, **more})
            assert read(decoded(reply.data[0].b64_json)) == want[pin]  # type: ignore[index, arg-type]
            body = {"prompt": "a <pet>", "seed": 4, "width": 64, "height": 64, **more}
            reply = c.post("/sdapi/v1/txt2img", json=body).json()
            assert read(decoded(reply["images"][0])) == want[pin]
    assert (
        read(webui.txt2img(prompt=f"a <pet@sha256:{shas[0][:8]}>", seed=4, width=64, height=64).image)
        == want["old"]
    )
