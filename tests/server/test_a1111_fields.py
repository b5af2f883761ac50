"""A1111's fields: followed, refused, or a warning in `info`. Bodies as real clients send them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minikin.server.api.a1111_fields import HARMLESS, NOT_DONE
from minikin.server.api.a1111_images import filled, flat, mask_of, resized
from tests.helpers.servers import Served, served
from tests.server.test_server_dialects import Recorder

TXT = {"prompt": "a cat", "seed": 5, "steps": 3, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(Recorder(), tmp_path_factory.mktemp("a") / "s") as s:
        yield s


def sent(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def plain(colour: Any = (200, 180, 90), size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def posted(server: Served, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any, Any, list[str]]:
    """(answer, recipe, inputs, warnings) of a request that is done."""
    with server.client() as c:
        response = c.post(f"/sdapi/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    engine: Any = server.service.engine
    recipe, inputs = engine.seen[-1][1:] if path == "img2img" else (None, {})
    return answer, recipe, inputs, json.loads(answer["info"])["warnings"]


def refused(server: Served, path: str, body: dict[str, Any]) -> str:
    with server.client() as c:
        response = c.post(f"/sdapi/v1/{path}", json=body)
    assert response.status_code == 422, response.text
    return str(response.json()["detail"])


# ---- what clients send ---------------------------------------------------------------------------

SILLYTAVERN = {  # extensions/stable-diffusion/index.js; the server adds nothing and passes url and auth on
    "url": "http://localhost:7860", "auth": "", "prompt": "a cat", "negative_prompt": "rain", "seed": None,
    "sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 20, "cfg_scale": 7, "width": 64, "height": 64,
    "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1,
    "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic", "forge_additional_modules": []},
    "override_settings_restore_afterwards": True, "clip_skip": 2, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
OPEN_WEBUI = {  # backend/open_webui/routers/images.py
    "prompt": "a cat", "batch_size": 2, "width": 64, "height": 64, "steps": 4, "negative_prompt": "rain",
    "cfg_scale": 7.0, "sampler_name": "Euler a", "scheduler": "Karras",
}  # fmt: skip
KRITA = {  # auto-sd-paint-ext's inpainting, by A1111's names: a selection as mask
    "prompt": "a hat", "negative_prompt": "", "sampler_name": "Euler a", "steps": 4, "cfg_scale": 7.0,
    "seed": -1, "denoising_strength": 0.8, "inpainting_fill": 1, "inpaint_full_res": False,
    "inpaint_full_res_padding": 32, "inpainting_mask_invert": 0, "mask_blur": 4, "resize_mode": 1,
    "tiling": False, "restore_faces": False, "batch_size": 1, "n_iter": 1, "script_name": None,
    "script_args": [], "do_not_save_grid": True, "include_init_images": False, "width": 64, "height": 48,
}  # fmt: skip
SWAGGER = {  # the example of A1111's own /docs, which people edit
    "prompt": "a cat", "negative_prompt": "", "styles": ["string"], "seed": -1, "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": "Euler", "scheduler": "Automatic",
    "batch_size": 1, "n_iter": 1, "steps": 4, "cfg_scale": 7, "width": 64, "height": 64, "restore_faces": False,
    "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False, "eta": 0, "denoising_strength": 0,
    "s_min_uncond": 0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 0, "override_settings": {},
    "override_settings_restore_afterwards": True, "refiner_checkpoint": "", "refiner_switch_at": 0,
    "disable_extra_networks": False, "firstpass_image": "", "comments": {}, "enable_hr": False,
    "firstphase_width": 0, "firstphase_height": 0, "hr_scale": 2, "hr_upscaler": "", "hr_second_pass_steps": 0,
    "hr_resize_x": 0, "hr_resize_y": 0, "hr_checkpoint_name": "", "hr_sampler_name": "", "hr_scheduler": "",
    "hr_prompt": "", "hr_negative_prompt": "", "force_task_id": "", "sampler_index": "Euler", "script_name": "",
    "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {}, "infotext": "",
}  # fmt: skip


def test_sillytavern(server: Served) -> None:
    answer, _, _, warnings = posted(server, "txt2img", SILLYTAVERN)
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 1 and info["clip_skip"] == 2 and info["sampler_name"] == "DPM++ 2M"
    assert info["extra_generation_params"] == {"Schedule type": "Karras"}
    assert warnings == [
        "scheduler asks for the noise schedule Karras.", "The prompt is read with clip skip 2.",
    ]  # fmt: skip
    assert "localhost" not in answer["info"] and "auth" not in json.dumps(answer["parameters"])
    with server.client() as c:
        for name in (
            "options",
            "upscalers",
            "latent-upscale-modes",
            "sd-vae",
            "samplers",
            "schedulers",
            "sd-models",
        ):
            assert c.get(f"/sdapi/v1/{name}").status_code == 200
        title = c.get("/sdapi/v1/sd-models").json()[0]["title"]
        assert c.post("/sdapi/v1/options", json={"sd_model_checkpoint": title}).status_code == 200
        assert c.post("/sdapi/v1/interrupt").status_code == 200  # without a body


def test_open_webui(server: Served) -> None:
    answer, _, _, warnings = posted(server, "txt2img", OPEN_WEBUI)
    assert len(answer["images"]) == 2
    assert warnings == ["scheduler asks for the noise schedule Karras."]


def test_krita(server: Served) -> None:
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (0, 0, 32, 48))
    image = Image.new("RGBA", (64, 48), (200, 180, 90, 255))
    answer, recipe, inputs, warnings = posted(
        server, "img2img", {**KRITA, "init_images": [sent(image)], "mask": sent(mask)}
    )
    assert (recipe.strength, recipe.feather, recipe.only_masked, recipe.padding) == (0.8, 4, False, 32)
    assert inputs["image"].tobytes() == image.convert("RGB").tobytes(), (
        "inpainting_fill 1 starts from the original"
    )
    assert not warnings and "init_images" not in answer["parameters"]


def test_the_example_of_the_docs(server: Served) -> None:
    """As it is, but for the style that it names."""
    assert "styles" in refused(server, "txt2img", SWAGGER)
    _, _, _, warnings = posted(server, "txt2img", {**SWAGGER, "styles": [""]})
    assert not warnings


# ---- neutral, not done, refused ------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_is_not_done_is_a_warning(server: Served, name: str) -> None:
    _, neutral = NOT_DONE[name]
    for value in neutral:
        assert posted(server, "txt2img", {**TXT, name: value})[3] == []
    other: Any = (
        True if neutral[0] is False else False if neutral[0] is True else "x" if neutral[0] == "" else 3
    )
    (warning,) = posted(server, "txt2img", {**TXT, name: other})[3]
    assert warning.startswith(f"{name} is not done here: ")
    assert name not in HARMLESS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eta_noise_seed_delta": 31337}, "the seed alone"), ({"sd_vae": "other.pt"}, "own VAE"),
        ({"samples_format": "jpg"}, "PNG"), ({"randn_source": "NV"}, "CPU"),
        ({"forge_additional_modules": ["t5.safetensors"]}, "has what it needs"),
    ],
)  # fmt: skip
def test_options_that_are_not_done_are_warnings(server: Served, settings: dict[str, Any], words: str) -> None:
    (warning,) = posted(server, "txt2img", {**TXT, "override_settings": settings})[3]
    assert words in warning and next(iter(settings)) in warning


@pytest.mark.parametrize(
    "settings",
    [{"sd_vae": "Automatic"}, {"sd_vae": "None"}, {"eta_noise_seed_delta": 0}, {"samples_format": "png"},
     {"sd_model_checkpoint": "fake.safetensors"}, {"sd_model_checkpoint": None},
     {"CLIP_stop_at_last_layers": 1}, {"forge_additional_modules": []}],
)  # fmt: skip
def test_neutral_options_pass(server: Served, settings: dict[str, Any]) -> None:
    assert posted(server, "txt2img", {**TXT, "override_settings": settings})[3] == []


def test_options_posted_back_unchanged(server: Served) -> None:
    with server.client() as c:
        options = c.get("/sdapi/v1/options").json()
        assert {"sd_model_checkpoint", "CLIP_stop_at_last_layers", "sd_vae"} <= set(options)
        assert c.post("/sdapi/v1/options", json=options).status_code == 200
        for changed in (
            {"CLIP_stop_at_last_layers": 2},
            {"eta_noise_seed_delta": 1},
            {"sd_vae": "x"},
            {"grid_save": 1},
        ):
            response = c.post("/sdapi/v1/options", json=changed)
            assert response.status_code == 422 and next(iter(changed)) in response.text
        assert "override_settings" in c.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2}).text


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"alwayson_scripts": {"ADetailer": {"args": [True, False, {"ad_model": "x.pt"}]}}}, "ADetailer"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"enabled": True, "model": "x"}]}}}, "controlnet"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 1.5}}, "whole number"),
        ({"enable_hr": True}, "img2img"), ({"subseed_strength": 0.5}, "subseed_strength"),
    ],
)  # fmt: skip
def test_what_would_make_another_image_is_refused(server: Served, field: dict[str, Any], words: str) -> None:
    assert words in refused(server, "txt2img", {**TXT, **field})


@pytest.mark.parametrize(
    "scripts",
    [{}, {"ADetailer": {"args": [False, False, {"ad_model": "face_yolov8n.pt"}]}}, {"controlnet": {"args": []}},
     {"ControlNet": {"args": [{"enabled": False, "image": "x"}, {"enabled": False}]}},
     {"ADetailer": {"args": [{"ad_model": "None"}]}}],
)  # fmt: skip
def test_scripts_that_are_off_pass(server: Served, scripts: dict[str, Any]) -> None:
    assert posted(server, "txt2img", {**TXT, "alwayson_scripts": scripts})[3] == []


def test_unknown_fields_are_named_without_their_values(server: Served) -> None:
    answer, _, _, (warning,) = posted(
        server, "txt2img", {**TXT, "hires": "secret", "empty": None, "off": False}
    )
    assert warning == "Not known here, and ignored: hires." and "secret" not in json.dumps(answer["parameters"])


# ---- images and masks ----------------------------------------------------------------------------


def test_several_init_images(server: Served) -> None:
    """One image of each; a batch that is smaller than their number is refused, as A1111 does."""
    first, second = plain("red"), plain("lime", (48, 64))
    body = {"prompt": "a cat", "seed": 7, "steps": 2, "init_images": [sent(first), sent(second)]}
    assert "batch_size" in refused(server, "img2img", body)
    answer, _, _, _ = posted(server, "img2img", {**body, "batch_size": 2, "n_iter": 2})
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [7, 8, 9, 10] and len(info["infotexts"]) == len(answer["images"]) == 4
    engine: Any = server.service.engine
    assert [inputs["image"].size for _, _, inputs in engine.seen[-4:]] == [(64, 48), (48, 64)] * 2
    assert "at most 10" in refused(server, "img2img", {**body, "batch_size": 2, "n_iter": 6})
    assert "2^63" in refused(server, "img2img", {**body, "batch_size": 2, "seed": 2**63 - 2, "n_iter": 2})
    eleven = {"init_images": ["not decoded"] * 11, "batch_size": 11}
    assert "at most 10" in refused(server, "img2img", {**body, **eleven}), "before any is decoded"


def test_base64_in_lines_and_no_mask(server: Served) -> None:
    """As `base64 FILE` prints it; and an empty mask is none, as with A1111."""
    text = base64.encodebytes(base64.b64decode(sent(plain()).rpartition(",")[2])).decode()
    for image in (text, f"data:image/png;base64,{text}", text.replace("\n", "\r\n")):
        body = {"prompt": "a cat", "init_images": [image], "mask": "", "steps": 2}
        _, _, inputs, warnings = posted(server, "img2img", body)
        assert set(inputs) == {"image"} and warnings == []


@pytest.mark.parametrize("colour", [255, 0])
def test_masks_in_alpha(server: Served, colour: int) -> None:
    """A canvas in a browser: strokes of one colour on transparent ground; where they are, it is generated."""
    mask = Image.new("RGBA", (64, 48), (colour, colour, colour, 0))
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 47), fill=(colour, colour, colour, 255))
    body = {"prompt": "a cat", "init_images": [sent(plain())], "mask": sent(mask), "steps": 2}
    _, _, inputs, _ = posted(server, "img2img", body)
    assert [inputs["mask"].getpixel((x, 5)) for x in (5, 60)] == [255, 0]
    _, _, inputs, _ = posted(server, "img2img", {**body, "inpainting_mask_invert": 1})
    assert [inputs["mask"].getpixel((x, 5)) for x in (5, 60)] == [0, 255]


def test_mask_options(server: Served) -> None:
    mask = Image.new("L", (64, 48), 255)
    mask.paste(0, (0, 0, 32, 48))
    body = {"prompt": "a cat", "init_images": [sent(plain())], "mask": sent(mask), "steps": 2}
    _, recipe, _, _ = posted(server, "img2img", body)
    assert (recipe.feather, recipe.only_masked, recipe.padding) == (4, True, 0), "A1111's defaults"
    blurred = {**body, "mask_blur_x": 9, "mask_blur_y": 2, "inpaint_full_res": 0, "inpaint_full_res_padding": 8}
    _, recipe, _, _ = posted(server, "img2img", blurred)
    assert (recipe.feather, recipe.only_masked, recipe.padding) == (9, False, 8)
    for fill, n in ((0, 0), (1, 0), (2, 1), (3, 1)):
        assert len(posted(server, "img2img", {**body, "inpainting_fill": fill})[3]) == n
    (warning,) = posted(server, "img2img", {**body, "width": 512, "height": 512})[3]
    assert "keeps its size, 64x48" in warning


def test_transparent_images_lie_on_white(server: Served) -> None:
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    _, _, inputs, _ = posted(server, "img2img", {"prompt": "a cat", "init_images": [sent(image)], "steps": 2})
    assert inputs["image"].getpixel((5, 5)) == (255, 255, 255)
    image.info["parameters"] = "a dog"
    assert flat(image).info["parameters"] == "a dog"


def test_resize_modes(server: Served) -> None:
    """0 stretches, 1 crops, 2 continues the edges, 3 stretches with a warning."""
    image = plain("red", (64, 32))
    image.paste("blue", (24, 0, 40, 32))
    body = {"prompt": "a cat", "init_images": [sent(image)], "width": 64, "height": 64, "steps": 2}
    for mode, size, n in ((0, (64, 32), 0), (1, (64, 64), 0), (2, (64, 64), 0), (3, (64, 32), 1)):
        _, recipe, inputs, warnings = posted(server, "img2img", {**body, "resize_mode": mode})
        assert inputs["image"].size == size and (recipe.width, recipe.height) == (64, 64)
        assert len(warnings) == n
    assert resized(image, (64, 64), 1).getpixel((24, 32)) == (0, 0, 255), "enlarged, its sides cut off"
    continued = resized(image, (64, 64), 2)
    assert continued.getpixel((32, 2)) == (0, 0, 255) and continued.getpixel((5, 60)) == (255, 0, 0)


def test_a_mask_is_filled_from_its_surroundings() -> None:
    """Nothing of the masked part is left, and nothing outside of it changes."""
    image = plain("red", (800, 600))
    image.paste("lime", (300, 200, 500, 400))
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (290, 190, 510, 410))
    result = np.asarray(filled(image, mask)).astype(int)
    inside = np.asarray(mask) > 0
    assert (result[~inside] == np.asarray(image)[~inside]).all()
    assert (result[inside][:, 1] < 30).all() and (result[inside][:, 0] > 200).all()
    everything = Image.new("L", image.size, 255)
    assert filled(image, everything).tobytes() == image.tobytes()


def test_masks_of_every_kind() -> None:
    size = (8, 8)
    opaque = Image.new("RGBA", size, (255, 255, 255, 255))
    assert mask_of(opaque, size, invert=False).getpixel((0, 0)) == 255
    assert mask_of(Image.new("RGB", size), size, invert=True).getpixel((0, 0)) == 255
    assert mask_of(Image.new("L", (4, 4), 255), size, invert=False).size == size


@pytest.mark.parametrize("mask", [None, Image.new("L", (3000, 1500), 255)])
def test_photos_beyond_the_limits_are_scaled(server: Served, mask: Image.Image | None) -> None:
    """With their mask; where no width and height say how large."""
    body = {"prompt": "a cat", "init_images": [sent(plain(size=(3000, 1500)), "JPEG")], "steps": 1}
    body |= {"mask": sent(mask)} if mask else {}
    _, _, inputs, (warning,) = posted(server, "img2img", body)
    assert {image.size for image in inputs.values()} == {
        (128, 64)
    } and "3000x1500 was scaled to 128x64" in warning
