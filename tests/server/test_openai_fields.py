"""OpenAI's fields: followed, refused in OpenAI's form of an error, or named in `warnings`."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import Any, get_args

import openai
import pytest
from openai.types.image_model import ImageModel
from PIL import Image

from minikin.server.api.openai_fields import Images
from minikin.server.api.openai_images import of_size
from minikin.server.limits import Limits
from tests.helpers.servers import Served, served
from tests.server.test_server_dialects import Recorder, png


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(Recorder(), tmp_path_factory.mktemp("o") / "s") as s:
        yield s


@pytest.fixture(scope="module")
def theirs(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def refused(call: Any, **parameters: Any) -> dict[str, Any]:
    """The error of a call that is refused: 400, in OpenAI's form."""
    with pytest.raises(openai.BadRequestError) as e:
        call(**parameters)
    error: dict[str, Any] = e.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


def size_of(reply: Any) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))).size


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*get_args(ImageModel), "gpt-image-7-nebula-2031-01-01", "dall-e-4"])
def test_every_name_of_openai_is_the_base(theirs: openai.OpenAI, model: str) -> None:
    """Clients send one whatever the server has; what tomorrow's send is taken, too."""
    reply = theirs.images.generate(model=model, prompt="a cat", response_format="b64_json")
    assert reply.data and reply.data[0].b64_json


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-image/../x", "flux", "dall-e-" + "9" * 80, "x-dall-e-3"])
def test_other_names_are_no_model(theirs: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        theirs.images.generate(model=model, prompt="a cat")


def test_the_fields_of_the_client_are_known() -> None:
    """Those that its types name for generations are read, or refused since they are for SVG, GIF or markup."""
    from openai.types import image_edit_params, image_generate_params

    field_names = set(Images.model_fields) | {"image", "mask"}
    for module, base in (
        (image_generate_params, "ImageGenerateParamsBase"),
        (image_edit_params, "ImageEditParamsBase"),
    ):
        unknown = set(getattr(module, base).__annotations__) - field_names
        assert {re.sub(r"frame_\w+|svg\w*|markup", "refused", name) for name in unknown} <= {"refused"}, unknown


# ---- edits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["128x128", "96x64", "65x130"])
@pytest.mark.parametrize("mask", [False, True])
def test_edits_have_the_size_that_is_asked_for(
    theirs: openai.OpenAI, server: Served, size: str, mask: bool
) -> None:
    image, masked = Image.new("RGB", (256, 192), "red"), Image.new("RGBA", (256, 192), (0, 0, 0, 255))
    masked.paste((0, 0, 0, 0), (0, 0, 128, 192))
    more: dict[str, Any] = {"mask": png(masked)} if mask else {}
    reply = theirs.images.edit(image=png(image), prompt="a cat", size=size, **more)  # type: ignore[arg-type]
    width, height = map(int, size.split("x"))
    assert size_of(reply) == (width, height) and reply.size == size
    engine: Any = server.service.engine
    _, _, inputs = engine.seen[-1]
    assert all(image_.size == (width, height) for image_ in inputs.values()) and len(inputs) == 1 + mask
    (note,) = reply.warnings  # type: ignore[attr-defined]
    assert "256x192" in note and size in note


@pytest.mark.parametrize("size", [None, "auto"])
def test_auto_is_the_size_of_the_image(theirs: openai.OpenAI, size: Any) -> None:
    reply = theirs.images.edit(image=png(Image.new("RGB", (72, 48))), prompt="a cat", size=size or openai.omit)
    assert size_of(reply) == (72, 48) and reply.warnings == []  # type: ignore[attr-defined]
    reply = theirs.images.create_variation(image=png(Image.new("RGB", (72, 48))), size="64x64")  # type: ignore[arg-type]
    assert size_of(reply) == (64, 64)


def test_photos_of_12_megapixels_are_scaled(theirs: openai.OpenAI) -> None:
    """Their mask with them; an image within the limits keeps its size."""
    photo, file = Image.new("RGB", (4032, 3024), "red"), io.BytesIO()
    photo.save(file, "JPEG")
    reply = theirs.images.edit(image=("phone.jpg", file.getvalue(), "image/jpeg"), prompt="a cat")
    assert size_of(reply) == (128, 96) and "4032x3024 was scaled to 128x96" in reply.warnings[0]  # type: ignore[attr-defined]
    images = {"image": photo, "mask": Image.new("L", photo.size)}
    fitted, _ = of_size(images, "auto", 512, Limits())
    assert {image_.size for image_ in fitted.values()} == {(1024, 768)}
    assert of_size(images, "auto", 1024, Limits())[0]["image"].size == (2048, 1536)
    within = {"image": Image.new("RGB", (2048, 1000))}
    assert of_size(within, "auto", 512, Limits()) == (within, "")


@pytest.mark.parametrize("size", ["99999x99999", "0x64", "64", "large", "2049x64", "-64x64", "64x64x64"])
def test_sizes_that_are_none_are_refused(theirs: openai.OpenAI, size: Any) -> None:
    """Before anything of that size is made."""
    error = refused(theirs.images.edit, image=png(Image.new("RGB", (64, 64))), prompt="a cat", size=size)
    assert error["param"] == "size" and "64 to 2048" in error["message"]


def test_several_images_are_refused(theirs: openai.OpenAI) -> None:
    images = [png(Image.new("RGB", (64, 64))) for _ in range(2)]
    error = refused(theirs.images.edit, image=images, prompt="a cat")
    assert error["code"] == "too_many_images" and error["param"] == "image"
    assert theirs.images.edit(image=images[:1], prompt="a cat").data


def test_rules_of_masks(theirs: openai.OpenAI) -> None:
    image = Image.new("RGB", (64, 64))
    for mask, words in (
        (Image.new("RGB", (64, 64)), "no transparency"), (Image.new("RGBA", (32, 64)), "must be equal"),
    ):  # fmt: skip
        error = refused(theirs.images.edit, image=png(image), mask=png(mask), prompt="a cat")
        assert error["code"] == "invalid_mask" and words in error["message"]


def test_input_fidelity_keeps_more_of_the_image(theirs: openai.OpenAI, server: Served) -> None:
    strengths = {}
    for fidelity in ("low", "high"):
        theirs.images.edit(image=png(Image.new("RGB", (64, 64))), prompt="a", input_fidelity=fidelity)  # type: ignore[arg-type]
        strengths[fidelity] = server.service.engine.seen[-1][1].strength  # type: ignore[attr-defined]
    assert strengths == {"low": 0.75, "high": 0.5}
    reply = theirs.images.edit(
        image=png(Image.new("RGB", (64, 64))), prompt="a", input_fidelity="high", extra_body={"strength": 0.9}
    )
    assert reply.data and server.service.engine.seen[-1][1].strength == 0.9  # type: ignore[attr-defined]


# ---- refused and warned of -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"background": "transparent"}, "background"), ({"background": "red"}, "background"),
        ({"output_format": "gif"}, "output_format"), ({"output_format": "svg"}, "output_format"),
        ({"output_compression": 50}, "output_compression"), ({"output_compression": 0}, "output_compression"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"quality": "ultra"}, "quality"), ({"moderation": "none"}, "moderation"), ({"style": "odd"}, "style"),
        ({"partial_images": 2}, "partial_images"), ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"), ({"stream": True, "n": 2}, "n"),
        ({"response_format": "url", "output_format": "webp"}, "response_format"),
        ({"response_format": "hex"}, "response_format"), ({"n": 0}, "n"), ({"n": 11}, "n"),
        ({"extra_body": {"frame_count": 3}}, "frame_count"), ({"extra_body": {"svg": {}}}, "svg"),
    ],
)  # fmt: skip
def test_values_that_are_not_done_are_refused(
    theirs: openai.OpenAI, parameters: dict[str, Any], param: str
) -> None:
    error = refused(theirs.images.generate, prompt="a cat", **parameters)
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    "parameters",
    [{"background": "opaque"}, {"background": "auto"}, {"quality": "auto"}, {"quality": "low"},
     {"size": "auto"}, {"quality": "standard"}, {"moderation": "auto"}, {"output_compression": 100},
     {"user": "me"}, {"n": 1}, {"output_format": "jpeg", "output_compression": 0}, {"partial_images": 0},
     {"output_format": "webp", "output_compression": 100}, {"stream": False},
     {"output_format": None, "model": None, "size": None, "partial_images": None, "quality": None}],
)  # fmt: skip
def test_neutral_and_followed_values_pass(theirs: openai.OpenAI, parameters: dict[str, Any]) -> None:
    reply = theirs.images.generate(prompt="a cat", **parameters)
    assert reply.data and reply.warnings == []  # type: ignore[attr-defined]
    assert reply.background == "opaque" and reply.output_format == (parameters.get("output_format") or "png")


