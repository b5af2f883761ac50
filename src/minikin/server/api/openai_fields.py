"""OpenAI's fields of /v1/images as a recipe's: what is followed, what is refused, what gives a warning.

Whatever is accepted has an effect, or is neutral, or is named in `warnings` of the response.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from minikin.server.api.shared import MIN_STRENGTH, known_fields, seed_of
from minikin.server.errors import RequestRejected, invalid_field
from minikin.server.http import Strict
from minikin.server.service import Service

# OpenAI's names, of today and of later: their clients send one whatever the server has. All mean the base.
OPENAI_MODEL = re.compile(r"(gpt-image|chatgpt-image|dall-e)(-[\w.-]{1,60})?")


Format = Annotated[
    Literal["png", "jpeg", "webp"], BeforeValidator(lambda value: "png" if value is None else value)
]


class Images(Strict):
    """The fields of all three routes; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", max_length=32_000)
    model: str | None = None
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = Field(None, description="WxH in pixels, or auto")
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Format = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        None, description="low uses the fastest preset that is ready"
    )
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    background: Literal["opaque", "auto", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    input_fidelity: Literal["high", "low"] | None = Field(None, description="high keeps more of the image")
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    preset: str | None = None
    scheduler: str | None = None
    strength: float | None = Field(None, ge=0, le=1)
    concepts: dict[str, str] | list[str] = Field(default_factory=dict)


class Generation(Images):
    """/v1/images/generations."""

    prompt: str = Field(max_length=32_000)


def check(body: Images) -> None:
    """Raise RequestRejected for what is not done, and for fields that exclude each other."""
    if body.background == "transparent":
        why = "background: images are opaque here; leave it out, or send opaque or auto."
        raise invalid_field("background", why, code="unsupported_value")
    if body.output_format == "png" and body.output_compression not in (None, 100):
        why = "output_compression: PNG is lossless; leave it out, or ask for output_format jpeg or webp."
        raise invalid_field("output_compression", why, code="unsupported_value")
    if body.response_format == "url" and body.output_format != "png":
        why = "response_format: a URL leads to the PNG; ask for b64_json, or for output_format png."
        raise invalid_field("response_format", why, code="unsupported_value")
    if body.stream and (body.n or 1) > 1:
        raise invalid_field("n", "stream works for one image: n must be 1.")
    if body.stream and body.response_format == "url":
        why = "response_format: a stream sends b64_json; leave it out."
        raise invalid_field("response_format", why, code="unsupported_value")
    if body.partial_images and not body.stream:
        why = "partial_images: only a stream sends them; add stream=true, or leave it out."
        raise invalid_field("partial_images", why, code="unsupported_value")


def warnings_of(body: Images, *, edits: bool) -> list[str]:
    """A sentence for each field that is accepted and has no effect."""
    ignored = [name for name in ("style", "complexity") if getattr(body, name) is not None]
    if not edits:
        ignored += [name for name in ("input_fidelity", "strength") if getattr(body, name) is not None]
    if body.quality not in (None, "auto", "low", "standard"):
        ignored.append("quality")
    if body.moderation == "low":
        ignored.append("moderation")
    why = {
        "quality": "steps and preset decide", "moderation": "the server's content filter decides",
        "input_fidelity": "there is no image", "strength": "there is no image",
    }  # fmt: skip
    return [f"{name} has no effect here: {why.get(name, 'the prompt decides')}." for name in ignored]


def recipe_fields(service: Service, kind: str, body: Images) -> dict[str, Any]:
    """The recipe's fields for this request."""
    fields: dict[str, Any] = {
        "prompt": body.prompt, "negative": body.negative_prompt, "n": body.n or 1, "seed": seed_of(body.seed),
        "steps": body.num_inference_steps, "guidance": body.guidance_scale, "preset": _preset(service, body),
        "scheduler": body.scheduler,
        "strength": None if body.strength is None else max(MIN_STRENGTH, body.strength),
    }  # fmt: skip
    if body.size and body.size != "auto" and kind == "paint":  # the others' image is resized before
        fields["size"] = body.size
    return known_fields(kind, fields)


def _preset(service: Service, body: Images) -> str | None:
    """The preset of the model's name (`base:preset`) or of the field `preset`; the fastest for quality low."""
    name = body.model or service.engine.name
    if not OPENAI_MODEL.fullmatch(name) and name != service.engine.name:
        names = ready_models(service)
        if name not in names:
            raise no_model(name, f" Known: {', '.join(names)}; and OpenAI's names, which mean the base.")
        return name.rpartition(":")[2]
    if body.preset:
        return body.preset
    if body.quality == "low" and body.num_inference_steps is None:
        fastest: str | None = service.engine.describe()["live"]
        return fastest
    return None


def no_model(name: str, hint: str) -> RequestRejected:
    message = f"There is no model '{name[:80]}' here.{hint}"
    return RequestRejected(message, status=404, code="model_not_found", param="model")


def ready_models(service: Service) -> list[str]:
    """The base, and `base:preset` for each preset that is ready."""
    base = service.engine.name
    return [base, *(f"{base}:{p['name']}" for p in service.engine.describe()["presets"] if p.get("ready"))]
