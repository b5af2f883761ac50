"""How much one server takes on, in one place. `docs/server.md` has the same table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minikin.errors import BadRecipe
from minikin.recipes import Inpaint, Paint, Refine, Rework, Teach
from minikin.server.errors import Refused

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes and pixels, times in seconds."""

    body: int = 32 * MIB
    parts: int = 64  # files of a multipart body, and as many fields
    receive_s: float = 15.0  # for a head; for a body, and one more second for every RECEIVE_RATE bytes
    send_s: float = 60.0  # without a byte of an answer being taken
    connections: int = 512  # beyond which those that have not said what they want make room
    image: int = 20_000_000
    image_pixels: int = 16_000_000
    decode_s: float = 10.0
    decode_memory: int = 1024 * MIB
    concept: int = 16 * MIB
    concepts_per_client: int = 1000
    photos: int = 32
    photos_pixels: int = 160_000_000  # of all photos and masks of one teaching
    teach_steps: int = 5_000
    teach_batch: int = 32
    pictures: int = 10
    least_side: int = 64
    most_side: int = 2048
    steps: int = 50
    cost: float = 1500.0  # images x megapixels x steps of one request
    waiting: int = 64
    waiting_per_client: int = 16
    waiting_pixels: int = 400_000_000  # of images and photos of all that waits or is worked on: 7 bytes each
    batch: int = 32  # images at once, where so many fit into memory and are quicker together
    queue_wait_s: float = 120.0  # of a caller who holds the line
    attempts: int = 3  # a job that took the process, or its engine, down this often is not tried again
    keep_s: float = 24 * 3600.0  # results
    keep_bytes: int = 2048 * MIB
    drain_s: float = 30.0
    live_sessions: int = 8
    event_streams: int = 64


RECEIVE_RATE = 64 * 1024  # bytes a second


def check_paint(recipe: Paint, limits: Limits, side: int, picture: tuple[int, int] | None = None) -> None:
    """Raise Refused for a recipe that is larger than this server takes.

    side     of the base's own images, px
    image  width and height of the one that is painted over
    """
    w, h = _size(recipe, side, picture)
    steps = recipe.steps or limits.steps // 2
    if recipe.n > limits.pictures:
        raise _over("n", f"at most {limits.pictures} images a request", recipe.n)
    if recipe.steps and recipe.steps > limits.steps:
        raise _over("steps", f"at most {limits.steps} steps", recipe.steps)
    least = min(limits.least_side, side, *(picture or ()))
    for name, given in (("width", w), ("height", h)):
        if not least <= given <= limits.most_side:
            raise _over(name, f"{least} to {limits.most_side} pixels", given)
    if isinstance(recipe, Rework):
        steps = max(1, math.ceil(steps * recipe.strength))
    cost = recipe.n * w * h / 1e6 * steps
    if cost > limits.cost:
        raise Refused(
            f"The request asks for {recipe.n} images of {w}x{h} in {steps} steps, {cost:.0f} "
            f"megapixel-steps; this server takes {limits.cost:.0f} at once. Ask for fewer, smaller or quicker "
            "pictures.",
            status=422, code="too_expensive",
        )  # fmt: skip
    if recipe.device or recipe.dtype or recipe.engine != "eager":
        raise BadRecipe("device, dtype and engine are the server's own: leave them out.")


def check_teach(recipe: Teach, limits: Limits, side: int) -> None:
    """Raise Refused for teaching that is too large here; side: of the base's own images, px."""
    if recipe.size and recipe.size > 2 * side:
        raise _over("size", f"at most {2 * side} pixels, twice the base's own", recipe.size)
    if recipe.batch > limits.teach_batch:
        raise _over("batch", f"at most {limits.teach_batch} photos a step", recipe.batch)
    for name in ("steps", "max_steps"):
        if (getattr(recipe, name) or 0) > limits.teach_steps:
            raise _over(name, f"at most {limits.teach_steps} steps", getattr(recipe, name))


def _size(recipe: Paint, side: int, picture: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height of the image that comes out."""
    if picture and isinstance(recipe, Refine):
        recipe = recipe.sized(picture)
    elif picture and isinstance(recipe, Inpaint):
        left, right, up, down = recipe.margins
        return picture[0] + left + right, picture[1] + up + down
    return recipe.width or side, recipe.height or side


def _over(what: str, allowed: str, given: int) -> Refused:
    return Refused(
        f"{what}: this server takes {allowed} (it is {given}).", status=422, code="over_limit", param=what
    )