@pytest.mark.parametrize(
    "parameters",
    [{"quality": "high"}, {"quality": "hd"}, {"style": "vivid"}, {"moderation": "low"},
     *({"extra_body": body} for body in (
         {"complexity": "high"}, {"input_fidelity": "high"}, {"strength": 0},
         {"concepts": {"rex": "sha256:" + "a" * 64}}))],
)  # fmt: skip
def test_values_without_effect_are_named(theirs: openai.OpenAI, parameters: dict[str, Any]) -> None:
    reply = theirs.images.generate(prompt="a cat", **parameters)
    name = next(iter(parameters.get("extra_body", parameters)))
    (warning,) = reply.warnings  # type: ignore[attr-defined]
    assert warning.startswith(f"{name} has no effect here")


# ---- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("prompt", "a cat"), ("prompt", "a dog")], "prompt"), ([("seed", "1"), ("seed[]", "2")], "seed"),
        ([("concepts[rex]", "a" * 64), ("concepts", "tom@" + "a" * 64)], "concepts"),
        ([("\x1b[2J", "1"), ("\x1b[2J", "2")], None), ([("n", "two")], "n"), ([("images", "[]")], "images"),
    ],
)  # fmt: skip
def test_fields_of_a_form_are_not_dropped(server: Served, fields: Any, param: str | None) -> None:
    parts = [
        (name, (None, value)) for name, value in [("prompt", "a cat"), *fields][fields[0][0] == "prompt" :]
    ]
    with server.client() as c:
        response = c.post(
            "/v1/images/edits", files=[("image", ("a.png", png(Image.new("RGB", (64, 64))))), *parts]
        )
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.isprintable() and (param is None or response.json()["error"]["param"] == param)


def test_contents_of_concepts_may_be_a_list_in_a_form(server: Served) -> None:
    contents = [("concepts[]", (None, f"{name}@{'a' * 64}")) for name in ("rex", "tom")]
    files = [("image", ("a.png", png(Image.new("RGB", (64, 64))))), ("prompt", (None, "a cat")), *contents]
    with server.client() as c:
        (warning,) = c.post("/v1/images/edits", files=files).json()["warnings"]
    assert "<rex>, <tom>" in warning


def test_strength_0_is_the_least_there_is(theirs: openai.OpenAI, server: Served) -> None:
    assert theirs.images.edit(
        image=png(Image.new("RGB", (64, 64))), prompt="a cat", extra_body={"strength": 0}
    ).data
    assert server.service.engine.seen[-1][1].strength == 0.01  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations", "/api/concepts"])
def test_a_form_s_route_says_that_it_takes_a_form(server: Served, path: str) -> None:
    with server.client() as c:
        response = c.post(
            path, json={"prompt": "a cat", "images": [{"image_url": "data:image/png;base64,aaaa"}]}
        )
    assert response.status_code == 415 and "multipart/form-data" in response.text
