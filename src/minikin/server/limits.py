"""Limits of one server, in one place; `docs/server.md` has the same table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minikin.errors import BadRecipe
from minikin.recipes import Img2Img, Inpaint, Paint, Refine, Teach
from minikin.server.errors import RequestRejected

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes and pixels, times in seconds."""

    body: int = 32 * MIB
    text_body: int = MIB  # where no image travels
    bodies: int = 1024 * MIB  # of all requests at work, half of it for one key
    parts: int = 64  # files of a multipart body, and as many fields
    receive_s: float = 15.0  # for a head; for a body, and one more second for every RECEIVE_RATE bytes
    send_s: float = 60.0  # without a byte of an answer being taken
    connections: int = 512  # beyond which connections that have sent no request are closed
    image: int = 20_000_000
    image_pixels: int = 16_000_000
    decode_s: float = 10.0  # of processor time
    decode_wait_s: float = 10.0  # for a turn of the decoder
    decode_memory: int = 1024 * MIB
    concept: int = 16 * MIB
    concepts_per_client: int = 1000
    concepts_per_key: int = 4000  # of all clients of one key
    photos: int = 32
    photos_pixels: int = 160_000_000  # of all photos and masks of one teaching
    teach_steps: int = 5_000
    teach_batch: int = 32
    images: int = 10  # of one request
    least_side: int = 64
    most_side: int = 2048
    steps: int = 50
    cost: float = 1500.0  # images x megapixels x steps of one request
    waiting: int = 64
    waiting_per_client: int = 16
    waiting_pixels: int = 400_000_000  # of the input images and photos of all unfinished jobs: 7 bytes each
    batch: int = 32  # images at once, where they fit into memory and are faster together
    queue_wait_s: float = 120.0  # of a blocking request
    attempts: int = 3  # a job that killed the process or its engine, or could not be stored, this often ends
    keep_s: float = 24 * 3600.0  # results
    keep_bytes: int = 2048 * MIB
    drain_s: float = 30.0
    live_sessions: int = 8
    event_streams: int = 64


RECEIVE_RATE = 64 * 1024  # bytes a second


def check_paint(recipe: Paint, limits: Limits, side: int, image: tuple[int, int] | None = None) -> None:
    """Raise RequestRejected for a recipe that is larger than this server allows.

    side   native image size of the base, pixels
    image  (width, height) of the source image of img2img or inpainting
    """
    w, h = _size(recipe, side, image)
    steps = recipe.steps or limits.steps // 2
    if recipe.n > limits.images:
        raise _over("n", f"at most {limits.images} images a request", recipe.n)
    if recipe.steps and recipe.steps > limits.steps:
        raise _over("steps", f"at most {limits.steps} steps", recipe.steps)
    least = min(limits.least_side, side, *(image or ()))
    for name, value in (("width", w), ("height", h)):
        if not least <= value <= limits.most_side:
            raise _over(name, f"{least} to {limits.most_side} pixels", value)
    if isinstance(recipe, Img2Img):
        steps = max(1, math.ceil(steps * recipe.strength))
    cost = recipe.n * w * h / 1e6 * steps
    if cost > limits.cost:
        raise RequestRejected(
            f"The request asks for {recipe.n} images of {w}x{h} in {steps} steps, {cost:.0f} "
            f"megapixel-steps; this server takes {limits.cost:.0f} at once. Ask for fewer or smaller images, "
            "or for fewer steps.",
            status=422, code="too_expensive",
        )  # fmt: skip
    if recipe.device or recipe.dtype or recipe.backend != "eager":
        raise BadRecipe("device, dtype and backend are set by the server: leave them out.")


def check_teach(recipe: Teach, limits: Limits, side: int) -> None:
    """Raise RequestRejected for teaching that is too large; side: native image size of the base, pixels."""
    if recipe.size and recipe.size > 2 * side:
        raise _over("size", f"at most {2 * side} pixels, twice the base's native size", recipe.size)
    if recipe.batch > limits.teach_batch:
        raise _over("batch", f"at most {limits.teach_batch} photos a step", recipe.batch)
    for name in ("steps", "max_steps"):
        if (getattr(recipe, name) or 0) > limits.teach_steps:
            raise _over(name, f"at most {limits.teach_steps} steps", getattr(recipe, name))


def _size(recipe: Paint, side: int, image: tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of the result."""
    if image and isinstance(recipe, Refine):
        recipe = recipe.with_size(image)
    elif image and isinstance(recipe, Inpaint):
        left, right, up, down = recipe.margins
        return image[0] + left + right, image[1] + up + down
    return recipe.width or side, recipe.height or side


def _over(param: str, allowed: str, value: int) -> RequestRejected:
    message = f"{param}: this server takes {allowed} (it is {value})."
    return RequestRejected(message, status=422, code="over_limit", param=param)
